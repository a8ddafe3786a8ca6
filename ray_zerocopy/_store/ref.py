"""`ModelRef`, the header of a model in the store, and the options and the result of a load."""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import ray._private.worker
import ray.util.client
import torch
from ray.cloudpickle import CloudPickler

from .._model.imports import Import
from .._model.layout import Layout
from .._pages.live import LiveObjects, keep_in_children
from ..errors import ModelLostError, ZeroCopyError, warn
from .locations import ModelLocations, locations_of

__all__ = [
    "FORMAT",
    "Header",
    "LoadOptions",
    "Loaded",
    "ModelRef",
    "Origin",
    "WithoutIsolation",
    "check",
    "check_format",
    "check_session",
    "current_session",
    "format_bytes",
    "release_references",
]


# The format of a header, of a pickled handle and of an owner's answers. Raise it with every change of one of them.
FORMAT = 4


class Origin(NamedTuple):
    """The process that owns a model's objects.

    Attributes:
        kind: "driver", "task" or "actor".
        node: The id of its node.
        pid: Its process id.
    """

    kind: str
    node: str
    pid: int


@dataclass(frozen=True, eq=False)
class ModelRef:
    """A small handle on a model in Ray's object store.

    A handle without a name contains references to objects. Pass it to workers as an argument. It keeps the model in
    the store while it, or a copy that Ray knows of, lives. The model is lost if the process that prepared it ends.

    A handle with a name contains no references. It can be pickled anywhere: in a closure, a Serve app, a file. Each
    process looks up the name at its first use.

    Handles are picklable, hashable, and equal if they lead to the same objects or to the same name.

    Attributes:
        class_name: The class of the shared object.
        nbytes: Bytes of weights in the store, and of TorchScript's code. All workers of a node share them.
        carried_nbytes: Bytes that each worker copies: the skeleton, without weights.
        tensors: The number of tensors in the object.
        refs: The objects in the store. Empty for a handle with a name, and for a handle of another Ray session.
        session: The Ray session in which the handle was made.
        name: The name of the model, or None.
        namespace: The namespace of the name, or None.
        created: When the version that a name had was complete, in seconds since the epoch. A process that knows an
            older version asks again. 0 without a name.
    """

    class_name: str
    nbytes: int
    carried_nbytes: int
    tensors: int
    refs: tuple[ray.ObjectRef, ...]
    session: str
    name: str | None = None
    namespace: str | None = None
    created: float = field(default=0.0, repr=False)
    origin: Origin | None = field(default=None, repr=False)
    # References that are not ObjectRefs yet, because this process was not in the handle's session.
    _reduced: tuple[Any, ...] = field(default=(), repr=False)
    _ids: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = [ref.binary() for ref in self.refs] or [arguments[0] for _, arguments in self._reduced]
        object.__setattr__(self, "_ids", tuple(ids))
        keep_in_children(self, in_parent=False)  # a child cannot load
        _handles.add(self)

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, ModelRef) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return (self.namespace, self.name) if self.name else (self.session, self._ids, self.class_name, self.nbytes)

    def __copy__(self) -> ModelRef:
        return self  # pickling it would pin its objects

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        return self

    def locations(self, timeout: float | None = None) -> ModelLocations:
        """Ask Ray which nodes have the model, and how many bytes of it.

        Args:
            timeout: Seconds to wait for the owner, the process that prepared the model. None waits without end.

        Raises:
            ModelLostError: The handle is from another Ray session.
            ZeroCopyError: Called through Ray Client, which does not tell.
            TimeoutError: The owner did not answer in time.
        """
        from .lookup import resolve  # which needs this class

        check(self)
        if ray.util.client.ray.is_connected():
            raise ZeroCopyError("ModelRef.locations() does not work through Ray Client: call it in a task.")
        return locations_of(resolve(self, timeout).refs, timeout)

    def __reduce__(self) -> Any:
        # Note [Handles of other sessions]
        reduced: tuple[Any, ...] = () if self.name else self._reduced
        if self.refs and not self.name:
            reduced = tuple(map(_reduce_reference, self.refs)) if _is_of_this_session(self.session) else ()
        facts = (self.class_name, self.nbytes, self.carried_nbytes, self.tensors, self.session)
        origin = tuple(self.origin) if self.origin else None
        return _rebuild_handle, (FORMAT, (*facts, self.name, self.namespace, self.created, origin), reduced)

    def __repr__(self) -> str:
        facts = (
            f"{self.tensors} tensors, {format_bytes(self.nbytes)} shared, {format_bytes(self.carried_nbytes)} carried"
        )
        if self.name:
            return f"ModelRef({self.class_name}, name={self.name!r}, namespace={self.namespace!r}, {facts})"
        return f"ModelRef({self.class_name}, {facts}, {len(self.refs)} object{'s'[: len(self.refs) != 1]})"


