"""What is in the object store, for tests of what is left there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import ray
from ray._private.internal_api import node_stats


def known_objects() -> set[str]:
    """Return the objects that this process holds references to, as Ray counts them."""
    worker = ray._private.worker.global_worker
    return {key.decode() if isinstance(key, bytes) else key for key in worker.core_worker.get_all_reference_counts()}


def store_used() -> int:
    """Return how many bytes of the stores of all nodes are in use, as the stores count them."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    stats = [node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False) for node in nodes]
    return sum(found.store_stats.object_store_bytes_used for found in stats)


def settled_store() -> int:
    """Return the used bytes once they stay the same: Ray frees what earlier tests dropped about once a second."""
    gc.collect()
    used, since = store_used(), time.monotonic()
    deadline = since + 20
    while time.monotonic() - since < 2.5 and time.monotonic() < deadline:
        time.sleep(0.2)
        if (now := store_used()) != used:
            used, since = now, time.monotonic()
    return used


def wait_for_store(is_reached: Callable[[int], bool]) -> int:
    """Wait until a condition holds for the used bytes of the stores; return them."""
    deadline = time.monotonic() + 20
    while not is_reached(used := store_used()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return used
