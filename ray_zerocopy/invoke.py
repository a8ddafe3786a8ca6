"""Call a shared model as a Ray task, from a driver, a task or an actor."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils import parametrize

from . import actor
from ._model import graph, paths, tensors
from ._model.layout import unpack, unpack_arrays
from ._model.packing import pack
from ._store.put import put
from ._store.ref import ModelRef
from ._task.call import RemoteCall, call_model, check_pipeline_options
from ._task.standin import (
    LEFT_OUT,
    RESERVED_NAMES,
    RemoteMethod,
    RemoteModel,
    dtype_of,
    facts_of,
    generates,
    has_method,
    is_bound_method,
    is_eager_module,
)
from ._task.weightless import Weightless

__all__ = ["RemoteCall", "RemoteMethod", "RemoteModel", "call_model", "rewrite_pipeline"]


def rewrite_pipeline(
    pipeline: Any,
    method_names: str | Iterable[str] = ("__call__",),
    *,
    allow_meta: bool = False,
    imports: Iterable[str | types.ModuleType] = (),
    **ray_remote_options: Any,
) -> Any:
    """Return a copy of a pipeline in which every model is a stand-in whose calls run as Ray tasks.

    The models go into Ray's object store once. The pipeline is not changed, and the copy shares nothing with it. The
    models run as tasks. The rest of the copy runs in this process.

    Args:
        pipeline: An object with models in it (attributes, lists, dicts, nested objects), such as a Hugging Face
            `pipeline()`, or a model.
        method_names: The methods that can be called. Each stand-in gets those that its model has. Bound methods of
            models that the pipeline holds can be called too.
        allow_meta: Share models although some tensors have no values, as in `actor.prepare_model_for_actors`.
        imports: Modules and shared libraries to import first, as for `actor.prepare_model_for_actors`.
        ray_remote_options: Options of the tasks, as in `call_model.options`: `num_cpus`, `num_gpus`, `resources`,
            `runtime_env`, `max_retries`, `inference_mode`, `require_isolation`.

    Returns:
        An object of the same class, with a `RemoteModel` in the place of each model. One model under two names is
        one stand-in. A `device` attribute, as in Hugging Face's pipelines, becomes the CPU.

    Raises:
        TypeError: A part cannot be pickled, or an item of `method_names` is not a string.
        ValueError: The pipeline has no models, no model has a named method, tensors of a model have no values, or Ray
            does not know an option.
        ZeroCopyError: The store of this node is too small.

    Example:
        >>> import torch, types
        >>> pipeline = types.SimpleNamespace(model=torch.nn.Linear(4, 2), labels=["no", "yes"])
        >>> rewritten = rewrite_pipeline(pipeline)
        >>> rewritten.model
        RemoteModel(Linear)
        >>> rewritten.model(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """
    name = type(pipeline).__name__
    found = actor.find_models(pipeline)
    if not found:
        raise ValueError(f"{name} holds no models to call remotely. Its class and globals are not searched.")
    check_pipeline_options(ray_remote_options)
    return _with_standins(pipeline, found, method_names, ray_remote_options, allow_meta=allow_meta, imports=imports)


def _with_standins(
    pipeline: Any,
    found: list[tuple[str, Any]],
    method_names: str | Iterable[str],
    ray_remote_options: dict[str, Any],
    **options: Any,
) -> Any:
    """Share the models that were found, and return the copy with stand-ins."""
    # A bound method of a model that the pipeline holds must be bound to the stand-in.
    held = [part for _, part in paths.walk(pipeline, stop_at=actor.MODEL_TYPES)]
    bound = [part for part in held if is_bound_method(part)]
    parts = graph.take_apart(pipeline, LEFT_OUT, bound, local_model_types=actor.MODEL_TYPES)
    models = [model for _, model in found]
    models += [
        part for part in parts.carried if isinstance(part, actor.MODEL_TYPES)
    ]  # also those in closures and globals of functions
    models = list({id(model): model for model in models}.values())
    methods = _check_methods(models, method_names)
    script_methods = dict.fromkeys(part.name for part in held if isinstance(part, torch.ScriptMethod))
    path_of = {id(model): path for path, model in found}
    standins: dict[int, RemoteModel] = {}
    for tied in _group_tied(models):
        model_ref = _share(tied, type(pipeline).__name__, path_of, **options)
        for number, model in enumerate(tied):
            own = _methods_of(model, methods, script_methods, bound)
            standins[id(model)] = _standin(
                model, model_ref, number if len(tied) > 1 else None, own, ray_remote_options
            )
    return _put_together(parts, standins)


def _share(tied: list[Any], name: str, path_of: dict[int, str], **options: Any) -> ModelRef:
    """Put models that share bytes into the store together. Errors name their paths in the pipeline `name`."""
    try:
        if len(tied) == 1:
            return put(tied[0], **options)
        return put(tuple(tied), label=f"models of {name}", **options)
    except (TypeError, ValueError) as error:
        where = ", ".join(f"{name}{path_of.get(id(model), '')}" for model in tied)
        raise type(error)(f"{where}: {error}") from error


def _methods_of(
    model: Any, methods: Iterable[str], script_methods: Iterable[str], bound: Iterable[types.MethodType]
) -> list[str]:
    """Return the methods of a model's stand-in: those in `methods`, and those that the pipeline holds as `bound`."""
    own = [method for method in methods if has_method(model, method)]
    if "__call__" in own and isinstance(model, torch.nn.Module):
        own += ["forward", *["generate"] * generates(model)]
    if isinstance(model, torch.jit.ScriptModule):
        own += [method for method in script_methods if method not in own and has_method(model, method)]
    own += [method.__name__ for method in bound if method.__self__ is model]
    return list(dict.fromkeys(own))


def _standin(
    model: Any, model_ref: ModelRef, part: int | None, methods: list[str], ray_remote_options: dict[str, Any]
) -> RemoteModel:
    kind = parametrize.type_before_parametrizations(model) if is_eager_module(model) else type(model)
    weightless = Weightless.copy_of(model, f"RemoteModel({kind.__name__})")
    facts, dtype = facts_of(model, weightless), dtype_of(model, weightless)
    return RemoteModel(model_ref, part, kind, facts, weightless, dtype, tuple(methods), ray_remote_options)


def _put_together(parts: graph.Parts, standins: dict[int, RemoteModel]) -> Any:
    """Rebuild the pipeline in this process, with stand-ins in the places of its models."""
    packed = pack(parts.tensors, parts.arrays)
    memory = [(bytearray(buffer.memory()), 0) for buffer in packed.buffers]  # copy: the source keeps its bytes
    filled = unpack(packed.layout, memory, keep_flags=True)
    arrays = unpack_arrays(packed.layout, memory)
    carried = [
        RemoteMethod(standins[id(part.__self__)], part.__name__)
        if is_bound_method(part)
        else standins.get(id(part), part)
        for part in parts.carried
    ]
    rewritten, _ = graph.put_together(parts.skeleton, filled, arrays, carried, keep_flags=True)
    actor.set_device(rewritten, torch.device("cpu"))
    return rewritten


def _check_methods(models: list[Any], names: str | Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"method_names has {name!r}, which is not a name. Give names of methods: ('__call__',).")
        if name != "__call__" and (hasattr(RemoteModel, name) or name in RESERVED_NAMES):
            raise ValueError(f"method_names: '{name}' is an attribute of every stand-in, so it cannot be a method.")
        if name.startswith("__") and name != "__call__":
            raise ValueError(f"method_names: Python looks '{name}' up in the class, so it cannot be called remotely.")
        if not any(has_method(model, name) for model in models):
            kinds = ", ".join(sorted({type(model).__name__ for model in models}))
            raise ValueError(f"method_names: no model has a method '{name}'. The classes of the models are: {kinds}.")
    return names


def _group_tied(models: list[Any]) -> list[list[Any]]:
    """Return groups of models that share a tensor's bytes, in order."""
    groups: list[tuple[set[int], list[Any]]] = []
    for model in models:
        storages = {
            part.untyped_storage()._cdata
            for _, tensor in paths.walk(model)
            if isinstance(tensor, torch.Tensor)
            for part in tensors.components(tensor)
        }
        members = [model]
        for group in [group for group in groups if group[0] & storages]:
            groups.remove(group)
            storages |= group[0]
            members = group[1] + members
        groups.append((storages, members))
    return [members for _, members in groups]
