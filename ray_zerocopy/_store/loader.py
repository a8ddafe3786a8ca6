"""Run a loader in a worker, and take its model apart there: `prepare_model_from`.

Note [Loaders]

    caller: driver or owner                         a worker beside the store
    task.remote(recipe)        -- one Ray task -->  load(), take the model apart
    report, ObjectRefs         <-- a stream ----    the report, then each object, put once

The caller owns what the task yields, so Ray's lineage runs the loader again if the node with the objects is lost. An
exception of the loader is part of the report, pickled: an owner never imports the classes of a user's exception.
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import ray
import ray.util.client
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .._model.imports import check_imports
from ..errors import ZeroCopyError, log
from .capacity import check_room, choose_node
from .lookup import loader_task, raise_loader_error
from .put import PackedModel, pack_model
from .ref import ModelRef, Origin, current_session, format_bytes
from .waits import seconds_of_silence

__all__ = ["SCHEDULING_OPTIONS", "check_options", "load_and_take_apart", "load_unnamed", "make_recipe"]


# Options of a Ray task or actor that say where it runs.
SCHEDULING_OPTIONS = frozenset(
    {
        "accelerator_type",
        "label_selector",
        "memory",
        "num_cpus",
        "num_gpus",
        "resources",
        "runtime_env",
        "scheduling_strategy",
    }
)
# A pickled loader travels with each call and is saved in Ray's key-value store.
_RECIPE_BYTES = 8 << 20
# Ray keeps smaller objects that a task yields out of the store.
_LARGE_ENOUGH = 101 << 10
# Seconds of a load that are worth a log line.
_LONG_LOAD = 3.0


# ---------------------------------------------------------------- in the worker


def load_and_take_apart(recipe: bytes) -> Iterator[Any]:
    """Run the loader; yield a report, and then the objects of its model."""
    options = pickle.loads(recipe)
    begin = time.perf_counter()
    where = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "loader": options["loader"]}
    try:
        packed = _load(options)
        check_room(packed.class_name, packed.nbytes + len(packed.header))
    except Exception as error:
        yield {"status": "failed", "text": traceback.format_exc(), "error": _pickled_error(error), **where}
        return
    seconds = time.perf_counter() - begin
    if seconds > _LONG_LOAD:
        log(f"{options['loader']} loaded {packed.class_name} ({format_bytes(packed.nbytes)}) in {seconds:.1f} s")
    yield {**packed.facts(), "status": "loaded", "seconds": seconds, **where}
    for body in packed.bodies():
        nbytes = sum(memoryview(buffer).nbytes for buffer in body["buffers"])
        if nbytes < _LARGE_ENOUGH:
            body["padding"] = pickle.PickleBuffer(bytearray(_LARGE_ENOUGH))
        yield body
        del body  # and with it what was packed


def _load(options: Mapping[str, Any]) -> PackedModel:
    load = ray.cloudpickle.loads(options["load"])
    model = load()
    if model is None or isinstance(model, (str, bytes, os.PathLike, type, ModelRef)):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(f"the loader {options['loader']} returned {given}. A loader returns the loaded model.")
    packed = pack_model(model, allow_meta=options["allow_meta"], imports=options["imports"])
    if not packed.nbytes and not isinstance(model, torch.nn.Module):
        raise TypeError(f"the loader {options['loader']} returned an object without tensors: {type(model).__name__}.")
    return packed


def _pickled_error(error: Exception) -> bytes | None:
    try:
        data: bytes = ray.cloudpickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data


# ---------------------------------------------------------------- in the driver


def make_recipe(
    load: Callable[[], Any],
    *,
    timeout: float | None,
    allow_meta: bool,
    imports: Iterable[str | ModuleType],
    options: Mapping[str, Any],
) -> bytes:
    """Return the pickled loader and its options, for `load_and_take_apart`.

    Raises TypeError for what is no loader, or cannot be pickled; ValueError for one that carries too many bytes.
    """
    name = _describe_loader(load)
    try:
        pickled = ray.cloudpickle.dumps(load)
    except Exception as error:
        raise TypeError(f"the loader {name} cannot be sent to a worker: {type(error).__name__}: {error}") from error
    if len(pickled) > _RECIPE_BYTES:
        raise ValueError(
            f"the loader {name} carries {format_bytes(len(pickled))} of data; {format_bytes(_RECIPE_BYTES)} are the "
            f"limit. Let it read the data where it runs: functools.partial(torch.load, path)."
        )
    node = None if _says_where(options) else choose_node()
    if node is not None:
        options = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True), **options}
    recipe = {
        "load": pickled,
        "loader": name,
        "allow_meta": allow_meta,
        "imports": [item.name for item in check_imports(imports)],
        "timeout": timeout,
        "node": node,
        # Pickled apart: the owner needs the other entries without unpickling a user's runtime_env.
        "task_options": ray.cloudpickle.dumps({"num_cpus": 0, "name": f"load:{name}", **options}),
    }
    return pickle.dumps(recipe)


def check_options(options: Mapping[str, Any], function: str) -> None:
    """Raise TypeError for an option that is not one of `SCHEDULING_OPTIONS`, or of a loader's task."""
    known_options = SCHEDULING_OPTIONS | {"max_retries"} if function == "prepare_model_from" else SCHEDULING_OPTIONS
    for option in options:
        if option not in known_options:
            known = ", ".join(sorted(known_options))
            raise TypeError(
                f"{function}() has no option {option!r}. The options that it passes on to Ray are: {known}."
            )


