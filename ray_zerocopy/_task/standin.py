"""The stand-in of a model in a rewritten pipeline: its calls run as Ray tasks, and it has no weights."""

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
from .call import with_options

__all__ = [
    "LEFT_OUT",
    "RESERVED_NAMES",
    "RemoteMethod",
    "RemoteModel",
    "facts_of",
    "first_dtype",
    "generates",
    "has_method",
    "is_bound_method",
    "is_eager_module",
]


# A fact of a model (its config, its name) larger than this when pickled does not travel with the stand-in.
LARGEST_FACT = 1 << 20


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
        check(self.model_ref)
        prepared = self._prepared.get((method, no_cpus))
        if prepared is None:
            options = {"name": f"call_model:{method}", **self._options}
            if no_cpus:
                options = {"num_cpus": 0, **options}
            prepared = self._prepared[method, no_cpus] = with_options(options)
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


RESERVED_NAMES = frozenset(inspect.signature(RemoteModel).parameters) | {
    f"_{name}" for name in (*inspect.signature(RemoteModel).parameters, "options", "prepared")
}


def is_bound_method(part: object) -> bool:
    return isinstance(part, types.MethodType) and isinstance(part.__self__, actor.MODEL_TYPES)


def is_eager_module(model: object) -> bool:
    return isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def generates(model: Any) -> bool:
    """Tell whether this is a Hugging Face model that generates."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and has_method(model, "generate")


def has_method(model: object, name: str) -> bool:
    if isinstance(inspect.getattr_static(type(model), name, None), (property, functools.cached_property)):
        return False
    if isinstance(model, torch.export.ExportedProgram):
        return False  # it has a __call__, which only says to call what its module() gives
    return callable(getattr(model, name, None))


def facts_of(model: object) -> dict[str, Any]:
    """Return copies of the attributes of a model that are small and have no tensors in them."""
    facts = {}
    for name, value in vars(model).items():
        if name in _MODULE_ATTRIBUTES or isinstance(value, actor.MODEL_TYPES):
            continue
        try:
            # With what its functions hold: all that travels with the stand-in.
            whole = graph.take_apart(value, LEFT_OUT)
            parts = graph.take_apart(value, LEFT_OUT, in_process=actor.MODEL_TYPES)
        except TypeError:
            continue
        weights = whole.tensors or whole.arrays or any(isinstance(p, actor.MODEL_TYPES) for p in whole.carried)
        if not weights and len(whole.skeleton) <= LARGEST_FACT:
            facts[name] = graph.put_together(parts.skeleton, (), (), parts.carried, keep_flags=True)[0]
    return facts


_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))
# An ObjectRef that is pickled here, and not by Ray, is never let go.
LEFT_OUT = (*actor.MODEL_TYPES, *CARRIED)


def first_dtype(model: Any) -> torch.dtype | None:
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
