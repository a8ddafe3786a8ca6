"""`ModelRef`, the header of a model in the store, and what a load is asked for and gives."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import torch

from .._model.layout import Layout
from ..errors import ModelLostError

__all__ = [
    "Header",
    "LoadOptions",
    "Loaded",
    "ModelRef",
    "check",
    "check_session",
    "current_session",
    "format_bytes",
]


@dataclass(frozen=True)
class ModelRef:
    """A small handle on a model in Ray's object store, to be passed to workers as an argument.

    It pickles, is hashable, and keeps the model in the store for as long as it, or a copy of it that Ray
    knows of, lives. The model is lost with the process that made the handle, as anything put into the store.

    Attributes:
        class_name: The class of the shared object.
        nbytes: Bytes of weights in the store, and of TorchScript's code, shared by all workers of a node.
        carried_nbytes: Bytes that each worker gets a copy of: the skeleton, without weights.
        tensors: How many tensors the object has.
        refs: The objects in the store.
        session: The Ray session that has them.
    """

    class_name: str
    nbytes: int
    carried_nbytes: int
    tensors: int
    refs: tuple[ray.ObjectRef, ...]
    session: str

    def __repr__(self) -> str:
        return (
            f"ModelRef({self.class_name}, {self.tensors} tensors, {format_bytes(self.nbytes)} shared, "
            f"{format_bytes(self.carried_nbytes)} carried, {len(self.refs)} object{'s'[: len(self.refs) != 1]})"
        )


class Loaded(NamedTuple):
    """A loaded model and how it was loaded.

    Attributes:
        model: The model.
        device: Where it is.
        seconds: What loading took, without `import_seconds`.
        import_seconds: What importing the modules of its classes took; zero where they were imported already.
        shared: Bytes that are the store's own pages.
        private: Bytes that had to be copied.
        isolated: Whether a write stays in this process.
    """

    model: Any
    device: torch.device
    seconds: float
    import_seconds: float
    shared: int
    private: int
    isolated: bool


class Header(NamedTuple):
    """What a model's first object has beside buffers, pickled: how to make the model of them.

    Of the fields, `composed` and `constructs` are those of `graph.Parts`. `recurrent` has those RNNs of it whose
    weights may go anywhere (no other tensor shares bytes with one, nor an RNN before it): the numbers of the weights,
    and a `_device.cuda.Recurrent`.
    """

    layout: Layout
    skeleton: bytes
    composed: str
    constructs: bool
    recurrent: list[tuple[tuple[int, ...], tuple[Any, ...]]]

    def pickled(self) -> bytes:
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def from_bytes(cls, data: Any) -> Header:
        return cls(*pickle.loads(data))


class LoadOptions(NamedTuple):
    """What a load is asked for; see `actor.load_model_in_actor`."""

    device: torch.device
    dtype: torch.dtype | None = None
    keep_flags: bool = False
    require_isolation: bool = False
    page_lock: bool = False


def format_bytes(nbytes: float) -> str:
    """Return a byte count as a person reads it, in binary units: `417.6 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def current_session() -> str:
    if not ray.is_initialized():
        ray.init()  # as ray.put does
    context = ray.get_runtime_context()
    # Before Ray had names for sessions it had this: the same in driver, client and workers, another in each session.
    return str(context.get_session_name() if hasattr(context, "get_session_name") else context.gcs_address)


def check_session(model_ref: ModelRef) -> None:
    """Raise ModelLostError for a handle from another Ray session: Ray itself would wait, or fail obscurely."""
    if not ray.is_initialized() or model_ref.session != current_session():
        raise ModelLostError(
            f"{model_ref!r} is from another Ray session ({model_ref.session}); its model went with that session. "
            f"Call prepare_model_for_actors again in this one."
        )


def check(model_ref: object) -> None:
    """Raise TypeError for what is no handle, ModelLostError for one from another Ray session."""
    if not isinstance(model_ref, ModelRef):
        raise TypeError(
            f"a ModelRef is needed to load a model, not {type(model_ref).__module__}.{type(model_ref).__qualname__}. "
            f"Make one in the driver: model_ref = prepare_model_for_actors(model)."
        )
    check_session(model_ref)
