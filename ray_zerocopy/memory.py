"""Report where a model's bytes are: shared or private, in this process or in many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from ._pages.markers import marks_of_this_process
from ._pages.regions import Location, locate, region_at, regions, written_bytes, written_ranges
from ._store.host import object_locations
from ._store.lookup import resolve
from ._store.ref import ModelRef, check, format_bytes
from ._store.spans import Span, covers, model_spans, span_of
from ._store.waits import find_locations
from .errors import ZeroCopyError

__all__ = ["ModelMemory", "PoolMemory", "ProcessMemory", "location", "model_memory", "pool_memory"]


# ---------------------------------------------------------------- of one object

_byte_bounds = getattr(np.lib, "array_utils", np).byte_bounds  # numpy 2, numpy 1


def location(tensor: torch.Tensor) -> Location | None:
    """Return the place of a host tensor's first byte on this node, or None if only this process has it.

    Two tensors with the same location read the same memory, also in two processes. A page of a loaded model becomes
    private when the process writes to it. Source: `/proc/self/maps` and `/proc/self/pagemap`.

    Returns:
        Device and inode of the file behind the memory, and the offset of the byte in the file.

    Raises:
        TypeError: `tensor` is not a tensor.
        ZeroCopyError: This process has no /proc file system.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"location takes a tensor, not a {type(tensor).__module__}.{type(tensor).__qualname__}.")
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    _require_proc()
    return locate(tensor.data_ptr())


def _require_proc() -> None:
    if not os.path.exists("/proc/self/maps"):
        raise ZeroCopyError(
            "this process has no /proc file system, which tells shared memory from private memory. Mount /proc in "
            "the container (docker and Kubernetes do so by default), or call pool_memory from another process."
        )


@dataclass(frozen=True)
class ModelMemory:
    """Shared and private bytes of an object's tensors.

    Attributes:
        shared: Bytes in pages that other processes can share.
        private: Bytes that only this process has.
        largest_private: The paths and bytes of the largest private tensors, largest first.
    """

    shared: int
    private: int
    largest_private: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        lines = [f"{format_bytes(self.shared)} shared, {format_bytes(self.private)} private"]
        lines += [f"  {format_bytes(nbytes):>10}  {path}" for path, nbytes in self.largest_private]
        return "\n".join(lines)


def model_memory(model: object, *, largest: int = 10) -> ModelMemory:
    """Count the shared and the private bytes of an object's storages.

    Args:
        model: A loaded model, or any other object with tensors. A `ModelRef` is loaded for the count.
        largest: How many of the largest private tensors to name.

    Returns:
        The counts over tensors and numpy arrays. Each byte is counted once. Private are the pages of a loaded model
        that were written to, memory on a device, and the packed weights of quantized layers.

    Raises:
        ZeroCopyError: This process has no /proc file system.
    """
    _require_proc()
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
        begin = max(begin, end)  # each byte is counted once
        if stop > begin:
            own = _private_bytes(begin, stop - begin)
            shared += stop - begin - own
            private.append((where, own))
            end = stop
    private = sorted((item for item in private if item[1]), key=lambda item: -item[1])
    return ModelMemory(shared, sum(nbytes for _, nbytes in private), tuple(private[:largest]))


def _private_bytes(address: int, nbytes: int) -> int:
    region = region_at(address)
    if region is None or region.inode == 0:
        return nbytes
    return 0 if region.shared else written_bytes(address, nbytes)


# ---------------------------------------------------------------- of many processes

