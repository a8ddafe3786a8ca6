"""Where a model's bytes live: how much is shared, how much is private to a process; and a report over actors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import actor
from ._model import paths, tensors
from ._store import pages
from ._store.host import object_locations
from ._store.ref import ModelRef, check_session, format_bytes
from .errors import ZeroCopyError

__all__ = ["ModelMemory", "PoolMemory", "ProcessMemory", "location", "model_memory", "pool_memory"]


# ---------------------------------------------------------------- of one object

_byte_bounds = getattr(np.lib, "array_utils", np).byte_bounds  # where numpy 2 and numpy 1 have it


def location(tensor: torch.Tensor) -> pages.Location | None:
    """Return where a host tensor's first byte lies on this node, or None if only this process has it.

    Two processes whose tensors are at the same location read the same memory. A page of a loaded model that has
    been written to is private from then on. Source: `/proc/self/maps` and `/proc/self/pagemap`.

    Returns:
        Device and inode of the file behind the memory, and the byte's offset in it.

    Raises:
        TypeError: `tensor` is none.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"location takes a tensor, not a {type(tensor).__module__}.{type(tensor).__qualname__}.")
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    return pages.locate(tensor.data_ptr())


@dataclass(frozen=True)
class ModelMemory:
    """How many bytes of an object's tensors are shared between processes, and how many are not.

    `largest_private` has the paths and bytes of the largest private tensors, largest first.
    """

    shared: int
    private: int
    largest_private: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        lines = [f"{format_bytes(self.shared)} shared, {format_bytes(self.private)} private"]
        lines += [f"  {format_bytes(nbytes):>10}  {path}" for path, nbytes in self.largest_private]
        return "\n".join(lines)


def model_memory(model: object, *, largest: int = 10) -> ModelMemory:
    """Count the bytes of an object's storages that are shared pages, and those that are this process's own.

    Args:
        model: A loaded model or any other object with tensors; or a `ModelRef`, which is loaded for the count.
        largest: How many of the largest private tensors to name.

    Returns:
        The counts over tensors and numpy arrays, each byte counted once; pages of a loaded model that were written
        to are private, and so is memory on a device and what a quantized layer has packed for the processor.
    """
    path = model.class_name if isinstance(model, ModelRef) else type(model).__qualname__
    if isinstance(model, ModelRef):
        model = actor.load(model, "cpu").model
    private: list[tuple[str, int]] = []
    ranges: list[tuple[int, int, str]] = []
    seen: set[int] = set()
    for where, part in paths.walk(model, path):
        if isinstance(part, torch.ScriptObject):
            private.append((where, tensors.packed_bytes(part)))
        elif isinstance(part, np.ndarray) and part.nbytes and part.dtype != object:
            low, high = _byte_bounds(part)
            ranges.append((int(low), int(high), where))
        elif isinstance(part, torch.Tensor):
            for tensor in tensors.components(part):
                storage = tensor.untyped_storage()
                if storage.device.type == "cpu":
                    ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), where))
                elif storage._cdata not in seen:
                    seen.add(storage._cdata)
                    private.append((where, storage.nbytes()))
    shared = 0
    end = 0
    for begin, stop, where in sorted(ranges):
        begin = max(begin, end)  # bytes that an earlier range has are counted
        if stop > begin:
            own = _private_bytes(begin, stop - begin)
            shared += stop - begin - own
            private.append((where, own))
            end = stop
    private = sorted((item for item in private if item[1]), key=lambda item: -item[1])
    return ModelMemory(shared, sum(nbytes for _, nbytes in private), tuple(private[:largest]))


def _private_bytes(address: int, nbytes: int) -> int:
    region = pages.region_at(address)
    if region is None or region.inode == 0:
        return nbytes
    return 0 if region.shared else pages.written_bytes(address, nbytes)


