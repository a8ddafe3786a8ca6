"""Room in the object stores of the nodes: where a model fits, and the error where it does not."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import ray

from ..errors import ZeroCopyError
from .ref import format_bytes

__all__ = ["Store", "check_room", "choose_node", "stores"]


class Store(NamedTuple):
    """The object store of one node that is alive: its size and the bytes that are free, as Ray counts them."""

    node: str
    address: str
    capacity: int
    free: int


def stores() -> list[Store]:
    """Return the object store of every node that is alive."""
    free: dict[str, dict[str, float]] = {}
    with contextlib.suppress(Exception):  # Ray Client has no connection to the control store
        free = ray._private.state.available_resources_per_node()
    found = []
    for node in ray.nodes():
        capacity = int(node["Resources"].get("object_store_memory", 0))
        if node["Alive"] and capacity:
            left = int(free.get(node["NodeID"], {}).get("object_store_memory", 0 if free else capacity))
            found.append(Store(node["NodeID"], node["NodeManagerAddress"], capacity, left))
    return found


_capacities: dict[str, int] = {}  # by node; the capacity of a node never changes


def check_room(name: str, nbytes: int, node: str | None = None) -> None:
    """Refuse a model that a node's store cannot hold. Ray would put it into a file on disk, without a warning."""
    node = node or ray.get_runtime_context().get_node_id()
    if node not in _capacities:
        _capacities.update((store.node, store.capacity) for store in stores())
    capacity = _capacities.get(node)
    if capacity is None or nbytes <= capacity:
        return
    larger = [store for store in stores() if store.capacity >= nbytes]
    more = int(nbytes * 1.2)
    remedy = (
        f"Give it more: ray.init(object_store_memory={more}) or ray start --object-store-memory={more} (on Linux the "
        f"store lies in /dev/shm, which must be as large)."
    )
    if larger:
        most = max(larger, key=lambda store: store.free)
        remedy = (
            f"The store of node {most.node[:8]} ({most.address}) holds {format_bytes(most.capacity)}, and "
            f"{format_bytes(most.free)} of it are free. Prepare the model there: prepare_model_for_actors(model, "
            f'name="...", lifetime="detached"), or prepare_model_from(load), which loads it there. Or: '
            f"{remedy[0].lower()}{remedy[1:]}"
        )
    raise ZeroCopyError(
        f"{name} has {format_bytes(nbytes)} to share, but the object store of node {node[:8]} holds "
        f"{format_bytes(capacity)}. {remedy}"
    )


def choose_node(nbytes: int | None = None) -> str | None:
    """Return the node whose store has room for `nbytes`, or the most room; this node if it will do.

    Returns None if Ray does not say how much room there is.
    """
    found = stores()
    if not found:
        return None
    here: str = ray.get_runtime_context().get_node_id()
    with_room = [store for store in found if nbytes is not None and store.free >= nbytes]
    if any(store.node == here for store in with_room):
        return here
    best = max(with_room or found, key=lambda store: (store.free, store.capacity))
    return best.node
