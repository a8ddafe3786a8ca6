"""A model -> the object store: the only `ray.put` of weights from this process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import ray
import ray.util.client
from ray.actor import ActorHandle

from .._device.cuda import Recurrent
from .._model import graph
from .._model.imports import check_imports
from .._model.layout import unshared_storages
from .._model.packing import Buffer, freed_tensors, pack
from .._model.without_bytes import check_has_bytes
from .._pages.regions import region_at
from .capacity import check_room
from .host import address_range
from .ref import FORMAT, Header, ModelRef, Origin, current_session
from .store_place import warn_if_on_disk

__all__ = ["CARRIED", "PackedModel", "check_is_model", "pack_model", "put"]


# The size limit of one object in the store. Another node fetches an object from a node that has all of it, so nodes
# pass on the first objects of a large model while the last ones arrive. benchmarks/scale.py measures other sizes.
OBJECT_BYTES = 512 << 20
# The limit of bytes from a device in one object. They are in this process's memory until the object has been put. A
# storage is one buffer of one object, so a larger storage takes as much as it is.
STAGED_BYTES = 256 << 20
# Objects that Ray itself must pickle, in an object of the store: Ray counts who holds them.
CARRIED = (ray.ObjectRef, ActorHandle, ModelRef)


class PackedModel(NamedTuple):
    """A model taken apart: the facts of its handle, and what becomes its objects.

    Attributes:
        class_name: What the handle calls the model.
        nbytes: Bytes of all buffers.
        header: The pickled header, which goes into the first object.
        tensors: The number of tensors.
        carried: The objects that Ray must pickle.
        buffers: The sources of the buffers.
        object_bytes: The size limit of one object.
    """

    class_name: str
    nbytes: int
    header: bytes
    tensors: int
    carried: list[Any]
    buffers: list[Buffer]
    object_bytes: int

    def facts(self) -> dict[str, Any]:
        """Return the facts of the handle, and the number of objects."""
        return {
            "class_name": self.class_name,
            "nbytes": self.nbytes,
            "carried_nbytes": len(self.header),
            "tensors": self.tensors,
            "objects": len(_grouped(self.buffers, self.object_bytes)),
        }

    def bodies(self) -> Iterator[dict[str, Any]]:
        """Yield what goes into each object. Drop one before you ask for the next: it may hold a copy of its bytes."""
        for number, (first, last) in enumerate(_grouped(self.buffers, self.object_bytes)):
            yield self._body(number, first, last)

    def _body(self, number: int, first: int, last: int) -> dict[str, Any]:
        buffers = [pickle.PickleBuffer(buffer.memory()) for buffer in self.buffers[first:last]]
        body: dict[str, Any] = {"ray_zerocopy": FORMAT, "buffers": buffers}
        if number == 0:
            body["header"] = pickle.PickleBuffer(self.header)
            body["carried"] = self.carried
        return body


def put(
    model: object,
    label: str | None = None,
    *,
    allow_meta: bool = False,
    root: object = None,
    imports: Iterable[Any] = (),
) -> ModelRef:
    """Take `model` apart and put it into the object store; see `actor.prepare_model_for_actors`.

    `label` is what the handle shows, by default the class of the model. Errors name tensors by their paths from
    `root`, by default from the model.
    """
    packed = pack_model(model, label, allow_meta=allow_meta, root=root, imports=imports)
    session = current_session()
    check_room(packed.class_name, packed.nbytes + len(packed.header))
    refs = []
    for body in packed.bodies():
        refs.append(ray.put(body))
        del body
    _warn_if_on_disk(packed.class_name, refs)
    facts = (packed.class_name, packed.nbytes, len(packed.header), packed.tensors)
    return ModelRef(*facts, tuple(refs), session, origin=_this_process())


def _this_process() -> Origin | None:
    context = ray.get_runtime_context()
    if ray.util.client.ray.is_connected():
        return None
    kind = "driver"
    if context.worker.mode == ray.WORKER_MODE:
        kind = "actor" if context.get_actor_id() else "task"
    return Origin(kind, context.get_node_id(), os.getpid())


def check_is_model(model: object) -> None:
    """Raise TypeError if `model` is not a loaded model: a handle, a name, a path, a class, None."""
    if isinstance(model, ModelRef):
        raise TypeError(f"{model!r} is shared already. Pass it to the workers as it is.")
    if isinstance(model, ray.ObjectRef):
        raise TypeError(
            "an ObjectRef was given where a model is to be shared. Give the model itself: "
            "ray.get(ref) first if it is in the store."
        )
    if model is None or isinstance(model, (str, bytes, os.PathLike, type)):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(f"{given} was given where a model is to be shared. Give the loaded model itself, an object.")


def pack_model(
    model: object,
    label: str | None = None,
    *,
    allow_meta: bool = False,
    root: object = None,
    object_bytes: int | None = None,
    imports: Iterable[Any] = (),
) -> PackedModel:
    """Take `model` apart; see `put`. Copies nothing yet."""
    check_is_model(model)
    parts = graph.take_apart(model, leave_out=CARRIED, imports=check_imports(imports))
    if not allow_meta:
        freed = freed_tensors(parts.tensors)
        check_has_bytes(model if root is None else root, parts.tensors_without_bytes, freed)
    packed = pack(parts.tensors, parts.arrays)
    layout = packed.layout
    free = unshared_storages(layout) if parts.rnns else set()
    recurrent = []
    for weights, module in parts.rnns:
        settings = tuple(getattr(module, name, None) for name in Recurrent._fields)
        if free.issuperset(weights) and None not in settings:
            free.difference_update(weights)  # a weight of several RNNs goes with the first of them
            recurrent.append((weights, settings))
    label = label or type(model).__name__
    header = Header(
        layout,
        parts.skeleton,
        parts.fixed_dtype_class,
        parts.fixed_dtype,
        parts.runs_constructors,
        recurrent,
        label,
        parts.imports,
        parts.operators,
    ).pickled()
    return PackedModel(
        label,
        sum(layout.buffers),
        header,
        len(layout.views),
        parts.carried,
        packed.buffers,
        _object_bytes(sum(layout.buffers)) if object_bytes is None else object_bytes,
    )


def _object_bytes(nbytes: int) -> int:
    """Return the size limit of one object: all of a small model, else an eighth, between `OBJECT_BYTES` and its half.

    Nodes can pass on an object once they have all of it. Each further object makes a load about 20 us longer.
    """
    if nbytes <= OBJECT_BYTES:
        return OBJECT_BYTES
    return max(OBJECT_BYTES // 2, min(OBJECT_BYTES, nbytes // 8))


def _grouped(buffers: list[Buffer], object_bytes: int) -> list[tuple[int, int]]:
    """Return the range of buffers of each object. There is at least one range, so that there is an object.

    A range has at most one packed buffer, and several buffers from a device only up to `STAGED_BYTES`: such buffers
    are copies in this process until they have been put.
    """
    groups = []
    first = held = staged = 0
    for number, buffer in enumerate(buffers):
        both_packed = number > first and buffer.is_packed and buffers[number - 1].is_packed
        staged += buffer.nbytes if buffer.device_parts else 0
        too_many = held + buffer.nbytes > object_bytes or (buffer.device_parts and staged > STAGED_BYTES)
        if number > first and (too_many or both_packed):
            groups.append((first, number))
            first, held, staged = number, 0, buffer.nbytes if buffer.device_parts else 0
        held += buffer.nbytes
    return [*groups, (first, len(buffers))]


def _warn_if_on_disk(name: str, refs: list[ray.ObjectRef]) -> None:
    """Warn if Ray put an object into a file on disk."""
    if ray.util.client.ray.is_connected():
        return
    for body in ray.get(refs):
        if body["buffers"]:
            begin, nbytes, _ = address_range(body["buffers"])
            region = region_at(begin)
            if region is not None and region.shared:
                warn_if_on_disk(name, region, nbytes)
