"""Bring a model to nodes ahead of a pool: `prefetch`.

Note [The order of a prefetch]

Ray copies an object only from nodes that have all of it. A model is several objects, so a node can pass on the first
objects while the last ones arrive. Node `i` of `n` starts with another object than the others, so that the nodes can
get most objects from each other, and each object leaves the first node about once::

    node 0    object 0 | object 1 | object 2 | object 3
    node 1    object 1 | object 2 | object 3 | object 0
    node 2    object 2 | object 3 | object 0 | object 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
import ray.experimental
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ModelLostError, log
from .fetch import explain_loss
from .locations import ModelLocations
from .lookup import resolve
from .ref import ModelRef, check, format_bytes
from .waits import LOOKUP_SECONDS, check_timeout, find_locations

__all__ = ["NodePrefetch", "PrefetchResult", "prefetch"]

_PROGRESS_SECONDS = 5.0
# How many objects a node asks for at a time, so that the next one arrives without a pause.
_IN_FLIGHT = 2
# How long tasks may take to report after their timeout.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class NodePrefetch:
    """What `prefetch` did on one node.

    Attributes:
        node: The id of the node.
        nbytes: Bytes that it received. 0 if it had the model.
        seconds: From the start of the copy on that node to its end.
        sources: The nodes that had a received object when this node asked for it. Ray does not tell which of them
            sent it.
        error: Why the node does not have the model now; None if it does.
    """

    node: str
    nbytes: int = 0
    seconds: float = 0.0
    sources: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class PrefetchResult:
    """What `prefetch` did; `str()` returns a table.

    Attributes:
        nodes: One entry for each node.
        seconds: From the call to its end.
    """

    nodes: tuple[NodePrefetch, ...]
    seconds: float = field(compare=False)

    @property
    def failed(self) -> tuple[NodePrefetch, ...]:
        """The nodes that do not have the model."""
        return tuple(node for node in self.nodes if node.error is not None)

    def __str__(self) -> str:
        lines = [
            f"{len(self.nodes) - len(self.failed)} of {len(self.nodes)} nodes have the model, {self.seconds:.1f} s"
        ]
        for node in self.nodes:
            outcome = f"failed: {node.error}" if node.error is not None else f"from {', '.join(node.sources) or '-'}"
            lines.append(f"{node.node}  {format_bytes(node.nbytes):>10}  {node.seconds:6.2f} s  {outcome}")
        return "\n".join(lines)


def prefetch(
    model_ref: ModelRef,
    nodes: str | Iterable[str] | None = None,
    *,
    resources: Mapping[str, float] | None = None,
    label_selector: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> PrefetchResult:
    """Bring a model to the object stores of nodes, before workers there load it.

    A first load on a node then takes as long as on the node that prepared the model. The copy stays until the store
    needs its room for other objects, or the model is freed. A second `prefetch` brings only what is missing.

    Args:
        model_ref: The handle.
        nodes: Ids of nodes (`ray.nodes()` lists them). None for all nodes that are alive.
        resources: Take only nodes with at least these resources in total, such as `{"GPU": 1}`.
        label_selector: Take only nodes with these labels, in Ray's form: `{"key": "value"}`, `"!value"`, `"in(a, b)"`
            or `"!in(a, b)"`.
        timeout: Seconds to wait for the bytes. Nodes that do not have the model then have an error in the result. The
            owner of the model has at least two seconds to say where the bytes are.

    Returns:
        Bytes, seconds and possible sources for each node, and the errors of nodes that failed. An error of one node,
        such as its death, does not affect the others.

    Raises:
        TypeError: `model_ref` is not a handle, or an argument has the wrong type.
        ValueError: A node id is unknown or its node is dead; no node matches; `timeout` is negative.
        ModelLostError: The model is lost, or the handle is from another Ray session.
        ModelTimeoutError: The owner of the model does not answer within `timeout`.

    Example:
        >>> import torch
        >>> from ray_zerocopy import prepare_model_for_actors
        >>> result = prefetch(prepare_model_for_actors(torch.nn.Linear(2, 2)))
        >>> result.failed
        ()
    """
    check(model_ref)
    check_timeout(timeout)
    patience = None if timeout is None else max(timeout, LOOKUP_SECONDS)
    model_ref = resolve(model_ref, patience)
    begin = time.monotonic()
    chosen = _choose_nodes(nodes, resources, label_selector)
    found = find_locations(model_ref, patience)
    if found.unknown:
        raise ModelLostError(explain_loss(model_ref, f"Ray knows nothing of {found.unknown} of its objects"))
    results, running = _start(model_ref, chosen, found, timeout)
    _collect(running, results, model_ref, begin, timeout)
    return PrefetchResult(tuple(results[node] for node in chosen), time.monotonic() - begin)


def _start(
    model_ref: ModelRef, chosen: Mapping[str, float | None], found: ModelLocations, timeout: float | None
) -> tuple[dict[str, NodePrefetch], dict[Any, str]]:
    """Start a task on each node that lacks a part of the model; return the results of the others, and the tasks."""
    results: dict[str, NodePrefetch] = {}
    running: dict[Any, str] = {}
    pull = ray.remote(num_cpus=0, max_retries=0)(_make_pull())
    for number, (node, capacity) in enumerate(chosen.items()):
        missing = found.nbytes - found.nodes.get(node, 0)
        if missing <= 0:
            results[node] = NodePrefetch(node)
        elif capacity is not None and found.nbytes > capacity:
            results[node] = NodePrefetch(
                node,
                error=f"the model has {format_bytes(found.nbytes)}, and the object store of this node holds "
                f"{format_bytes(capacity)}, which is {format_bytes(found.nbytes - capacity)} too little",
            )
        else:
            first = number * len(model_ref.refs) // len(chosen)
            order = [*model_ref.refs[first:], *model_ref.refs[:first]]
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            running[pull.options(scheduling_strategy=strategy).remote([order], timeout, _IN_FLIGHT)] = node
    return results, running


def _collect(
    running: dict[Any, str],
    results: dict[str, NodePrefetch],
    model_ref: ModelRef,
    begin: float,
    timeout: float | None,
) -> None:
    """Wait for the tasks of `prefetch`, and log the progress."""
    total, next_line = len(running) + len(results), begin + 1.0
    deadline = None if timeout is None else begin + timeout + _GRACE_SECONDS
    while running:
        done, _ = ray.wait(list(running), timeout=0.5)
        for task in done:
            node = running.pop(task)
            results[node] = _result_of(task, node)
        now = time.monotonic()
        if running and now >= next_line:
            next_line = now + _PROGRESS_SECONDS
            log(f"prefetch: {total - len(running)} of {total} nodes have {model_ref!r} after {now - begin:.0f} s")
        if deadline is not None and now > deadline:
            for task, node in running.items():
                ray.cancel(task, force=True)
                results[node] = NodePrefetch(node, error=f"no answer within timeout={timeout:g} s")
            return


def _result_of(task: Any, node: str) -> NodePrefetch:
    try:
        nbytes, seconds, sources, error = ray.get(task)
    except ray.exceptions.RayError as raised:
        return NodePrefetch(node, error=f"{type(raised).__name__}: {str(raised).splitlines()[0]}")
    return NodePrefetch(node, nbytes, seconds, tuple(sources), error)


def _make_pull() -> Callable[..., Any]:
    """Return the function of the tasks. A nested function is pickled by value, so a worker need not import torch."""

    def pull(
        nested: list[list[Any]], timeout: float | None, in_flight: int
    ) -> tuple[int, float, list[str], str | None]:
        import time

        import ray
        import ray.exceptions
        import ray.experimental

        begin = time.monotonic()
        here = ray.get_runtime_context().get_node_id()
        waiting, nbytes = list(nested[0]), 0
        asked: list[Any] = []
        sizes: dict[Any, int] = {}
        sources: set[str] = set()
        while waiting or asked:
            while waiting and len(asked) < in_flight:
                ref = waiting.pop(0)
                place = ray.experimental.get_object_locations([ref]).get(ref)
                if place is None:
                    return nbytes, time.monotonic() - begin, sorted(sources), "the process that owned the model ended"
                if here not in place["node_ids"]:
                    sources.update(place["node_ids"])
                    sizes[ref] = place["object_size"] or 0
                asked.append(ref)
            rest = None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
            done, asked = ray.wait(asked, timeout=rest, fetch_local=True)
            try:
                ray.get(done)  # an object that is lost counts as done
            except ray.exceptions.RayError as lost:
                error = f"the model is lost: {type(lost).__name__}"
                return nbytes, time.monotonic() - begin, sorted(sources), error
            nbytes += sum(sizes.get(ref, 0) for ref in done)
            if not done:
                error = f"{len(waiting) + len(asked)} objects did not arrive within timeout={timeout:g} s"
                return nbytes, time.monotonic() - begin, sorted(sources), error
        return nbytes, time.monotonic() - begin, sorted(sources), None

    return pull


def _choose_nodes(
    nodes: str | Iterable[str] | None,
    resources: Mapping[str, float] | None,
    label_selector: Mapping[str, str] | None,
) -> dict[str, float | None]:
    """Return the ids of the nodes that are asked for, and the bytes that the object store of each holds."""
    known = {node["NodeID"]: node for node in ray.nodes()}
    alive = [node for node, about in known.items() if about["Alive"]]
    if nodes is None:
        chosen = alive
    else:
        if not isinstance(nodes, Iterable):
            raise TypeError(f"nodes={nodes!r} is not a node id or several. ray.nodes() lists the ids.")
        chosen = [nodes] if isinstance(nodes, str) else list(dict.fromkeys(nodes))
        unknown = [node for node in chosen if node not in known]
        dead = [node for node in chosen if node in known and node not in alive]
        for wrong, what in ((unknown, "not nodes of this cluster"), (dead, "nodes that are dead")):
            if wrong:
                raise ValueError(f"{', '.join(map(repr, wrong))}: {what}. Alive are {', '.join(alive)}.")
    if resources is not None:
        chosen = [n for n in chosen if all(known[n]["Resources"].get(k, 0) >= v for k, v in resources.items())]
    if label_selector is not None:
        chosen = [
            node
            for node in chosen
            if all(_matches(known[node].get("Labels", {}).get(key), value) for key, value in label_selector.items())
        ]
    if not chosen:
        raise ValueError(
            f"no node matches nodes={nodes!r}, resources={resources!r}, label_selector={label_selector!r}. "
            f"ray.nodes() lists the resources and labels of {len(alive)} nodes."
        )
    return {node: known[node]["Resources"].get("object_store_memory") for node in chosen}


def _matches(label: str | None, wanted: str) -> bool:
    """Tell whether a label has a wanted value, in the form of Ray's label selectors."""
    negated = wanted.startswith("!")
    wanted = wanted.removeprefix("!").strip()
    several = wanted.startswith("in(") and wanted.endswith(")")
    values = [value.strip() for value in wanted[3:-1].split(",")] if several else [wanted]
    return (label in values) != negated
