"""`ModelRef`, and the way into and out of Ray's object store: the only `ray.put` and `ray.get` of weights."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from . import _collector, _device, _graph, _layout, _mapping
from .errors import ModelLostError, ZeroCopyError, ZeroCopyWarning

__all__ = [
    "CARRIED",
    "Header",
    "How",
    "Loaded",
    "ModelRef",
    "build",
    "check",
    "check_session",
    "fetch",
    "format_bytes",
    "get",
    "host_memory",
    "located",
    "put",
    "quietly",
    "span",
]

# Bytes of buffers in one object of the store. Another node fetches an object from a node that has all of it,
# so a large model in several objects spreads over the nodes while it is still arriving.
OBJECT_BYTES = 4 << 30
# Bytes that one object may have on a device: they are in this process's memory until the object has been put. A
# storage is one buffer of one object, so a larger one takes as much as it is.
STAGED_BYTES = 256 << 20
# What Ray itself must pickle, in an object of the store: it counts who holds them.
CARRIED = (ray.ObjectRef, ActorHandle)


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

    Of the fields, `composed` and `constructs` are those of `_graph.Parts`. `recurrent` has those RNNs of it whose
    weights may go anywhere (no other tensor shares bytes with one, nor an RNN before it): the numbers of the weights,
    and a `_device.Recurrent`.
    """

    layout: _layout.Layout
    skeleton: bytes
    composed: str
    constructs: bool
    recurrent: list[tuple[tuple[int, ...], tuple[Any, ...]]]

    def pickled(self) -> bytes:
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def of(cls, body: dict[str, Any]) -> Header:
        return cls(*pickle.loads(body["header"]))


