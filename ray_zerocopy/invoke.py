"""Call a shared model as a Ray task: the functions for calls from anywhere, without an actor.

Note [A call]

    caller                                   any worker process of the cluster
    standin(data)  --- one Ray task --->     1. (Ray) resolve ObjectRefs among the arguments
                                             2. lend a model no call had before (Note [Warm views])
                                             3. call it under torch.inference_mode
    the result     <--- its skeleton,  ---   4. take the result apart as a model is, so that its
                        its bytes               bytes go into the store once and come back as views

Between the calls the process keeps the model mapped, and at most a small object over that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.util.client
import torch
from torch.nn.utils import parametrize

from . import _graph, _layout, _mapping, _paths, _store, actor
from ._copies import map_tensors
from ._store import ModelRef
from ._warm import WarmModels
from .errors import ZeroCopyError

__all__ = ["RemoteCall", "RemoteMethod", "RemoteModel", "call_model", "rewrite_pipeline"]

# A fact of a model (its config, its name) larger than this when pickled does not travel with the stand-in.
LARGEST_FACT = 1 << 20
# Bytes of a result up to which it is copied, not mapped: Ray itself keeps those under 100 KiB out of the store.
SMALL_RESULT = 64 << 10


# ---------------------------------------------------------------- in the worker

_warm = WarmModels()


def _gpu_model_call(call: tuple[ModelRef, int | None, str], /, *args: Any, **kwargs: Any) -> Any:
    # On a device a model is not kept: Ray ends the worker of a GPU task after one call.
    loaded = actor.load(call[0], None)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(loaded.device))  # copy: to a device
    return _Result(_called(loaded.model, call, args, kwargs))


def _model_call(call: tuple[ModelRef, int | None, str], /, *args: Any, **kwargs: Any) -> Any:
    lent = _warm.lend(call[0])
    try:
        return _Result(_called(lent.model, call, args, kwargs))
    finally:
        _warm.give_back(lent)


def _called(model: Any, call: tuple[ModelRef, int | None, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model_ref, part, method_name = call
    actor.check_one(model, model_ref)
    if part is not None:
        model = model[part]
    method = model if method_name == "__call__" else getattr(model, method_name)
    with torch.inference_mode():
        result = method(*args, **kwargs)
        return list(result) if inspect.isgenerator(result) else result  # its code is part of the call


# ---------------------------------------------------------------- the task

_task = ray.remote(_model_call)
# Ray ends a worker after one call (max_calls=1), and so frees its GPU and lets the next see another one, only if the
# function is declared with GPUs; .options(num_gpus=...) does not bring that.
_gpu_task = ray.remote(num_gpus=1)(_gpu_model_call)


def _with_options(options: Mapping[str, Any]) -> Any:
    """Return the remote function for Ray's `options`; raises ValueError for one that Ray does not know."""
    function = _gpu_task if options.get("num_gpus") else _task
    return function.options(**{"name": "call_model", **options})


class RemoteCall:
    """`call_model`, a Ray remote function: `.remote(...)` starts a task, `.options(...)` takes Ray's options."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._function: Any = None

    def options(self, **options: Any) -> RemoteCall:
        """Return this function with options for its tasks: `num_cpus`, `num_gpus`, `resources`, `runtime_env`, ..."""
        changed = RemoteCall({**self._options, **options})
        _with_options(changed._options)
        return changed

    def remote(
        self,
        model_ref: ModelRef,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        method_name: str = "__call__",
    ) -> Any:
        """Start a task that calls a shared model.

        Args:
            model_ref: What `prepare_model_for_actors` returned.
            args: The method's positional arguments, a tuple. An `ObjectRef` that is directly one of them, or of
                `kwargs`, is replaced by its value; the task starts when that is there.
            kwargs: The method's keyword arguments.
            method_name: Which method of the model to call.

        Returns:
            The `ObjectRef` of what the method returns, or several with `num_returns`. A generator runs to its end
            within the call, and its items are the result, a list.

        Raises:
            TypeError: `model_ref`, `args`, `kwargs` or `method_name` is of the wrong type.
            ModelLostError: The handle is from another Ray session.
        """
        if not isinstance(args, (tuple, list)):
            raise TypeError(
                f"call_model takes the model's positional arguments as a tuple, not as one "
                f"{type(args).__qualname__}: call_model.remote(model_ref, (data,))."
            )
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(
                f"call_model takes the model's keyword arguments as a dict, not as a {type(kwargs).__qualname__}: "
                f'call_model.remote(model_ref, (), {{"name": value}}).'
            )
        if not isinstance(method_name, str):
            raise TypeError(f"call_model takes the name of a method of the model, not {method_name!r}.")
        _store.check(model_ref)
        if self._function is None:
            self._function = _with_options(self._options)
        return self._function.remote((model_ref, None, method_name), *args, **(kwargs or {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError, as any remote function."""
        raise TypeError("call_model runs as a Ray task: call_model.remote(model_ref, args, kwargs).")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def __repr__(self) -> str:
        return f"call_model.options({', '.join(f'{k}={v!r}' for k, v in self._options.items())})"