# How many threads measure the processes of a node.
_THREADS = 8


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes.

    Attributes:
        node: The id of the Ray node.
        pid: The id of the process.
        name: The title of the process, as Ray sets it for actors: `ray::MapWorker(...)`.
        mapped: Bytes of models that are mapped from the object store. A model that was loaded twice counts once.
        pss: Proportional set size: private memory plus this process's share of shared memory. None if the process has
            no /proc file system.
        private: Memory that no other process has mapped. None as for `pss`.
        model_private: The part of `mapped` that the process has written to.
        isolated: Whether writes to models stay in the process. If False, no private view was possible, and a write to
            a weight reaches every process of the node.
    """

    node: str
    pid: int
    name: str
    mapped: int
    pss: int | None
    private: int | None
    model_private: int
    isolated: bool = True


@dataclass(frozen=True)
class PoolMemory:
    """Memory of the processes that have a model. `str()` returns a table.

    Attributes:
        processes: One entry for each process.
        stored: Bytes of all models that these processes map. Each byte is counted once a node.
        dead: How many of the given actors have died.
        unanswered: The nodes that did not answer, because they died or did not answer in time.
        hidden: How many Ray workers `pool_memory` was not permitted to inspect, such as those of another user. They
            may have the model too.
    """

    processes: tuple[ProcessMemory, ...]
    stored: int
    dead: int = 0
    hidden: int = 0
    unanswered: tuple[str, ...] = ()

    @property
    def copies(self) -> int:
        """Bytes that the models would take with a separate copy in each process."""
        return sum(process.mapped for process in self.processes)

    def __str__(self) -> str:
        columns = ("mapped", "model_private", "private", "pss")
        rows = [["process", "model mapped", "of it private", "private in all", "PSS"]]
        for p in self.processes:
            rows.append([f"{p.name} {p.pid}", *(_format(getattr(p, column)) for column in columns)])
        total = [sum(getattr(p, column) or 0 for p in self.processes) for column in columns]
        count = len(self.processes)
        rows.append([f"{count} process{'es' * (count != 1)}", *map(format_bytes, total)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        lines.append(
            f"weights: {format_bytes(self.stored)} once in the object store; "
            f"{count} separate cop{'y' if count == 1 else 'ies'} would take {format_bytes(self.copies)}"
        )
        not_isolated = [str(p.pid) for p in self.processes if not p.isolated]
        if not_isolated:
            lines.append(f"NOT isolated: a write to a weight in process {', '.join(not_isolated)} reaches all others")
        if self.hidden:
            lines.append(f"{self.hidden} Ray workers could not be inspected: permission denied on /proc/<pid>/maps")
        if self.unanswered:
            lines.append(f"no answer from {len(self.unanswered)} nodes: {', '.join(self.unanswered)}")
        if self.dead:
            lines.append(f"{self.dead} of the actors had died")
        return "\n".join(lines)


def _format(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_bytes(nbytes)


def pool_memory(pool: ModelRef | ActorHandle | Iterable[ActorHandle], *, timeout: float = 30.0) -> PoolMemory:
    """Measure the memory of the processes that have loaded a model.

    Args:
        pool: A `ModelRef`, for every process of the cluster that has it loaded on the CPU now, such as the actors of
            a running `map_batches`. Or actor handles, for the processes of these actors.
        timeout: Seconds to wait for the nodes. Nodes that do not answer are in `PoolMemory.unanswered`.

    Returns:
        Private memory and PSS of each process (source: `/proc/<pid>/pagemap` and `smaps_rollup`), totals, and the
        size of separate copies.

    Raises:
        TypeError: `pool` is neither a `ModelRef` nor actor handles.
        ModelLostError: The handle is from another Ray session.
        ModelTimeoutError: The owner of the model did not answer within `timeout`.
        ZeroCopyError: Called with a handle through Ray Client.
    """
    dead = hidden = 0
    unanswered: tuple[str, ...] = ()
    if isinstance(pool, ModelRef):
        check(pool)
        if ray.util.client.ray.is_connected():
            raise ZeroCopyError("pool_memory(model_ref) does not work through Ray Client: call it in a task.")
        answers, unanswered = _ask_nodes(pool, timeout)
        measured = [found for found, _ in answers]
        hidden = sum(count for _, count in answers)
    else:
        handles = list(pool) if isinstance(pool, Iterable) else [pool]
        if not all(isinstance(handle, ActorHandle) for handle in handles):
            raise TypeError("pool_memory takes a ModelRef or actor handles, which ActorClass.remote() returns.")
        asked = [handle.__ray_call__.remote(_measure_self) for handle in handles]
        measured = [answer for answer in map(_answer, asked) if answer is not None]
        dead = len(handles) - len(measured)
    pairs = [pair for node in measured for pair in node]
    stored = sorted({(process.node, *span) for process, spans in pairs for span in spans})
    return PoolMemory(tuple(process for process, _ in pairs), _union(stored), dead, hidden, unanswered)


def _union(spans: Iterable[tuple[Any, ...]]) -> int:
    """Return how many bytes sorted spans `(..., begin, end)` cover, each byte counted once."""
    nbytes = reached = 0
    where: list[Any] = []
    for *place, begin, end in spans:
        if place != where:
            where, reached = place, 0
        nbytes += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return nbytes


def _answer(asked: ray.ObjectRef) -> Any:
    try:
        return ray.get(asked)
    except ray.exceptions.RayActorError:
        return None


_Measured = tuple[ProcessMemory, list[Span]]


def _ask_nodes(model_ref: ModelRef, timeout: float) -> tuple[list[tuple[list[_Measured], int]], tuple[str, ...]]:
    """Measure on each node that has the model, and return the answers and the nodes without one."""
    nodes = set(find_locations(resolve(model_ref, timeout), timeout).nodes)
    nodes.add(ray.get_runtime_context().get_node_id())  # Ray lists no node for an object in a file on disk
    asked = {_on_node(node).remote(model_ref): node for node in sorted(nodes)}
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
    answers, unanswered = [], [asked[ref] for ref in late]
    for ref in late:
        ray.cancel(ref, force=True)
    for ref in done:
        try:
            answers.append(ray.get(ref))
        except ZeroCopyError:
            raise
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError:  # the node died
            unanswered.append(asked[ref])
    return answers, tuple(sorted(unanswered))


def _on_node(node: str) -> Any:
    """Return a Ray function that measures on `node`, even while every CPU there is taken."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_measure_node).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)


