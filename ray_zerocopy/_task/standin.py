"""The stand-in of a model in a rewritten pipeline. Its calls run as Ray tasks, and it has no weights."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import ray
import torch

from .. import actor
from .._model import graph
from .._store.put import CARRIED
from .._store.ref import ModelRef, check
from .call import Call, split_options
from .weightless import MODULE_ATTRIBUTES, NeedsWeightsError, Weightless, is_method

__all__ = [
    "LEFT_OUT",
    "RESERVED_NAMES",
    "RemoteMethod",
    "RemoteModel",
    "dtype_of",
    "facts_of",
    "generates",
    "has_method",
    "is_bound_method",
    "is_eager_module",
]


# An attribute of a model (its config, its name) that is larger when pickled does not travel with the stand-in.
LARGEST_FACT = 1 << 20


class RemoteMethod:
    """A method of a model that runs as a Ray task. A call returns the result, `.remote(...)` an `ObjectRef`."""

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
        """The signature of the model's method without `self`."""
        try:
            signature = inspect.signature(getattr(self._model._kind, self._name))
        except Exception as error:  # TorchScript's classes have no methods of their own
            raise AttributeError("__signature__") from error
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __repr__(self) -> str:
        return f"{self._model!r}.{self._name}"


class RemoteModel:
    """The stand-in of a model in a rewritten pipeline. Each call runs a Ray task; the stand-in has no weights.

    `standin(data)` waits for the result and returns it. `standin.remote(data)` returns the `ObjectRef`. Each method
    named to `rewrite_pipeline` has both forms. `forward` is the same as `__call__`, and a Hugging Face model that
    generates has `generate`. A stand-in pickles, and travels to tasks and actors.

    Data goes in and comes out on the CPU, wherever the task runs: `device` is the CPU. Other attributes of the model
    and its class, also properties such as `config`, are answered by a copy of the model without weights. It is made
    when the pipeline is rewritten. Attributes that need the weights raise AttributeError.

    Args:
        model_ref: The handle of the model, or of several models that share tensors.
        part: The number of the model, if there are several.
        kind: The class of the model.
        facts: Copies of attributes of the model that its copy without weights does not have.
        weightless: The copy without weights, if there is one.
        dtype: The dtype of the model.
        method_names: The methods that can be called.
        ray_remote_options: Options of the tasks.
    """

    def __init__(
        self,
        model_ref: ModelRef,
        part: int | None,
        kind: type,
        facts: dict[str, Any],
        weightless: Weightless | None,
        dtype: torch.dtype | None,
        method_names: tuple[str, ...],
        ray_remote_options: dict[str, Any],
    ) -> None:
        self.model_ref = model_ref
        self._part = part
        self._kind = kind
        self._facts = facts
        self._weightless = weightless
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
        # A task gives up its CPUs while it waits, an actor does not. An actor that has all CPUs would wait forever.
        # So its call asks for no CPU, and runs on those that the actor does not use meanwhile.
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        return ray.get(self._start(method, args, kwargs, no_cpus=in_actor))

    def _start(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], no_cpus: bool = False
    ) -> ray.ObjectRef:
        if method not in self._method_names:
            raise TypeError(f"{self!r} cannot call {method}: {self._hint(method)}")
        check(self.model_ref)
        prepared = self._prepared.get((method, no_cpus))
        if prepared is None:
            options = {"name": f"call_model:{method}", **self._options}
            if no_cpus:
                options = {"num_cpus": 0, **options}
            split = split_options(options)
            call = Call(self.model_ref, self._part, method, **split.of_call)
            prepared = self._prepared[method, no_cpus] = split.function(), call
        function, call = prepared
        return function.remote(call, *args, **kwargs)

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
        """Return the stand-in: the model runs in eval mode."""
        return self

    def train(self, mode: bool = True) -> RemoteModel:
        """Return the stand-in for `train(False)`. Raise ValueError for train mode: a call cannot change the model."""
        if mode:
            raise ValueError(
                f"{self!r} cannot train: what a call changes in the model is dropped after the call. Load the model "
                f"in an actor to train it there: load_model_in_actor(model_ref, keep_flags=True)."
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> RemoteModel:
        """Return the stand-in for the CPU and for the model's dtype.

        Raises ValueError for other targets: a stand-in has no weights to move or cast. Tasks run on a GPU if
        `rewrite_pipeline` was given `num_gpus`.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise ValueError(
                f"{self!r} has no weights here to move to {device}. Ray places its calls, and data goes in and comes "
                f"out on the CPU. For calls on a GPU: rewrite_pipeline(pipeline, num_gpus=1)."
            )
        if dtype is not None and dtype != self._dtype:
            raise ValueError(
                f"{self!r} has no weights here to cast to {dtype}. Cast the model, then rewrite the pipeline."
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_method_names", "_facts", "_kind", "_weightless"):
            raise AttributeError(name)
        if name in self._method_names:
            return RemoteMethod(self, name)
        if name in self._facts:
            return self._facts[name]
        static = inspect.getattr_static(self._kind, name, self)
        if isinstance(static, (classmethod, staticmethod)):
            return getattr(self._kind, name)
        if self._weightless is not None and (static is self or not is_method(static)):
            try:
                return self._weightless.answer(name)
            except NeedsWeightsError as error:
                raise AttributeError(str(error), name=name, obj=self) from error
            except AttributeError:  # the error below says more
                pass
        elif static is not self and not hasattr(static, "__get__"):
            return static
        raise AttributeError(f"{self!r} has no '{name}': {self._hint(name)}", name=name, obj=self)

    def _hint(self, name: str) -> str:
        # The methods of every module (parameters, half, state_dict) are about the weights.
        own = name in ("__call__", "forward") or not hasattr(torch.nn.Module, name)
        if own and callable(getattr(self._kind, name, None)):
            return f"name it when you rewrite the pipeline: rewrite_pipeline(pipeline, method_names=(..., '{name}'))."
        return "its weights are in the object store. Load the model: load_model_in_actor(standin.model_ref)."

    # ------------------------------------------------------------ as an object

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModel:
        twin = copy.copy(self)
        twin._facts, twin._weightless = copy.deepcopy((self._facts, self._weightless), memo)
        return twin

    def __repr__(self) -> str:
        return f"RemoteModel({self._kind.__name__})"


RESERVED_NAMES = frozenset(inspect.signature(RemoteModel).parameters) | {
    f"_{name}" for name in (*inspect.signature(RemoteModel).parameters, "options", "prepared")
}


def is_bound_method(part: object) -> bool:
    return isinstance(part, types.MethodType) and isinstance(part.__self__, actor.MODEL_TYPES)


def is_eager_module(model: object) -> bool:
    return isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def generates(model: Any) -> bool:
    """Tell whether a model is a Hugging Face model that generates."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and has_method(model, "generate")


def has_method(model: object, name: str) -> bool:
    if isinstance(inspect.getattr_static(type(model), name, None), (property, functools.cached_property)):
        return False
    if isinstance(model, torch.export.ExportedProgram):
        return False  # its __call__ only raises, with the advice to call module()
    return callable(getattr(model, name, None))


def facts_of(model: object, weightless: Weightless | None) -> dict[str, Any]:
    """Return copies of the attributes that are small, have no tensors, and that the copy without weights lacks."""
    facts = {}
    known = vars(weightless.module) if weightless is not None else MODULE_ATTRIBUTES
    for name, value in vars(model).items():
        if name in known or isinstance(value, actor.MODEL_TYPES):
            continue
        try:
            # Includes the objects that its functions hold, because they travel with the stand-in.
            whole = graph.take_apart(value, LEFT_OUT)
            parts = graph.take_apart(value, LEFT_OUT, local_model_types=actor.MODEL_TYPES)
        except TypeError:
            continue
        weights = whole.tensors or whole.arrays or any(isinstance(p, actor.MODEL_TYPES) for p in whole.carried)
        if not weights and len(whole.skeleton) <= LARGEST_FACT:
            facts[name] = graph.put_together(parts.skeleton, (), (), parts.carried, keep_flags=True)[0]
    return facts


# An ObjectRef that is pickled here, and not by Ray, would never be freed.
LEFT_OUT = (*actor.MODEL_TYPES, *CARRIED)


def dtype_of(model: Any, weightless: Weightless | None) -> torch.dtype | None:
    """Return what the model says is its dtype, else that of its first floating-point parameter."""
    if weightless is not None and isinstance(dtype := getattr(weightless, "dtype", None), torch.dtype):
        return dtype
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