call_model = RemoteCall({})
"""Call a shared model in a Ray task: `call_model.remote(model_ref, args=(), kwargs=None, method_name="__call__")`.

The model runs in eval mode under `torch.inference_mode()`, on the GPU that Ray assigned to the task, else on the CPU.
Tensors among the arguments, also in lists, tuples, mappings and dataclasses, go there.

The result's tensors are on the CPU, require no gradient, and are the reader's own: writable, over the store's pages
copy-on-write where the result is large.
"""


# ---------------------------------------------------------------- results


class _Result:
    """What a call returned, until Ray pickles it; what is unpickled is the value itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        if isinstance(self.value, (str, bytes, int, float, bool, type(None))):
            return _same, (self.value,)
        with contextlib.suppress(Exception):
            return _rebuild_small, (_SmallPickler.dumps(self.value),)
        try:
            parts = _graph.take_apart(self.value, leave_out=_store.CARRIED)
        except TypeError:
            return _same, (self.value,)  # Ray's own message says more of a result than ours of a model
        packed = _layout.pack(parts.tensors, parts.arrays)
        buffers = [pickle.PickleBuffer(buffer.memory()) for buffer in packed.buffers]
        return _rebuild_result, (parts.skeleton, packed.layout, buffers, parts.carried)

    def __iter__(self) -> Iterator[_Result]:  # Ray's num_returns=2 and more
        return (_Result(item) for item in self.value)

    def __len__(self) -> int:
        return len(self.value)


def _same(value: Any) -> Any:
    return value


class _SmallPickler(pickle.Pickler):
    """The short way for small results: ordinary tensors in tuples, lists, dicts and Hugging Face's outputs.

    Raises for any other, which then goes the way of a model. That takes 0.3 ms more on either side.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self._nbytes = 0
        self._storages: set[int] = set()

    @classmethod
    def dumps(cls, value: object) -> bytes:
        stream = io.BytesIO()
        cls(stream).dump(value)
        return stream.getvalue()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor:
            named = isinstance(obj, type) and issubclass(obj, OrderedDict) and obj.__module__ != "__main__"
            if named or isinstance(obj, (OrderedDict, torch.dtype)) or obj is _small_tensor:
                return NotImplemented
            raise pickle.PicklingError
        storage = obj.untyped_storage()
        self._nbytes += obj.nbytes
        here = obj.layout is torch.strided and obj.device.type == "cpu" and obj.is_contiguous()
        if not here or obj.requires_grad or obj.is_quantized or obj.__dict__:
            raise pickle.PicklingError
        if self._nbytes > SMALL_RESULT or storage._cdata in self._storages:
            raise pickle.PicklingError
        self._storages.add(storage._cdata)
        return _small_tensor, (obj.reshape(-1).view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _small_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _rebuild_small(stream: bytes) -> Any:
    with torch.inference_mode(False):
        return pickle.loads(stream)


def _rebuild_result(skeleton: bytes, layout: _layout.Layout, stored: list[Any], carried: list[Any]) -> Any:
    return _store.build(layout, skeleton, _own_memory(stored), carried)


def _own_memory(stored: list[Any]) -> list[tuple[Any, int]]:
    """Return writable memory for the buffers: a private view of those in the store, a copy of small ones."""
    if sum(memoryview(buffer).nbytes for buffer in stored) >= SMALL_RESULT:
        begin, nbytes, offsets = _store.span(stored)
        region = _mapping.region_at(begin)
        if region is not None and region.shared:
            try:
                memory, base = _mapping.private_view(begin, nbytes, stored)
                return [(memory, base + offset) for offset in offsets]
            except (_mapping.Unmappable, ZeroCopyError):  # the latter: out of mappings
                pass
    return [(bytearray(buffer), 0) for buffer in stored]  # copy: Ray gave heap memory, or no view can be had


# ---------------------------------------------------------------- the stand-in


class RemoteMethod:
    """One method of a model, run by a Ray task: call it for the result, or `.remote(...)` for an `ObjectRef`."""

    def __init__(self, model: RemoteModel, name: str) -> None:
        self._model = model
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method in a task and return its result."""
        return self._model._wait(self._name, args, kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        """Start the task and return its `ObjectRef`."""
        return self._model._start(self._name, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's method, without `self`."""
        try:
            signature = inspect.signature(getattr(self._model._kind, self._name))
        except Exception as error:  # TorchScript's classes have no methods of their own
            raise AttributeError("__signature__") from error
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __repr__(self) -> str:
        return f"{self._model!r}.{self._name}"


class RemoteModel:
    """A model's place in a rewritten pipeline: calling it runs a Ray task, and it has no weights of its own.

    `standin(data)` waits for the result and returns it; `standin.remote(data)` returns the `ObjectRef`; each method
    named to `rewrite_pipeline` does both too; beside `__call__` there is `forward`, the same, and `generate` where a
    Hugging Face model has it, as its pipelines expect. It pickles, and travels to tasks and actors.

    Data goes in and comes out on the CPU, wherever the task runs: `device` says so. Attributes of the model that are
    no weights (`config`, `name_or_path`), and of its class, are answered from a copy made when the pipeline was
    rewritten.
    """

    def __init__(
        self,
        model_ref: ModelRef,
        part: int | None,
        kind: type,
        facts: dict[str, Any],
        dtype: torch.dtype | None,
        method_names: tuple[str, ...],
        ray_remote_options: dict[str, Any],
    ) -> None:
        self.model_ref = model_ref
        self._part = part
        self._kind = kind
        self._facts = facts
        self._dtype = dtype
        self._method_names = method_names
        self._options = ray_remote_options
        self._prepared: dict[tuple[str, bool], Any] = {}

    # ------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model in a task and return its result."""
        return self._wait("__call__", args, kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        """Start a call of the model and return its `ObjectRef`, so that many run in parallel."""
        return self._start("__call__", args, kwargs)

    def _wait(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An actor does not give up its CPUs while it waits, as a task does. So that one that has them all does
        # not wait for ever, its call runs in its stead, on the CPUs it is not using.
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        return ray.get(self._start(method, args, kwargs, no_cpus=in_actor))

    def _start(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], no_cpus: bool = False
    ) -> ray.ObjectRef:
        if method not in self._method_names:
            raise TypeError(f"{self!r} is not callable by {method}: {self._hint(method)}")
        _store.check(self.model_ref)
        prepared = self._prepared.get((method, no_cpus))
        if prepared is None:
            options = {"name": f"call_model:{method}", **self._options}
            if no_cpus:
                options = {"num_cpus": 0, **options}
            prepared = self._prepared[method, no_cpus] = _with_options(options)
        return prepared.remote((self.model_ref, self._part, method), *args, **kwargs)

    # ------------------------------------------------------------ what pipelines ask of a model

    @property
    def device(self) -> torch.device:
        """Where data goes in and comes out: the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the model's first floating-point parameter, or None."""
        return self._dtype

    @property
    def training(self) -> bool:
        """Always False: the model runs in eval mode."""
        return False

    def eval(self) -> RemoteModel:
        """Return itself: the model runs in eval mode."""
        return self

    def train(self, mode: bool = True) -> RemoteModel:
        """Return itself for `train(False)`; refuse train mode, since what a call changes goes with it."""
        if mode:
            raise ValueError(
                f"{self!r} cannot train: each call has a model of its own that goes with the call. Load the model "
                f"with load_model_in_actor(model_ref, keep_flags=True) in an actor to train it there."
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> RemoteModel:
        """Return itself for the CPU and for the dtype that the model has: here is nothing to move or cast.

        Raises ValueError for any other: tasks run on a GPU if `rewrite_pipeline` was given `num_gpus`.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise ValueError(
                f"{self!r} has no weights here to move to {device}: its calls run where Ray places their tasks, and "
                f"data goes in and out on the CPU. For calls on a GPU: rewrite_pipeline(pipeline, num_gpus=1)."
            )
        if dtype is not None and dtype != self._dtype:
            raise ValueError(
                f"{self!r} has no weights here to cast to {dtype}. Cast the model, then rewrite the pipeline."
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_method_names", "_facts", "_kind"):
            raise AttributeError(name)
        if name in self._method_names:
            return RemoteMethod(self, name)
        if name in self._facts:
            return self._facts[name]
        static = inspect.getattr_static(self._kind, name, self)
        if isinstance(static, (classmethod, staticmethod)):
            return getattr(self._kind, name)
        if static is not self and not hasattr(static, "__get__"):
            return static
        raise AttributeError(f"{self!r} has no '{name}': {self._hint(name)}", name=name, obj=self)

    def _hint(self, name: str) -> str:
        # What else every module has (parameters, half, state_dict) is about the weights, or moves them.
        own = name in ("__call__", "forward") or not hasattr(torch.nn.Module, name)
        if own and callable(getattr(self._kind, name, None)):
            return (
                f"name it where the pipeline is rewritten, rewrite_pipeline(pipeline, method_names=(..., '{name}'))."
            )
        return "its weights are in the object store, and load_model_in_actor(standin.model_ref) gives the model."

    # ------------------------------------------------------------ as an object

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModel:
        twin = copy.copy(self)
        twin._facts = copy.deepcopy(self._facts, memo)
        return twin

    def __repr__(self) -> str:
        return f"RemoteModel({self._kind.__name__})"


# ---------------------------------------------------------------- pipelines


def rewrite_pipeline(
    pipeline: Any, method_names: str | Iterable[str] = ("__call__",), **ray_remote_options: Any
) -> Any:
    """Return a copy of a pipeline in which each model is a stand-in that runs as a Ray task wherever it is called.

    The models, wherever they are (attributes, private names, lists, dicts, nested objects), go into Ray's object
    store once. The pipeline is not changed, and shares nothing with the copy. What is called on the copy runs
    here, but for its models.

    Args:
        pipeline: The object, such as a Hugging Face `pipeline()`; or a model.
        method_names: The methods of models that can be called; each model gets those of them that it has, and
            those of which the pipeline keeps a bound method.
        ray_remote_options: For the tasks, as for `ray.remote`: `num_cpus`, `num_gpus`, `resources`, `runtime_env`,
            `max_retries`.

    Returns:
        An object of the same kind. A `device` attribute of it, as Hugging Face has it, becomes the CPU, where
        data goes in and comes out. One model under two names is one stand-in, a `RemoteModel`.

    Raises:
        TypeError: A part cannot be pickled, or something in `method_names` is no name.
        ValueError: The pipeline has no models, no model has a method of a name, or Ray does not know an option.
        ZeroCopyError: The store of this node is too small.

    Example:
        >>> import torch, types
        >>> pipeline = types.SimpleNamespace(model=torch.nn.Linear(4, 2), labels=["no", "yes"])
        >>> rewritten = rewrite_pipeline(pipeline)
        >>> rewritten.model
        RemoteModel(Linear)
        >>> rewritten.model(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """
    name = type(pipeline).__name__
    found = actor.find_models(pipeline)
    if not found:
        raise ValueError(
            f"{name} has no models in it to call remotely. Those are looked for in the object and what it holds, not "
            f"in its class or in globals."
        )
    _with_options(ray_remote_options)
    # A bound method of a model, kept by the pipeline, would take the stand-in for the model.
    held = [part for _, part in _paths.walk(pipeline, stop_at=actor.MODEL_TYPES)]
    bound = [part for part in held if _is_bound(part)]
    parts = _graph.take_apart(pipeline, _LEFT_OUT, bound, in_process=actor.MODEL_TYPES)
    models = [model for _, model in found]
    models += [part for part in parts.carried if isinstance(part, actor.MODEL_TYPES)]  # of functions: globals too
    models = list({id(model): model for model in models}.values())
    methods = _methods(models, method_names)
    used = {(id(part.__self__), part.__name__): None for part in bound}
    script_methods = dict.fromkeys(part.name for part in held if isinstance(part, torch.ScriptMethod))
    paths = {id(model): path for path, model in found}
    standins: dict[int, RemoteModel] = {}
    for tied in _tied(models):
        alone = len(tied) == 1
        try:
            model_ref = _store.put(tied[0]) if alone else _store.put(tuple(tied), name=f"models of {name}")
        except TypeError as error:
            where = ", ".join(f"{name}{paths.get(id(model), '')}" for model in tied)
            raise TypeError(f"{where}: {error}") from error
        for number, model in enumerate(tied):
            own = [method for method in methods if _has_method(model, method)]
            if "__call__" in own and isinstance(model, torch.nn.Module):
                own += ["forward", *["generate"] * _generates(model)]
            if isinstance(model, torch.jit.ScriptModule):
                own += [method for method in script_methods if method not in own and _has_method(model, method)]
            own += [method for owner, method in used if owner == id(model) and method not in own]
            standins[id(model)] = RemoteModel(
                model_ref,
                None if alone else number,
                parametrize.type_before_parametrizations(model) if _is_module(model) else type(model),
                _facts(model),
                _dtype(model),
                tuple(own),
                ray_remote_options,
            )
    packed = _layout.pack(parts.tensors, parts.arrays)
    memory = [(bytearray(buffer.memory()), 0) for buffer in packed.buffers]  # copy: the source keeps its own
    tensors = _layout.unpack(packed.layout, memory, keep_flags=True)
    arrays = _layout.unpack_arrays(packed.layout, memory)
    carried = [
        RemoteMethod(standins[id(part.__self__)], part.__name__) if _is_bound(part) else standins.get(id(part), part)
        for part in parts.carried
    ]
    rewritten, _ = _graph.put_together(parts.skeleton, tensors, arrays, carried, keep_flags=True)
    actor.set_device(rewritten, torch.device("cpu"))
    return rewritten


def _is_bound(part: object) -> bool:
    return isinstance(part, types.MethodType) and isinstance(part.__self__, actor.MODEL_TYPES)


def _is_module(model: object) -> bool:
    return isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def _methods(models: list[Any], names: str | Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"method_names has {name!r}, which is not a name. Give those of methods: ('__call__',).")
        if name != "__call__" and (hasattr(RemoteModel, name) or name in _FIELDS):
            raise ValueError(f"method_names: '{name}' has a meaning of its own on a stand-in and cannot be called.")
        if name.startswith("__") and name != "__call__":
            raise ValueError(f"method_names: '{name}' is looked up by Python itself, and cannot be called remotely.")
        if not any(_has_method(model, name) for model in models):
            kinds = ", ".join(sorted({type(model).__name__ for model in models}))
            raise ValueError(f"method_names: no model has a method '{name}'. The models are of: {kinds}.")
    return names


_FIELDS = frozenset(inspect.signature(RemoteModel).parameters) | {
    f"_{name}" for name in (*inspect.signature(RemoteModel).parameters, "options", "prepared")
}


def _generates(model: Any) -> bool:
    """Tell whether this is a Hugging Face model that generates."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and _has_method(model, "generate")


def _has_method(model: object, name: str) -> bool:
    if isinstance(inspect.getattr_static(type(model), name, None), (property, functools.cached_property)):
        return False
    if isinstance(model, torch.export.ExportedProgram):
        return False  # it has a __call__, which only says to call what its module() gives
    return callable(getattr(model, name, None))


def _tied(models: list[Any]) -> list[list[Any]]:
    """Group the models, in order, so that those which share a tensor's bytes are together."""
    groups: list[tuple[set[int], list[Any]]] = []
    for model in models:
        storages = {
            part.untyped_storage()._cdata
            for _, tensor in _paths.walk(model)
            if isinstance(tensor, torch.Tensor)
            for part in _graph.components(tensor)
        }
        members = [model]
        for group in [group for group in groups if group[0] & storages]:
            groups.remove(group)
            storages |= group[0]
            members = group[1] + members
        groups.append((storages, members))
    return [members for _, members in groups]


def _facts(model: object) -> dict[str, Any]:
    """Return copies of the attributes of a model that are small and have no tensors in them."""
    facts = {}
    for name, value in vars(model).items():
        if name in _TORCH_OWN or isinstance(value, actor.MODEL_TYPES):
            continue
        try:
            # With what its functions hold: all that travels with the stand-in.
            whole = _graph.take_apart(value, _LEFT_OUT)
            parts = _graph.take_apart(value, _LEFT_OUT, in_process=actor.MODEL_TYPES)
        except TypeError:
            continue
        weights = whole.tensors or whole.arrays or any(isinstance(p, actor.MODEL_TYPES) for p in whole.carried)
        if not weights and len(whole.skeleton) <= LARGEST_FACT:
            facts[name] = _graph.put_together(parts.skeleton, (), (), parts.carried, keep_flags=True)[0]
    return facts


_TORCH_OWN = frozenset(vars(torch.nn.Module()))
# An ObjectRef that is pickled here, and not by Ray, is never let go.
_LEFT_OUT = (*actor.MODEL_TYPES, *_store.CARRIED)


def _dtype(model: Any) -> torch.dtype | None:
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
