"""Models by name, and models that a worker loads: for models that outlive a driver, or never were in it.

`docs/lifetimes.md` shows which process holds what, with recipes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ray
import ray.exceptions
import ray.util.client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ._store.loader import load_unnamed, make_recipe
from ._store.lookup import (
    ANSWER_SECONDS,
    describe,
    explain_absence,
    find_owner,
    forget,
    named_handle,
    note_removed,
)
from ._store.publish import load_named, naming_of
from ._store.ref import ModelRef, current_session, format_bytes
from ._store.spans import count_processes
from .errors import ModelTimeoutError, ZeroCopyError

__all__ = ["NamedModel", "get_model", "list_models", "prepare_model_from", "remove_model"]


def prepare_model_from(
    load: Callable[[], Any],
    *,
    name: str | None = None,
    namespace: str | None = None,
    lifetime: str | None = None,
    get_if_exists: bool = False,
    replace: bool = False,
    timeout: float | None = None,
    allow_meta: bool = False,
    imports: Iterable[str | ModuleType] = (),
    **ray_options: Any,
) -> ModelRef:
    """Load a model in a worker, put its weights into the object store there, and return a handle.

    This process never has the model. The loader runs as a Ray task, by default on the node whose store has the most
    room. It must return an equal model each time, because it runs again if the model is lost: without a name if the
    node with the objects dies, with a name also if the owner dies.

    Args:
        load: A function without arguments that returns the model, such as
            `functools.partial(AutoModel.from_pretrained, "...")`.
        name: As for `prepare_model_for_actors`. Without a name, the model ends with this process or with the handle.
        namespace: As for `prepare_model_for_actors`.
        lifetime: As for `prepare_model_for_actors`.
        get_if_exists: As for `prepare_model_for_actors`. The loader does not run if the name exists.
        replace: As for `prepare_model_for_actors`.
        timeout: Seconds that the loader may take, with the start of its worker. By default there is no limit.
        allow_meta: As for `prepare_model_for_actors`.
        imports: As for `prepare_model_for_actors`.
        ray_options: Options of the task, as for `ray.remote`: `num_cpus` (0 by default, so that a load does not wait
            for CPUs that the pool has), `num_gpus`, `memory`, `resources`, `accelerator_type`, `label_selector`,
            `scheduling_strategy`, `runtime_env`, and `max_retries`: how often a loader whose worker died runs again.

    Returns:
        The handle.

    Raises:
        TypeError: `load` is not a function without arguments, cannot be pickled, or returned no model; or an option
            does not exist.
        ValueError: As for `prepare_model_for_actors`.
        TimeoutError: The loader did not return in time. Its task was cancelled.
        ZeroCopyError: The worker of the loader died, or no store has room for the model.
        Exception: What the loader raised.

    Example:
        >>> import functools, torch
        >>> model_ref = prepare_model_from(functools.partial(torch.nn.Linear, 512, 512))
        >>> model_ref.class_name, model_ref.nbytes
        ('Linear', 1050624)
    """
    naming = naming_of("prepare_model_from", name, namespace, lifetime, get_if_exists, replace, ray_options)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"prepare_model_from() has timeout={timeout!r}. Pass a positive number of seconds, or None.")
    current_session()
    recipe = make_recipe(load, timeout=timeout, allow_meta=allow_meta, imports=imports, options=ray_options)
    return load_unnamed(recipe) if naming is None else load_named(recipe, naming)


def get_model(name: str, namespace: str | None = None) -> ModelRef:
    """Return the handle of a named model, in any process of the cluster.

    Waits for a model that is being prepared.

    Raises:
        ValueError: There is no model of that name in that namespace.
        TypeError: `name` or `namespace` is not a string.
        ZeroCopyError: Another version of this package prepared the model.

    Example:
        >>> import torch
        >>> from ray_zerocopy.actor import load_model_in_actor, prepare_model_for_actors
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(4, 2), name="tiny")
        >>> load_model_in_actor(get_model("tiny"))
        Linear(in_features=4, out_features=2, bias=True)
    """
    namespace = _checked("get_model", name, namespace)
    session = current_session()
    found = describe(namespace, name)
    if found is None or found[1]["status"] != "ready":
        raise ValueError(f"get_model({name!r}): {explain_absence(namespace, name, found and found[1])}")
    return named_handle(namespace, name, found[1]["version"], session)


def remove_model(name: str, namespace: str | None = None) -> None:
    """Remove a named model: its owner ends, its name is free, and no process can load it any more.

    Models that are loaded stay valid. The store frees the bytes when the last process drops its model.

    Raises:
        ValueError: There is no model of that name in that namespace.
        TypeError: `name` or `namespace` is not a string.
    """
    namespace = _checked("remove_model", name, namespace)
    current_session()
    owner = find_owner(namespace, name)
    if owner is None:
        raise ValueError(f"remove_model({name!r}): {explain_absence(namespace, name, None)}")
    try:
        ray.get(owner.remove.remote(), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayActorError:  # it ended meanwhile
        pass
    except ray.exceptions.GetTimeoutError:  # it is stopped, or was never started for want of a resource
        note_removed(namespace, name)
    ray.kill(owner)
    forget(namespace, name)


@dataclass(frozen=True)
class NamedModel:
    """One line of `list_models`; `str()` of it is readable.

    Attributes:
        name: The name of the model.
        namespace: The namespace of the name.
        state: "ready", "preparing", "lost", "failed" or "no answer": the owner is stopped, or Ray cannot start it.
        class_name: The class of the model; empty if it is not ready.
        nbytes: Bytes of weights in the store.
        node: The id of the node of the owner.
        processes: How many processes of the cluster have the model loaded on the CPU.
        created: When this version was made, in seconds since the epoch.
        loader: The loader that made it, or None.
        detached: Whether the model outlives its driver.
    """

    name: str
    namespace: str
    state: str
    class_name: str
    nbytes: int
    node: str
    processes: int
    created: float
    loader: str | None
    detached: bool

    def __str__(self) -> str:
        if self.state != "ready":
            where = f"owner on node {self.node[:8]}" if self.node else "its owner is stopped, or waits for a resource"
            return f"{self.name}: {self.state}, {where}"
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.created))
        return (
            f"{self.name}: {self.class_name}, {format_bytes(self.nbytes)}, owner on node {self.node[:8]}, "
            f"{self.processes} process{'es' * (self.processes != 1)}, made {made}"
            f"{f' by {self.loader}' if self.loader else ''}"
        )


def list_models(namespace: str | None = None) -> list[NamedModel]:
    """Return the named models of a namespace, sorted by name.

    Raises:
        TypeError: `namespace` is not a string.

    Example:
        >>> import torch
        >>> from ray_zerocopy.actor import prepare_model_for_actors
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(4, 2), name="small")
        >>> [(model.name, model.class_name, model.nbytes) for model in list_models() if model.name == "small"]
        [('small', 'Linear', 128)]
    """
    namespace = _checked("list_models", "-", namespace)
    session = current_session()
    if ray.util.client.ray.is_connected():  # Ray Client does not tell where objects are
        listed: list[NamedModel] = ray.get(ray.remote(num_cpus=0)(list_models).remote(namespace))
        return listed
    answers = []
    for named in sorted(ray.util.list_named_actors(all_namespaces=True), key=lambda named: str(named["name"])):
        if named["namespace"] != namespace:
            continue
        try:
            found = describe(namespace, named["name"], wait=False, timeout=ANSWER_SECONDS)
        except ModelTimeoutError:
            answers.append((named["name"], {"status": "no answer", "node": "", "detached": False}))
            continue
        except (ValueError, ray.exceptions.RayActorError):  # another actor; an owner that ended meanwhile
            continue
        if found is not None:
            answers.append((named["name"], found[1]))
    return [
        _named_model(namespace, name, answer, count)
        for (name, answer), count in zip(answers, _processes(namespace, answers, session), strict=True)
    ]


def _named_model(namespace: str, name: str, answer: dict[str, Any], processes: int) -> NamedModel:
    version = answer.get("version")
    if version is None:
        state = {"empty": "preparing"}.get(answer["status"], answer["status"])
        return NamedModel(name, namespace, state, "", 0, answer["node"], 0, 0.0, None, answer["detached"])
    return NamedModel(
        name,
        namespace,
        "ready",
        version["class_name"],
        version["nbytes"],
        version["node"],
        processes,
        version["created"],
        version["loader"],
        version["detached"],
    )


def _processes(namespace: str, answers: list[tuple[str, dict[str, Any]]], session: str) -> list[int]:
    """Return for each model how many processes have it mapped. Each node with an object counts its own."""
    counts = [0] * len(answers)
    by_node: dict[str, list[int]] = {}
    handles: dict[int, ModelRef] = {}
    for number, (name, answer) in enumerate(answers):
        try:
            handles[number] = named_handle(namespace, name, answer["version"], session, with_refs=True)
        except (KeyError, ZeroCopyError):  # not ready; of another version
            continue
        located = ray.experimental.get_object_locations(list(handles[number].refs))
        for node in {node for where in located.values() for node in where["node_ids"]}:
            by_node.setdefault(node, []).append(number)
    calls = []
    for node, numbers in by_node.items():
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(count_processes).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
        calls.append((numbers, task.remote([handles[number] for number in numbers])))
    for numbers, call in calls:
        with contextlib.suppress(ray.exceptions.RayError):  # the node died, or a model was removed meanwhile
            for number, count in zip(numbers, ray.get(call), strict=True):
                counts[number] += count
    return counts


def _checked(function: str, name: object, namespace: object) -> str:
    naming = naming_of(function, name, namespace, None, False, False, {})  # type: ignore[arg-type]
    if naming is None:
        raise TypeError(f"{function}() needs a name, not None.")
    return naming.namespace