# Note [Handles of other sessions]
#
# Ray makes object ids from a job's number and a counter, so two sessions make the same ids. An ObjectRef of an
# earlier session that is unpickled in this one would be counted as a reference to an object of this one: Ray would
# free that object early, or abort. So a handle pickles its references in the form in which Ray's own reducer
# describes them, and its session beside them. They become ObjectRefs only in that session. When a session ends in a
# process that continues, the handles in this process drop their references.

_handles: LiveObjects[ModelRef] = LiveObjects()


def _reduce_reference(reference: Any) -> Any:
    if type(reference) is not ray.ObjectRef:
        return reference  # of Ray Client, whose pickler knows it by identity
    if not ray._private.worker.global_worker.get_serialization_context().is_in_band_serialization():
        _warn_out_of_band()
    return CloudPickler.dispatch[ray.ObjectRef](reference)  # which also notes that the pickle contains it


_has_warned_out_of_band = False


def _warn_out_of_band() -> None:
    """Warn once that Ray never frees an object whose reference is pickled by something else than Ray."""
    global _has_warned_out_of_band
    if not _has_warned_out_of_band:
        _has_warned_out_of_band = True
        warn(
            "a ModelRef without a name was pickled outside of a Ray argument: in a closure, a remote class, a Serve "
            "app, or by cloudpickle. Ray then keeps the model in the store until this process ends. Pass the handle "
            'as an argument (actor.remote(model_ref)), or name it: prepare_model_for_actors(model, name="...", '
            'lifetime="detached").'
        )


def _rebuild_handle(version: int, facts: Any, reduced: tuple[Any, ...]) -> ModelRef:
    if version != FORMAT:
        raise ZeroCopyError(
            f"this ModelRef has format {version}, and this version of ray_zerocopy reads format {FORMAT}. Install "
            f"one version of ray_zerocopy on the driver and all workers, and prepare the model again."
        )
    class_name, nbytes, carried_nbytes, tensors, session, name, namespace, created, origin = facts
    is_here = not name and _is_of_this_session(session)
    return ModelRef(
        class_name,
        nbytes,
        carried_nbytes,
        tensors,
        tuple(map(_rebuild_reference, reduced)) if is_here else (),
        session,
        name,
        namespace,
        created,
        Origin(*origin) if origin else None,
        () if is_here else reduced,
    )


def _rebuild_reference(reduced: Any) -> Any:
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments = reduced
    return function(*arguments)


def _is_of_this_session(session: str) -> bool:
    return ray.is_initialized() and session == current_session()


def release_references() -> None:
    """Drop the references of all handles in this process. Call it while their session still exists."""
    for handle in _handles:
        object.__setattr__(handle, "refs", ())


