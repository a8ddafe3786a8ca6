"""A handle -> the objects in the store. Every load gets its weights here, by `waits.get_objects`."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import ray
import ray.exceptions
import ray.experimental
import ray.util.client

from ..errors import ModelLostError
from .lookup import forget, report_lost, resolve
from .ref import ModelRef, check, check_format
from .session import watch_session
from .waits import get_objects

__all__ = ["Fetched", "explain_loss", "fetch", "fetch_local"]


class Fetched(NamedTuple):
    """The objects of a model, and their ids in hexadecimal digits. The store keeps them while `bodies` lives."""

    bodies: list[dict[str, Any]]
    object_ids: list[str]


_LOST: tuple[type[Exception], ...] = (
    ray.exceptions.ObjectLostError,
    ray.exceptions.ReferenceCountingAssertionError,
    # A loader that ran again made another number of objects. Not in old versions of Ray.
    getattr(ray.exceptions, "StreamingGeneratorReplayInconsistentError", ray.exceptions.ObjectLostError),
)
# Seconds to wait for an object that is on this node.
_LOCAL_SECONDS = 5.0
# How often a named model is looked up again after its objects were lost: its owner may have loaded it again.
_ATTEMPTS = 3


def fetch(model_ref: ModelRef, timeout: float | None = None) -> Fetched:
    """Return the objects of a handle.

    Raises:
        TypeError: `model_ref` is not a handle.
        ModelLostError: The model is lost.
        ModelTimeoutError: The objects did not arrive within `timeout` seconds.
    """
    check(model_ref)
    watch_session()
    for attempt in range(_ATTEMPTS if model_ref.name else 1):
        found = resolve(model_ref, timeout)
        try:
            bodies: list[dict[str, Any]] = _get_bodies(found, timeout)
        except _LOST as error:
            forget(model_ref.namespace, model_ref.name)
            if not model_ref.name or attempt == _ATTEMPTS - 1:
                raise ModelLostError(explain_loss(model_ref, type(error).__name__)) from error
            report_lost(found)
        else:
            check_format(bodies, model_ref)
            return Fetched(bodies, [ref.hex() for ref in found.refs])
    raise AssertionError


def fetch_local(model_ref: ModelRef) -> Fetched:
    """Return the objects of a handle that are on this node. Nothing is copied to it."""
    check(model_ref)
    refs = list(resolve(model_ref).refs)
    here = ray.get_runtime_context().get_node_id()
    found = Fetched([], [])
    places = ray.experimental.get_object_locations(refs)
    for ref in refs:
        nodes = places.get(ref, {}).get("node_ids", ())
        if here in nodes or not nodes:  # Ray lists no node for an object in a file on disk
            with contextlib.suppress(ray.exceptions.RayError):  # it is nowhere
                found.bodies.append(ray.get(ref, timeout=_LOCAL_SECONDS))
                found.object_ids.append(ref.hex())
    return found


def _get_bodies(found: ModelRef, timeout: float | None) -> list[dict[str, Any]]:
    if not ray.util.client.ray.is_connected():
        return get_objects(found, timeout)
    # The server of Ray Client cannot pickle views of the store, and then never answers.
    copied: list[dict[str, Any]] = ray.get(
        ray.remote(num_cpus=0)(_copy_bodies).remote(list(found.refs)), timeout=timeout
    )
    return copied


def _copy_bodies(refs: list[Any]) -> list[dict[str, Any]]:
    """Return the objects of a model with their buffers as bytes."""
    bodies = []
    for body in ray.get(refs):
        buffers = [bytes(buffer) for buffer in body["buffers"]]  # copy: to another machine
        rest = {"header": bytes(body["header"])} if "header" in body else {}
        bodies.append({**body, "padding": None, "buffers": buffers, **rest})
    return bodies


def explain_loss(model_ref: ModelRef, error: str) -> str:
    """Say which process ended, and which way to prepare the model outlives it."""
    lost = f"{model_ref!r} is no longer in the object store: {error}."
    if model_ref.name:
        return (
            f"{lost} The nodes that had it died, and it has no loader, or its loader could not run again. Prepare it "
            f'again, with a loader that may run often: prepare_model_from(load, name="{model_ref.name}", '
            f'lifetime="detached").'
        )
    detached = 'name="...", lifetime="detached"'
    origin = model_ref.origin
    if origin is None:
        return (
            f"{lost} The store keeps a model while the process that prepared it runs and a handle exists. Keep "
            f"model_ref, or prepare the model so that it outlives its driver: prepare_model_for_actors(model, "
            f"{detached})."
        )
    where = f"process {origin.pid} on node {origin.node[:8]}"
    if origin.node not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
        return (
            f"{lost} Node {origin.node[:8]}, on which it was prepared, died. A model with a loader is loaded again "
            f"on another node: prepare_model_from(load, {detached})."
        )
    if origin.kind == "loader":
        return (
            f"{lost} Its loader ran for {where}, which ended, or could not run again. Keep that process, or name the "
            f"model: prepare_model_from(load, {detached})."
        )
    if origin.kind == "driver":
        return (
            f"{lost} It was prepared by a driver ({where}), which ended or dropped the handle. Keep model_ref in the "
            f"driver, or let the model outlive the driver: prepare_model_for_actors(model, {detached})."
        )
    return (
        f"{lost} It was prepared by a Ray {origin.kind} ({where}), which ended or dropped the handle. Prepare it in "
        f"the driver, or let the model outlive the {origin.kind}: prepare_model_for_actors(model, {detached})."
    )
