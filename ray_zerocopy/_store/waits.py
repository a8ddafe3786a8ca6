"""Wait for the objects of a model and for calls of actors: say so after a while, and stop at a timeout."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
import ray.exceptions
import ray.util.client

from ..errors import ModelTimeoutError, log
from .locations import ModelLocations, locations_of
from .ref import ModelRef, format_bytes

__all__ = ["LOOKUP_SECONDS", "check_timeout", "find_locations", "get_objects", "seconds_of_silence", "wait_for"]

# A wait that takes longer than this says what it waits for: a load once, a call of an actor again and again.
LOG_AFTER_SECONDS = 30.0
# Seconds that the owner of a model has, at least, to say where the bytes are.
LOOKUP_SECONDS = 2.0
_NO_ANSWER = (
    "Its owner, the process that prepared it, does not answer within {:g} s: the process is stopped or very busy, or "
    "its node cannot be reached."
)


def check_timeout(timeout: object) -> None:
    """Raise TypeError or ValueError unless `timeout` is None or a number of seconds that is not negative."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(
            f"timeout={timeout!r} is not a number of seconds. Give a number, or None to wait without end."
        )
    if not timeout >= 0:
        raise ValueError(f"timeout={timeout!r} is negative. Give seconds, or None to wait without end.")


def seconds_of_silence(begin: float, timeout: float | None) -> float:
    """Return the seconds until a wait that began at `begin` logs a line, or ends; not above 0 if it is over."""
    if timeout is None:
        return LOG_AFTER_SECONDS
    return min(LOG_AFTER_SECONDS, timeout - (time.monotonic() - begin))


def wait_for(call: Any, what: str, timeout: float | None = None) -> Any:
    """Return `ray.get(call)`. Log `what` every half minute.

    Raises:
        ModelTimeoutError: The call did not return within `timeout` seconds.
    """
    begin = time.monotonic()
    while True:
        try:
            return ray.get(call, timeout=max(0.0, seconds_of_silence(begin, timeout)))
        except ray.exceptions.GetTimeoutError:
            waited = time.monotonic() - begin
            if timeout is not None and waited >= timeout:
                raise ModelTimeoutError(
                    f"{what} did not end within timeout={timeout:g} s. Pass a larger timeout."
                ) from None
            log(f"{what} takes {waited:.0f} s so far", logging.WARNING)


def get_objects(model_ref: ModelRef, timeout: float | None = None) -> list[Any]:
    """Return `ray.get` of a handle's objects.

    Args:
        model_ref: A checked handle.
        timeout: Seconds to wait; None waits without end.

    Raises:
        ModelTimeoutError: The objects did not arrive in time.
    """
    refs = list(model_ref.refs)
    begin = time.monotonic()
    first = LOG_AFTER_SECONDS if timeout is None else min(timeout, LOG_AFTER_SECONDS)
    with contextlib.suppress(ray.exceptions.GetTimeoutError):
        return list(ray.get(refs, timeout=first))
    reason = _describe_wait(model_ref)
    if timeout is None or timeout > first:
        log(f"{model_ref!r} has not arrived after {first:.0f} s. {reason}", logging.WARNING)
        rest = None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            return list(ray.get(refs, timeout=rest))
        reason = _describe_wait(model_ref)
    raise ModelTimeoutError(
        f"{model_ref!r} did not arrive within timeout={timeout:g} s. {reason} Pass a larger timeout, or bring the "
        f"model to the nodes first: ray_zerocopy.prefetch(model_ref)."
    )


def find_locations(model_ref: ModelRef, timeout: float | None = None) -> ModelLocations:
    """Ask the owner of a checked handle which nodes have the model.

    Raises:
        ModelTimeoutError: The owner did not answer in time.
    """
    first = LOG_AFTER_SECONDS if timeout is None else timeout
    with contextlib.suppress(ray.exceptions.GetTimeoutError):
        return locations_of(model_ref.refs, first)
    if timeout is None:
        log(f"{model_ref!r}: {_NO_ANSWER.format(first)}", logging.WARNING)
        return locations_of(model_ref.refs)
    raise ModelTimeoutError(f"{model_ref!r}: {_NO_ANSWER.format(timeout)} Look at that process, or prepare it again.")


def _describe_wait(model_ref: ModelRef) -> str:
    """Say what a load waits for: bytes from other nodes, or an owner that does not answer."""
    if ray.util.client.ray.is_connected():
        return "The process is connected through Ray Client, which does not tell where objects are."
    node = ray.get_runtime_context().get_node_id()
    try:
        found = locations_of(model_ref.refs, timeout=LOOKUP_SECONDS)
    except ray.exceptions.GetTimeoutError:
        return _NO_ANSWER.format(LOOKUP_SECONDS)
    here = found.nodes.get(node, 0)
    if not found.nodes:
        return "No node has its bytes now. Its owner may be making them again."
    if here >= found.nbytes:
        return "All its bytes are on this node, but the object store does not hand them out."
    others = ", ".join(sorted(other for other in found.nodes if other != node))
    return (
        f"This node has {format_bytes(here)} of {format_bytes(found.nbytes)}. The rest comes from "
        f"{others or 'no node that is known'}, and needs room in the object store of this node."
    )
