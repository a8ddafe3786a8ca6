"""A model -> the object store: the only `ray.put` of weights."""

from __future__ import annotations

import os
import pickle
from typing import Any

import ray
import ray.util.client
from ray.actor import ActorHandle

from .._device.cuda import Recurrent
from .._model import graph
from .._model.layout import unshared_storages
from .._model.packing import Buffer, pack
from ..errors import ZeroCopyError, warn
from . import pages
from .host import address_range
from .ref import Header, ModelRef, current_session, format_bytes

__all__ = ["CARRIED", "put"]


# Bytes of buffers in one object of the store. Another node fetches an object from a node that has all of it,
# so a large model in several objects spreads over the nodes while it is still arriving.
OBJECT_BYTES = 4 << 30
# Bytes that one object may have on a device: they are in this process's memory until the object has been put. A
# storage is one buffer of one object, so a larger one takes as much as it is.
STAGED_BYTES = 256 << 20
# What Ray itself must pickle, in an object of the store: it counts who holds them.
CARRIED = (ray.ObjectRef, ActorHandle)


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
    parts = graph.take_apart(model, leave_out=CARRIED)
    packed = pack(parts.tensors, parts.arrays)
    layout = packed.layout
    free = unshared_storages(layout) if parts.recurrent else set()
    recurrent = []
    for weights, module in parts.recurrent:
        settings = tuple(getattr(module, name, None) for name in Recurrent._fields)
        if free.issuperset(weights) and None not in settings:
            free.difference_update(weights)  # one that several RNNs have goes with the first of them
            recurrent.append((weights, settings))
    header = Header(layout, parts.skeleton, parts.composed, parts.constructs, recurrent).pickled()
    nbytes = sum(layout.buffers)
    name = name or type(model).__name__
    session = current_session()
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


def _grouped(buffers: list[Buffer]) -> list[tuple[int, int]]:
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
        region = pages.region_at(address_range(body["buffers"][:1])[0]) if body["buffers"] else None
        if region is not None and region.shared and region.device != memory:
            warn(
                f"{name} was put into a file on disk ({format_bytes(region.end - region.start)}), because this "
                f"node's object store has no room left for it in memory. Workers share it all the same, at the "
                f"disk's speed. Drop objects that are no longer needed first, or give ray.init a larger "
                f"object_store_memory."
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