# ---------------------------------------------------------------- of many processes


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes.

    Attributes:
        node: The Ray node's id.
        pid: The process.
        name: Its title, as Ray sets it for actors: `ray::MapWorker(...)`.
        mapped: Bytes of models it has mapped from the object store, a model loaded twice counted once.
        pss: Proportional set size: private memory, and its share of what it has in common with others.
        private: Memory that no other process has mapped.
        model_private: The part of `mapped` that it has written to, and so has for itself.
    """

    node: str
    pid: int
    name: str
    mapped: int
    pss: int
    private: int
    model_private: int


@dataclass(frozen=True)
class PoolMemory:
    """Memory of the processes that have a model; `str()` of it is a table.

    Attributes:
        processes: One entry a process.
        stored: Bytes of the models that these processes map, each counted once a node.
        dead: How many of the actors asked for have died.
    """

    processes: tuple[ProcessMemory, ...]
    stored: int
    dead: int = 0

    @property
    def copies(self) -> int:
        """Bytes that the models would take if each process had a copy of its own."""
        return sum(process.mapped for process in self.processes)

    def __str__(self) -> str:
        rows = [["process", "model mapped", "of it private", "private in all", "PSS"]]
        for p in self.processes:
            rows.append([f"{p.name} {p.pid}", *map(format_bytes, (p.mapped, p.model_private, p.private, p.pss))])
        total = [sum(getattr(p, k) for p in self.processes) for k in ("mapped", "model_private", "private", "pss")]
        rows.append([f"{len(self.processes)} processes", *map(format_bytes, total)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        lines.append(
            f"weights: {format_bytes(self.stored)} once in the object store; "
            f"{len(self.processes)} separate copies would take {format_bytes(self.copies)}"
        )
        if self.dead:
            lines.append(f"{self.dead} of the actors had died")
        return "\n".join(lines)


def pool_memory(pool: ModelRef | ActorHandle | Iterable[ActorHandle]) -> PoolMemory:
    """Measure the memory of the processes that have loaded a model.

    Args:
        pool: A `ModelRef`, for every process of the cluster that has it loaded on the CPU at this moment, such as
            the actors of a running `map_batches`; or actor handles, of which each is asked in turn.

    Returns:
        Private memory and PSS per process (source: `/proc/<pid>/smaps` and `smaps_rollup`), totals, and what
        separate copies would have taken.

    Raises:
        TypeError: `pool` is neither.
        ModelLostError: The handle is from another Ray session.
        ZeroCopyError: Called with a handle through Ray Client.
    """
    dead = 0
    if isinstance(pool, ModelRef):
        check_session(pool)
        if ray.util.client.ray.is_connected():
            raise ZeroCopyError("pool_memory(model_ref) does not work through Ray Client: call it in a task.")
        located = ray.experimental.get_object_locations(list(pool.refs))
        nodes = {node for where in located.values() for node in where["node_ids"]}
        nodes.add(ray.get_runtime_context().get_node_id())  # Ray lists no place for an object in a file on disk
        measured = ray.get([_on_node(node).remote(pool) for node in sorted(nodes)])
    else:
        handles = list(pool) if isinstance(pool, Iterable) else [pool]
        if not all(isinstance(handle, ActorHandle) for handle in handles):
            raise TypeError("pool_memory takes a ModelRef or actor handles, which ActorClass.remote() returns.")
        asked = [handle.__ray_call__.remote(_measure_self) for handle in handles]
        measured = [answer for answer in map(_answer, asked) if answer is not None]
        dead = len(handles) - len(measured)
    pairs = [pair for node in measured for pair in node]
    stored = {(process.node, *span) for process, spans in pairs for span in spans}
    nbytes = sum(end - begin for *_, begin, end in stored)
    return PoolMemory(tuple(process for process, _ in pairs), nbytes, dead)


def _answer(asked: ray.ObjectRef) -> Any:
    try:
        return ray.get(asked)
    except ray.exceptions.RayActorError:
        return None


# Bytes [begin, end) of the file (device, inode) behind an object store.
_Span = tuple[int, int, int, int]
_Measured = tuple[ProcessMemory, list[_Span]]


def _on_node(node: str) -> Any:
    """Return a Ray function that measures on `node`, even while every CPU there is taken."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_measure_node).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)


def _measure_node(model_ref: ModelRef) -> list[_Measured]:
    """Measure every process of this node that has a private view of the model's objects."""
    wanted = [
        (place.device, place.inode, place.offset, place.offset + nbytes)
        for place, nbytes in object_locations(model_ref)
    ]
    node = ray.get_runtime_context().get_node_id()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if any(_overlap(span, wanted) for span in _model_spans(pages.regions(entry))):
                found.append(_measure(node, int(entry)))
        except OSError:  # not ours to look at, or gone meanwhile
            continue
    return sorted(found, key=lambda pair: pair[0].pid)


def _measure_self(_: object) -> list[_Measured]:
    return [_measure(ray.get_runtime_context().get_node_id(), os.getpid())]


def _overlap(span: _Span, others: list[_Span]) -> bool:
    return any(span[:2] == o[:2] and span[2] < o[3] and o[2] < span[3] for o in others)


def _model_spans(regions: Iterable[pages.Region]) -> list[_Span]:
    """Return the parts of the store that a process has mapped a second time, privately: its loaded models."""
    everything = list(regions)
    stores = {(r.device, r.inode) for r in everything if r.shared and "plasma" in os.path.basename(r.name)}
    return sorted(
        {
            (r.device, r.inode, r.offset, r.offset + r.end - r.start)
            for r in everything
            if not r.shared and (r.device, r.inode) in stores
        }
    )


def _measure(node: str, pid: int) -> _Measured:
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        regions: list[tuple[pages.Region, dict[str, int]]] = []
        for line in file:
            region = pages.parse_region(line)
            if region is not None:
                regions.append((region, {}))
            elif regions and line.endswith(" kB\n"):
                key, value = line.split(":")
                regions[-1][1][key] = int(value.split()[0]) * 1024
    spans = _model_spans(region for region, _ in regions)
    kept = set(spans)
    mapped = sum(end - begin for *_, begin, end in spans)
    own = sum(
        sizes.get("Anonymous", 0)
        for region, sizes in regions
        if (region.device, region.inode, region.offset, region.offset + region.end - region.start) in kept
    )
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        rollup = dict(line.split(":") for line in file if line.endswith(" kB\n"))
    total = {key: int(value.split()[0]) * 1024 for key, value in rollup.items()}
    private = total["Private_Clean"] + total["Private_Dirty"]
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        words = file.read().replace("\0", " ").split()
    name = words[0] if words else "?"
    return ProcessMemory(node, pid, name, mapped, total["Pss"], private, own), spans
