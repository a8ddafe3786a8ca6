"""Which nodes have the objects of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.experimental

__all__ = ["ModelLocations", "locations_of"]


@dataclass(frozen=True)
class ModelLocations:
    """Which nodes have a model in their object store.

    Attributes:
        nbytes: Bytes of all objects of the model.
        nodes: Node id -> bytes of the model that the node has.
        unknown: How many objects Ray knows nothing of, because the process that owned them ended.
    """

    nbytes: int
    nodes: Mapping[str, int]
    unknown: int = 0

    @property
    def complete(self) -> tuple[str, ...]:
        """The nodes that have the whole model."""
        return tuple(node for node, nbytes in self.nodes.items() if nbytes >= self.nbytes and not self.unknown)

    @property
    def partial(self) -> tuple[str, ...]:
        """The nodes that have a part of the model."""
        return tuple(node for node, nbytes in self.nodes.items() if nbytes < self.nbytes)


def locations_of(refs: Sequence[Any], timeout: float | None = None) -> ModelLocations:
    """Ask the owner of a model's objects which nodes have them.

    Raises:
        ray.exceptions.GetTimeoutError: The owner did not answer within `timeout` seconds.
    """
    timeout_ms = -1 if timeout is None else int(timeout * 1000)
    known = ray.experimental.get_object_locations(list(refs), timeout_ms=timeout_ms)
    places = list(known.values())
    nodes: dict[str, int] = {}
    for place in places:
        for node in place["node_ids"]:
            nodes[node] = nodes.get(node, 0) + (place["object_size"] or 0)
    return ModelLocations(sum(place["object_size"] or 0 for place in places), nodes, len(refs) - len(known))