def format_bytes(nbytes: float) -> str:
    """Return a byte count as a person reads it, in binary units: `417.6 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


# ---------------------------------------------------------------- into the store


def put(model: object, name: str | None = None) -> ModelRef:
    """Take `model` apart and put it into the object store; see `actor.prepare_model_for_actors`.

    `name` is what the handle calls it, by default the class.
    """
    if isinstance(model, ModelRef):
        raise TypeError(f"{model!r} is shared already: pass it to the workers as it is.")
    if isinstance(model, ray.ObjectRef):
        raise TypeError(
            "an ObjectRef was given where a model is to be shared. Give the model itself: "
            "ray.get(ref) first if it is in the store."
        )
    if model is None or isinstance(model, (str, bytes, os.PathLike, type)):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(f"{given} was given where a model is to be shared. Give the loaded model itself, an object.")
    parts = _graph.take_apart(model, leave_out=CARRIED)
    packed = _layout.pack(parts.tensors, parts.arrays)
    layout = packed.layout
    free = _layout.alone(layout) if parts.recurrent else set()
    recurrent = []
    for weights, module in parts.recurrent:
        settings = tuple(getattr(module, name, None) for name in _device.Recurrent._fields)
        if free.issuperset(weights) and None not in settings:
            free.difference_update(weights)  # one that several RNNs have goes with the first of them
            recurrent.append((weights, settings))
    header = Header(layout, parts.skeleton, parts.composed, parts.constructs, recurrent).pickled()
    nbytes = sum(layout.buffers)
    name = name or type(model).__name__
    session = _session()
    _check_room(name, nbytes + len(header))
    refs = []
    for number, (first, last) in enumerate(_grouped(packed.buffers)):
        body: dict[str, Any] = {"buffers": [pickle.PickleBuffer(b.memory()) for b in packed.buffers[first:last]]}
        if number == 0:
            body["header"] = pickle.PickleBuffer(header)
            body["carried"] = parts.carried
        refs.append(ray.put(body))
        del body  # and with it what was packed
    _warn_if_on_disk(name, refs)
    return ModelRef(name, nbytes, len(header), len(layout.views), tuple(refs), session)


def _grouped(buffers: list[_layout.Buffer]) -> list[tuple[int, int]]:
    """Return ranges of buffers for one object each; at least one range, so that there is an object.

    No range has two packed buffers, nor more than `STAGED_BYTES` from a device in several: these are copies in
    this process until they have been put.
    """
    groups = []
    first = held = staged = 0
    for number, buffer in enumerate(buffers):
        both_packed = number > first and buffer.packed and buffers[number - 1].packed
        staged += buffer.nbytes if buffer.on_device else 0
        too_many = held + buffer.nbytes > OBJECT_BYTES or (buffer.on_device and staged > STAGED_BYTES)
        if number > first and (too_many or both_packed):
            groups.append((first, number))
            first, held, staged = number, 0, buffer.nbytes if buffer.on_device else 0
        held += buffer.nbytes
    return [*groups, (first, len(buffers))]


def _warn_if_on_disk(name: str, refs: list[ray.ObjectRef]) -> None:
    """Say if Ray had no room left in memory: it then puts an object into a file on disk, without a word."""
    if ray.util.client.ray.is_connected() or not os.path.isdir("/dev/shm"):
        return
    memory = os.stat("/dev/shm").st_dev
    for body in ray.get(refs):
        region = _mapping.region_at(span(body["buffers"][:1])[0]) if body["buffers"] else None
        if region is not None and region.shared and region.device != memory:
            warnings.warn(
                f"{name} was put into a file on disk ({format_bytes(region.end - region.start)}), because this "
                f"node's object store has no room left for it in memory. Workers share it all the same, at the "
                f"disk's speed. Drop objects that are no longer needed first, or give ray.init a larger "
                f"object_store_memory.",
                ZeroCopyWarning,
                stacklevel=4,
            )
            return


_capacities: dict[str, float] = {}  # by node; a node's never changes


def _check_room(name: str, nbytes: int) -> None:
    """Refuse a model that the store cannot hold: Ray would put it into a file on disk without a word."""
    node = ray.get_runtime_context().get_node_id()
    if node not in _capacities:
        _capacities.update((n["NodeID"], n["Resources"].get("object_store_memory", 0)) for n in ray.nodes())
    capacity = _capacities.get(node)
    if capacity is not None and nbytes > capacity:
        raise ZeroCopyError(
            f"{name} has {format_bytes(nbytes)} to share, but the object store of this node holds "
            f"{format_bytes(capacity)}. Give it more: ray.init(object_store_memory={int(nbytes * 1.2)}) or "
            f"ray start --object-store-memory={int(nbytes * 1.2)} (on Linux it lies in /dev/shm, which must be "
            f"as large)."
        )


def _session() -> str:
    if not ray.is_initialized():
        ray.init()  # as ray.put does
    context = ray.get_runtime_context()
    # Before Ray had names for sessions it had this: the same in driver, client and workers, another in each session.
    return str(context.get_session_name() if hasattr(context, "get_session_name") else context.gcs_address)


# ---------------------------------------------------------------- out of the store


class How(NamedTuple):
    """What a load is asked for; see `actor.load_model_in_actor`."""

    device: torch.device
    dtype: torch.dtype | None = None
    keep_flags: bool = False
    require_isolation: bool = False
    page_lock: bool = False


def get(model_ref: ModelRef, how: How) -> Loaded:
    """Rebuild the model behind `model_ref`; see `actor.load_model_in_actor`."""
    begin = time.perf_counter()
    check(model_ref)
    bodies = fetch(model_ref)
    with quietly():
        model, importing, memory = _rebuild(model_ref, bodies, how)
    seconds = time.perf_counter() - begin - importing
    return Loaded(model, how.device, seconds, importing, memory.shared, memory.copied, memory.isolated)


def _rebuild(model_ref: ModelRef, bodies: list[dict[str, Any]], how: How) -> tuple[Any, float, _Memory]:
    header = Header.of(bodies[0])
    layout = header.layout
    objects = [body["buffers"] for body in bodies]
    changed = _layout.casts(layout, how.dtype)
    if how.dtype is not None and header.composed:
        raise ValueError(
            f"dtype={how.dtype} cannot be applied to {model_ref!r}: it holds a {header.composed}, which knows its "
            f"dtype by itself. Convert the model before sharing it."
        )
    on_host = how.device.type == "cpu"
    with contextlib.ExitStack() as stack:
        memory = host_memory(objects if on_host or layout.arrays else [], how.require_isolation)
        pieces: list[torch.Tensor] = []
        arrived = None
        if how.device.type == "cuda":
            ring = _device.ring_of(how.device)
            made = _recurrent(header, changed, how.dtype, ring.engine)
            placement = _layout.arrange(layout, changed, how.dtype, [block for block, _ in made])
            blocks = [(begin, there) for begin, (_, there) in zip(placement.blocks, made, strict=True)]
            kinds = _layout.kinds(layout, changed, how.dtype)
            upload = stack.enter_context(_uploading(model_ref, placement, objects, ring, blocks, how))
            pieces, arrived = _device.divide(upload.arena, placement.storages, kinds, blocks), upload.wait
        elif changed or not on_host:
            # From the shared pages if it is for a device: reading through the private view could copy them.
            source = memory.buffers if on_host else [buffer for stored in objects for buffer in _shared(stored)]
            pieces = _layout.host_pieces(layout, source, changed, how.dtype)
            if not on_host:
                pieces = [piece.to(how.device) for piece in pieces]  # copy: it has memory of its own
        tensors = _layout.unpack(
            layout, memory.buffers, pieces=pieces, changed=changed, dtype=how.dtype, keep_flags=how.keep_flags
        )
        arrays = _layout.unpack_arrays(layout, memory.buffers)
        carried = bodies[0]["carried"]
        if arrived is not None and header.constructs:
            arrived()
        model, importing = _graph.put_together(
            header.skeleton, tensors, arrays, carried, keep_flags=how.keep_flags, arrived=arrived
        )
    own = [number for number in range(len(pieces)) if not on_host or number in changed]
    shared = sum(layout.storages[number][2] for number in own) if on_host else 0
    storages = {storage._cdata: storage.nbytes() for storage in (pieces[number].untyped_storage() for number in own)}
    memory = memory._replace(shared=memory.shared - shared, copied=memory.copied + sum(storages.values()))
    return model, importing, memory


def _recurrent(
    header: Header, changed: dict[int, torch.dtype], dtype: torch.dtype | None, engine: _device.Engine
) -> list[tuple[_layout.Block, torch.Tensor]]:
    """Return the allocations for the weights of those RNNs that the device wants in an order of its own."""
    found = []
    for weights, settings in header.recurrent:
        views = [header.layout.views[weight] for weight in weights]
        kinds = [dtype if dtype is not None and view[0] in changed else view[2] for view in views]
        if len(set(kinds)) > 1:
            continue
        made = engine.recurrent([view[4] for view in views], kinds[0], _device.Recurrent(*settings))
        if made is not None:
            there, places = made
            storages = (view[0] for view in views)
            found.append((_layout.Block(len(there), dict(zip(storages, places, strict=True))), there))
    return found


@contextlib.contextmanager
def _uploading(
    model_ref: ModelRef,
    placement: _layout.Placement,
    objects: list[list[Any]],
    ring: _device.Ring,
    blocks: list[tuple[int, torch.Tensor]],
    how: How,
) -> Iterator[_device.Upload]:
    """Copy the store's own pages to a CUDA device while the `with` block runs; never the private view's."""
    with contextlib.ExitStack() as stack:
        sources: list[_device.Source] = []
        ranges: list[tuple[int, int]] = []
        for stored in filter(None, objects):
            begin, nbytes, offsets = span(stored)
            memory = _mapping.shared_view(begin, nbytes, stored)
            ranges.append((begin, begin + nbytes))
            try:
                file, base = _mapping.open_file(begin, nbytes)
            except _mapping.Unmappable:
                sources += [_device.Source(memory, offset) for offset in offsets]
            else:
                stack.callback(os.close, file)
                sources += [_device.Source(memory, offset, file, base + offset) for offset in offsets]
        locked = _page_lock(model_ref, ranges, objects, how.device) if how.page_lock else None
        upload = _device.Upload(placement.spans, placement.nbytes, sources, ring, blocks=blocks, locked=locked)
        yield stack.enter_context(upload)


_page_locks: weakref.WeakKeyDictionary[ModelRef, _device.PageLock] = weakref.WeakKeyDictionary()
_page_locking = threading.Lock()


def _page_lock(
    model_ref: ModelRef, ranges: list[tuple[int, int]], keep_alive: object, device: torch.device
) -> _device.PageLock:
    with _page_locking:
        lock = _page_locks.get(model_ref)
        if lock is None:
            lock = _page_locks[model_ref] = _device.PageLock(device, ranges, keep_alive)
        return lock


def located(model_ref: ModelRef) -> list[tuple[_mapping.Location, int]]:
    """Return where the buffers of each of a model's objects lie on this node, and how many bytes they span."""
    found = []
    check(model_ref)
    for body in fetch(model_ref):
        if body["buffers"]:
            begin, nbytes, _ = span(body["buffers"])
            place = _mapping.locate(begin)  # now: Ray may unmap an object that nobody holds
            if place is not None:
                found.append((place, nbytes))
    return found


