"""A name -> the objects of a model: find the owner, ask it once, and keep the answer while it holds.

See Note [Who holds a named model] in `owner.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import pickle
import threading
import time
import uuid
import weakref
from typing import Any, NamedTuple

import ray
import ray.exceptions
import ray.util.client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ModelLostError, ZeroCopyError
from . import owner as owner_module
from .owner import ModelOwner, read_record, run_loader, write_record
from .ref import FORMAT, ModelRef, current_session
from .waits import wait_for

__all__ = [
    "ANSWER_SECONDS",
    "NAMESPACE",
    "create_owner",
    "describe",
    "explain_absence",
    "find_owner",
    "forget",
    "loader_task",
    "named_handle",
    "note_removed",
    "package_version",
    "raise_loader_error",
    "report_lost",
    "resolve",
]


# The namespace of models, if none is given: drivers in different namespaces find each other's models.
NAMESPACE = "ray_zerocopy"
# Seconds that a process keeps an answer without asking again.
LEASE_SECONDS = 60.0
# Seconds to wait for an owner that has nothing to prepare before it answers.
ANSWER_SECONDS = 10.0
# How often an owner that ends while it is asked is looked up again.
_ATTEMPTS = 5


# ---------------------------------------------------------------- the owner


@functools.cache
def _owner_class() -> Any:
    ray.cloudpickle.register_pickle_by_value(owner_module)
    return ray.remote(ModelOwner)


@functools.cache
def loader_task() -> Any:
    """Return the remote function that runs a loader."""
    ray.cloudpickle.register_pickle_by_value(owner_module)
    return ray.remote(num_returns="streaming")(run_loader)


@functools.cache
def package_version() -> str:
    try:
        return importlib.metadata.version("ray-zerocopy")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def create_owner(
    namespace: str, name: str, detached: bool, options: dict[str, Any], incarnation: str | None = None
) -> Any:
    """Return the owner of a name. Create it if there is none."""
    facts = {"format": FORMAT, "package": package_version(), "detached": detached}
    # Ray places an actor without any resources at random, whatever node it prefers. So the owner asks for a byte.
    actor = _owner_class().options(
        **{"num_cpus": 0, "memory": 1, **options},
        name=name,
        namespace=namespace,
        lifetime="detached" if detached else None,
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=10_000,  # one call of watch for each process with a lease
    )
    return _check_owner(actor.remote(namespace, name, incarnation or uuid.uuid4().hex, facts), namespace, name)


def _check_owner(actor: Any, namespace: str, name: str) -> Any:
    if not hasattr(actor, "describe_model"):
        raise ValueError(
            f"the name {name!r} in the namespace {namespace!r} belongs to an actor that holds no model. Take another "
            f"name, or leave out namespace: models then have the namespace {NAMESPACE!r}."
        )
    return actor


def find_owner(namespace: str, name: str) -> Any:
    """Return the owner of a name, or None. An owner with a loader that was killed is created again."""
    try:
        actor = ray.get_actor(name, namespace=namespace)
    except ValueError:
        pass
    else:
        return _check_owner(actor, namespace, name)
    saved = read_record(namespace, name)
    if saved is None or saved.recipe is None or saved.removed or not saved.detached:
        return None
    return create_owner(namespace, name, True, _near(pickle.loads(saved.recipe)["node"]), saved.incarnation)


def note_removed(namespace: str, name: str) -> None:
    """Write into the record that the model was removed, for an owner that does not answer."""
    saved = read_record(namespace, name)
    if saved is not None:
        write_record(namespace, name, saved._replace(removed=time.time()))


def _near(node: str | None) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}


def describe(
    namespace: str, name: str, wait: bool = True, timeout: float | None = None
) -> tuple[Any, dict[str, Any]] | None:
    """Return the owner of a name and its answer, or None if there is no owner."""
    for attempt in range(_ATTEMPTS):
        owner = find_owner(namespace, name)
        if owner is None:
            return None
        try:
            call = owner.describe_model.remote(wait)
            return owner, wait_for(call, f"the wait for the owner of the model {name!r}, which prepares it,", timeout)
        except ray.exceptions.RayActorError:  # it ended meanwhile
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.1)
    return None


# ---------------------------------------------------------------- leases


class _Lease(NamedTuple):
    """What the owner answered, with the ObjectRefs; and the call that returns when the answer no longer holds."""

    model_ref: ModelRef
    watch: Any


_leases: dict[tuple[str, str, str], _Lease] = {}


def resolve(model_ref: ModelRef, timeout: float | None = None) -> ModelRef:
    """Return the handle with the objects to load: `model_ref` itself, if it has no name.

    Raises:
        ModelLostError: There is no model of that name.
        ModelTimeoutError: The owner of the name did not answer within `timeout` seconds.
    """
    if not model_ref.name or model_ref.refs:
        return model_ref
    assert model_ref.namespace is not None
    key = (current_session(), model_ref.namespace, model_ref.name)
    lease = _leases.get(key)
    if lease is None or not lease.model_ref.refs or lease.model_ref.created < model_ref.created:
        lease = _new_lease(key, timeout)
    return lease.model_ref


def _new_lease(key: tuple[str, str, str], timeout: float | None) -> _Lease:
    session, namespace, name = key
    found = describe(namespace, name, timeout=timeout)
    if found is None or found[1]["status"] != "ready":
        raise ModelLostError(explain_absence(namespace, name, found and found[1]))
    owner, answer = found
    version = answer["version"]
    concrete = named_handle(namespace, name, version, session, with_refs=True)
    if ray.util.client.ray.is_connected():
        return _Lease(concrete, None)  # every load asks: Ray Client would wait for the call of watch
    watch = owner.watch.remote(version["generation"], LEASE_SECONDS)
    lease = _Lease(concrete, watch)
    _leases[key] = lease

    def end(_: Any) -> None:
        if _leases.get(key) is lease:
            del _leases[key]

    watch.future().add_done_callback(end)
    return lease


def report_lost(model_ref: ModelRef) -> None:
    """Tell the owner of a name that the objects of a version cannot be had, so that it runs its loader again."""
    assert model_ref.namespace is not None
    assert model_ref.name is not None
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        owner = find_owner(model_ref.namespace, model_ref.name)
        if owner is not None:
            ray.get(owner.lost.remote(model_ref.created), timeout=ANSWER_SECONDS)


def forget(namespace: str | None, name: str | None) -> None:
    """Drop what this process knows of a name. The next load asks the owner."""
    for key in [key for key in _leases if key[1:] == (namespace, name)]:
        _leases.pop(key, None)


def named_handle(
    namespace: str, name: str, version: dict[str, Any], session: str, *, with_refs: bool = False, owner: Any = None
) -> ModelRef:
    """Return the handle of a version, as the owner describes it."""
    if version["format"] != FORMAT:
        raise ZeroCopyError(
            f"the owner of the model {name!r} runs ray_zerocopy {version['package']} (format {version['format']}), "
            f"and this process runs {package_version()} (format {FORMAT}). Install one version everywhere, then: "
            f"remove_model({name!r}), and prepare the model again."
        )
    facts = (version["class_name"], version["nbytes"], version["carried_nbytes"], version["tensors"])
    refs = tuple(version["refs"]) if with_refs else ()
    handle = ModelRef(*facts, refs, session, name, namespace, version["created"])
    if not with_refs and not version["detached"]:
        keeper = _keepers.get((session, namespace, name))
        if owner is not None:
            keeper = keeper or _Keeper((session, namespace, name), owner)
            keeper.generation[0] = version["generation"]
        object.__setattr__(handle, "_keeper", keeper)
    return handle


class _Keeper:
    """Keeps the owner of a model without a lifetime, for all handles of its name in the process that prepared it."""

    def __init__(self, key: tuple[str, str, str], owner: Any) -> None:
        self.generation = [0]  # of the last version that this process has made
        weakref.finalize(self, _end_owner, owner, self.generation).atexit = False
        _keepers[key] = self


_keepers: weakref.WeakValueDictionary[tuple[str, str, str], _Keeper] = weakref.WeakValueDictionary()


def _end_owner(owner: Any, generation: list[int]) -> None:
    """End the calls of `watch` that run in an owner, so that it ends with the last reference to it, which is here."""

    def close() -> None:
        with contextlib.suppress(Exception):  # Ray has ended
            owner.close.remote(generation[0])

    # A finalizer may run in the middle of a call of Ray.
    threading.Thread(target=close, name="ray_zerocopy-end", daemon=True).start()


# ---------------------------------------------------------------- what became of a model


def explain_absence(namespace: str, name: str, answer: dict[str, Any] | None) -> str:
    """Say why there is no model of a name, and what to do."""
    what = f"the model {name!r} in the namespace {namespace!r}"
    again = (
        f'Prepare it again. A model with a loader comes back by itself: prepare_model_from(load, name="{name}", '
        f'lifetime="detached").'
    )
    if answer is not None and answer["status"] == "empty":
        return f"{what} is not there: the process that prepared it ended, or is still busy. Prepare it again."
    if answer is not None and answer["status"] == "failed":
        report = answer["report"]
        return f"{what} was lost, and its loader failed when it ran again: {report['text'].strip()}"
    if answer is not None:
        return f"{what} is lost: {_end_of_owner(answer['node'], answer['pid'])}, and it had no loader. {again}"
    saved = read_record(namespace, name)
    if saved is None:
        return f"{what} does not exist in this cluster. {_names_there(namespace)}"
    if saved.removed:
        ago = time.time() - saved.removed
        return f"{what} was removed by remove_model {ago:.0f} s ago. Prepare it again."
    if not saved.detached:
        return (
            f'{what} is lost: it was prepared without lifetime="detached", and its driver ended or dropped the last '
            f'handle, or its owner was killed. Prepare it again with lifetime="detached".'
        )
    return f"{what} is lost: {_end_of_owner(saved.node, saved.pid)}, and it had no loader. {again}"


def _end_of_owner(node: str, pid: int) -> str:
    alive = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
    if node not in alive:
        return f"node {node[:8]}, on which its owner was, died"
    return f"its owner (process {pid} on node {node[:8]}) was killed"


def _names_there(namespace: str) -> str:
    named = [found for found in ray.util.list_named_actors(all_namespaces=True) if found["namespace"] == namespace]
    if not named:
        return "No actor or model has that namespace. list_models() lists the models of the default namespace."
    return f"Names in that namespace: {', '.join(sorted(repr(found['name']) for found in named)[:20])}."


def raise_loader_error(report: dict[str, Any], loader: str) -> None:
    """Raise what a loader raised, or say how its task ended."""
    if report["status"] == "late":
        raise TimeoutError(
            f"the loader {loader} did not return within {report['seconds']} s, so its task was cancelled. Pass a "
            f"larger timeout, or timeout=None to wait without a limit."
        )
    if report["status"] == "died":
        raise ZeroCopyError(f"the loader {loader} did not finish, because its worker died: {report['text'].strip()}")
    told = ZeroCopyError(
        f"the loader {loader} failed in process {report['pid']} on node {report['node'][:8]}:\n{report['text']}"
    )
    try:
        error = pickle.loads(report["error"])
    except Exception:
        raise told from None
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"raised by the loader {loader}, in process {report['pid']} on node {report['node'][:8]}")
    raise error from told