class Loaded(NamedTuple):
    """A loaded model and facts about the load.

    Attributes:
        model: The model.
        device: The device of the model.
        seconds: The duration of the load, without `import_seconds`.
        import_seconds: The time to import the modules of the model's classes. Zero if they were imported before.
        shared: Bytes that are pages of the store.
        private: Bytes that were copied.
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
    """All that a load needs to rebuild a model from its buffers. The model's first object contains it, pickled.

    `fixed_dtype_class`, `fixed_dtype` and `runs_constructors` are fields of `graph.Parts`. `recurrent` has, for each
    RNN that shares no weight with another tensor, the numbers of its weights and its `_device.cuda.Recurrent`.
    `name` is what errors call the model. `imports` come before the model is rebuilt; then its `operators` are there.
    """

    layout: Layout
    skeleton: bytes
    fixed_dtype_class: str
    fixed_dtype: frozenset[int]
    runs_constructors: bool
    recurrent: list[tuple[tuple[int, ...], tuple[Any, ...]]]
    name: str
    imports: list[Import]
    operators: list[str]

    def pickled(self) -> bytes:
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def from_bytes(cls, data: Any) -> Header:
        """Unpickle a header. Raises ZeroCopyError for bytes that are no header."""
        try:
            return cls(*pickle.loads(data))
        except (pickle.UnpicklingError, TypeError, EOFError) as error:
            raise ZeroCopyError(
                f"the header of a model in the object store cannot be read: {error}. Make the handle with "
                f"prepare_model_for_actors(model), with the same version of ray_zerocopy everywhere."
            ) from error


class WithoutIsolation(enum.Enum):
    """What a load does if it cannot have a private view of the store."""

    SHARE = "use the store's own memory, and warn"
    RAISE = "raise ZeroCopyError"
    COPY = "copy the bytes"


class LoadOptions(NamedTuple):
    """The options of a load; see `actor.load_model_in_actor`."""

    device: torch.device
    dtype: torch.dtype | None = None
    keep_flags: bool = False
    without_isolation: WithoutIsolation = WithoutIsolation.SHARE
    page_lock: bool = False
    timeout: float | None = None


def format_bytes(nbytes: float) -> str:
    """Return a byte count in binary units for a message: `417.6 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def current_session() -> str:
    """Return the name of the Ray session. Without one, connect to Ray as `ray.put` does."""
    if not ray.is_initialized():
        ray.init()
    context = ray.get_runtime_context()
    # Old versions of Ray have no names for sessions. The address of the control store differs between sessions too.
    return str(context.get_session_name() if hasattr(context, "get_session_name") else context.gcs_address)


def check_session(model_ref: ModelRef) -> None:
    """Raise ModelLostError for an unnamed handle of another Ray session: Ray would wait, or fail obscurely."""
    same = _is_of_this_session(model_ref.session)
    if same and not model_ref.refs and model_ref._reduced:  # unpickled before this process was in the session
        object.__setattr__(model_ref, "refs", tuple(map(_rebuild_reference, model_ref._reduced)))
    if not same or not model_ref.refs:
        raise ModelLostError(
            f"{model_ref!r} is from another Ray session ({model_ref.session}), and its model was lost with that "
            f"session. Call prepare_model_for_actors again in this session."
        )


def check_format(bodies: list[Any], model_ref: ModelRef) -> None:
    """Raise ZeroCopyError unless the objects behind a handle were written by this version of the format."""
    for number, body in enumerate(bodies):
        if not isinstance(body, dict) or "ray_zerocopy" not in body:
            raise ZeroCopyError(
                f"{model_ref!r} leads to a {type(body).__module__}.{type(body).__qualname__}, which is not a model "
                f"that ray_zerocopy shared. Make the handle with prepare_model_for_actors(model)."
            )
        version = body["ray_zerocopy"]
        if version != FORMAT:
            raise ZeroCopyError(
                f"{model_ref!r} was shared in format {version}, and this version of ray_zerocopy reads format "
                f"{FORMAT}. Install the same version of ray_zerocopy on the driver and all workers."
            )
        missing = {"buffers", *(() if number else ("header", "carried"))} - body.keys()
        if missing:
            raise ZeroCopyError(
                f"{model_ref!r} leads to an object without {', '.join(sorted(missing))}, which is not a model that "
                f"ray_zerocopy shared. Make the handle with prepare_model_for_actors(model)."
            )


def check(model_ref: object) -> None:
    """Raise TypeError unless `model_ref` is a handle, and ModelLostError if it is of another Ray session."""
    if not isinstance(model_ref, ModelRef):
        raise TypeError(
            f"a ModelRef is needed to load a model, not {type(model_ref).__module__}.{type(model_ref).__qualname__}. "
            f"Make one in the driver: model_ref = prepare_model_for_actors(model)."
        )
    if not model_ref.name:
        check_session(model_ref)