def _measure_node(model_ref: ModelRef) -> tuple[list[_Measured], int]:
    """Measure every process of this node that has the model's objects, and count the hidden workers."""
    _require_proc()
    wanted = {stored.object_id: span_of(stored) for stored in object_locations(model_ref)}
    node = ray.get_runtime_context().get_node_id()

    def measure(pid: int) -> _Measured | bool:
        """Measure a process that has the model; otherwise return whether it is a hidden worker."""
        try:
            spans, marked = model_spans(regions(pid), wanted)
            if any(covers(span, wanted.values()) for span in (*spans, *marked)):
                measured = _measure(node, pid, wanted)  # reads the regions again: the model may be gone by then
                return measured if any(covers(span, wanted.values()) for span in measured[1]) else False
        except PermissionError:
            return _title(pid).startswith("ray::")
        except OSError:  # the process ended
            pass
        return False

    with ThreadPoolExecutor(_THREADS) as threads:  # the kernel counts pages without Python's lock
        answers = list(threads.map(measure, sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())))
    return [answer for answer in answers if not isinstance(answer, bool)], answers.count(True)


def _measure_self(self: object) -> list[_Measured]:
    node = ray.get_runtime_context().get_node_id()
    if os.path.exists("/proc/self/smaps"):
        return [_measure(node, os.getpid(), {})]
    spans = sorted({span_of(stored) for stored in marks_of_this_process()})
    mapped = sum(end - begin for *_, begin, end in spans)
    name = f"ray::{type(self).__name__}"
    return [(ProcessMemory(node, os.getpid(), name, mapped, None, None, 0, isolated=not spans), spans)]


def _measure(node: str, pid: int, known: Mapping[str, Span]) -> _Measured:
    found = list(regions(pid))
    views, marked = model_spans(found, known)
    kept = set(views)
    mapped = sum(end - begin for *_, begin, end in (*views, *marked))
    written = [
        pages
        for region in found
        if (region.device, region.inode, region.offset, region.offset + region.end - region.start) in kept
        for pages in written_ranges(region.start, region.end, pid)
    ]
    model_private = sum(end - begin for begin, end in written)
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        rollup = dict(line.split(":") for line in file if line.endswith(" kB\n"))
    total = {key: int(value.split()[0]) * 1024 for key, value in rollup.items()}
    private = total["Private_Clean"] + total["Private_Dirty"]
    process = ProcessMemory(node, pid, _title(pid), mapped, total["Pss"], private, model_private, isolated=not marked)
    return process, [*views, *marked]


def _title(pid: int | str) -> str:
    """Return the first word of a process's command line, which Ray sets to its class or function."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().replace("\0", " ").split()
    except OSError:
        return "?"
    return words[0] if words else "?"