def _says_where(options: Mapping[str, Any]) -> bool:
    choices = ("scheduling_strategy", "resources", "label_selector", "accelerator_type", "num_gpus")
    return any(options.get(option) for option in choices)


def _describe_loader(load: Callable[[], Any]) -> str:
    if isinstance(load, (torch.nn.Module, torch.jit.ScriptFunction)):
        raise TypeError(
            f"a {type(load).__name__} was given where a function that loads a model is needed. For a model that is "
            f"loaded: prepare_model_for_actors(model)."
        )
    if not callable(load):
        raise TypeError(
            f"prepare_model_from needs a function without arguments that returns a model, not {load!r}. For example: "
            f"functools.partial(torch.load, path, weights_only=False)."
        )
    function, inner = load, ""
    while isinstance(function, functools.partial):
        given = [repr(value) for value in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        inner, function = ", ".join(filter(None, [*given, inner])), function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    text = f"{name}({inner if len(inner) <= 80 else inner[:77] + '...'})"
    try:
        inspect.signature(load).bind()
    except TypeError as error:
        raise TypeError(
            f"the loader {name} is called without arguments, but: {error}. Use functools.partial."
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    return text


def load_unnamed(recipe: bytes) -> ModelRef:
    """Run a loader in a task of this process, which so owns the objects; return the handle."""
    options = pickle.loads(recipe)
    session = current_session()
    if ray.util.client.ray.is_connected():
        raise ZeroCopyError(
            "prepare_model_from(load) without a name does not work through Ray Client, which cannot stream the "
            'objects. Name the model: prepare_model_from(load, name="...").'
        )
    task = loader_task().options(**pickle.loads(options["task_options"]))
    generator = task.remote(recipe)
    begin = time.monotonic()
    refs: list[ray.ObjectRef] = []
    while True:
        left = seconds_of_silence(begin, options["timeout"])
        if left <= 0:
            ray.cancel(generator, force=True)
            raise_loader_error({"status": "late", "seconds": options["timeout"]}, options["loader"])
        ready, _ = ray.wait([generator], timeout=left)
        if not ready:
            log(f"the loader {options['loader']} has not returned for {time.monotonic() - begin:.0f} s")
            continue
        try:
            refs.append(next(generator))
        except StopIteration:
            break
    try:
        report = ray.get(refs[0])
        if report["status"] == "loaded" and len(refs) != report["objects"] + 1:
            ray.get(refs[-1])  # raises what ended the task
    except ray.exceptions.RayError as error:
        report = {"status": "died", "text": str(error)}
    if report["status"] != "loaded":
        raise_loader_error(report, options["loader"])
    facts = (report["class_name"], report["nbytes"], report["carried_nbytes"], report["tensors"])
    context = ray.get_runtime_context()
    origin = Origin("loader", context.get_node_id(), os.getpid())
    return ModelRef(*facts, tuple(refs[1:]), session, origin=origin)