def check_session(model_ref: ModelRef) -> None:
    """Raise ModelLostError for a handle from another Ray session: Ray itself would wait, or fail obscurely."""
    if not ray.is_initialized() or model_ref.session != _session():
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


def fetch(model_ref: ModelRef) -> list[dict[str, Any]]:
    """Return the objects behind a handle that has been checked; they are pinned while what is returned lives."""
    try:
        return ray.get(list(model_ref.refs))  # type: ignore[no-any-return]
    except (ray.exceptions.ObjectLostError, ray.exceptions.ReferenceCountingAssertionError) as error:
        raise ModelLostError(
            f"{model_ref!r} is no longer in the object store: {type(error).__name__}. A model lives as long as the "
            f"process that prepared it and as a reference to it: prepare it in the driver, and keep model_ref."
        ) from error


class _Memory(NamedTuple):
    """Writable buffers, each with the offset at which it begins, and how they came about."""

    buffers: list[tuple[Any, int]]
    shared: int
    copied: int
    isolated: bool


def host_memory(objects: list[list[Any]], require_isolation: bool) -> _Memory:
    """Return private views of the buffers of each object, or the nearest to it that the platform has."""
    buffers: list[tuple[Any, int]] = []
    shared = copied = 0
    isolated = True
    for stored in objects:
        if not stored:
            continue
        begin, nbytes, offsets = span(stored)
        region = _mapping.region_at(begin)
        if region is not None and not region.shared:
            # copy: Ray gave memory of this process alone (Ray Client, local mode), read-only
            buffers += [(bytearray(buffer), 0) for buffer in stored]
            copied += sum(len(memory) for memory, _ in buffers[-len(stored) :])
            continue
        try:
            view, base = _mapping.private_view(begin, nbytes, stored)
            buffers += [(view, base + offset) for offset in offsets]
        except _mapping.Unmappable as reason:
            _isolation_lost(str(reason), require_isolation)
            buffers += _shared(stored)
            isolated = False
        shared += nbytes
    return _Memory(buffers, shared, copied, isolated)


def _shared(stored: list[Any]) -> list[tuple[Any, int]]:
    if not stored:
        return []
    begin, nbytes, offsets = span(stored)
    memory = _mapping.shared_view(begin, nbytes, stored)
    return [(memory, offset) for offset in offsets]


def span(buffers: Sequence[Any]) -> tuple[int, int, list[int]]:
    """Return the address and length of the bytes from the first buffer to the last, and where each begins."""
    views = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
    addresses: list[int] = [view.__array_interface__["data"][0] for view in views]
    begin = min(addresses)
    end = max(address + view.size for address, view in zip(addresses, views, strict=True))
    return begin, end - begin, [address - begin for address in addresses]


_told: set[str] = set()


def _isolation_lost(reason: str, required: bool) -> None:
    message = (
        f"this worker cannot have a private view of the model: {reason}. A write to a weight here (train mode, "
        f"load_state_dict, in-place operations) would reach every worker on this node."
    )
    if required:
        raise ZeroCopyError(f"{message} Run where /proc shows the raylet, or drop require_isolation=True.")
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"{message} Treat the model as read-only, or pass require_isolation=True to make this an error.",
            ZeroCopyWarning,
            stacklevel=7,  # to the line that called load_model_in_actor
        )


def build(
    layout: _layout.Layout,
    skeleton: bytes,
    buffers: list[tuple[Any, int]],
    carried: Sequence[object],
    arrived: Callable[[], None] | None = None,
) -> Any:
    """Put an object together over host buffers that are its own; see `_graph.put_together`."""
    with quietly():
        tensors = _layout.unpack(layout, buffers)
        arrays = _layout.unpack_arrays(layout, buffers)
        return _graph.put_together(skeleton, tensors, arrays, carried, arrived=arrived)[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Build under plain torch state: tensors made in inference mode would refuse what users do with them later.

    Garbage collection waits: a load makes thousands of small objects and no garbage.
    """
    with _collector.put_off(), torch.inference_mode(False), torch.no_grad():
        yield
