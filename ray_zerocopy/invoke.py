"""Call a shared model as a Ray task: the functions for calls from anywhere, without an actor."""

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
from ._task.call import RemoteCall, call_model, with_options
from ._task.standin import (
    LEFT_OUT,
    RESERVED_NAMES,
    RemoteMethod,
    RemoteModel,
    facts_of,
    first_dtype,
    generates,
    has_method,
    is_bound_method,
    is_eager_module,
)

__all__ = ["RemoteCall", "RemoteMethod", "RemoteModel", "call_model", "rewrite_pipeline"]


def rewrite_pipeline(
    pipeline: Any, method_names: str | Iterable[str] = ("__call__",), **ray_remote_options: Any
) -> Any:
    """Return a copy of a pipeline in which every model is a stand-in whose calls run as Ray tasks.

    The models go into Ray's object store once. The pipeline is not changed, and the copy shares nothing with it. Only
    the models run as tasks; everything else of the copy runs here.

    Args:
        pipeline: Any object with models in it (attributes, lists, dicts, nested objects), such as a Hugging Face
            `pipeline()`; or a model.
        method_names: The methods that can be called. Each model gets those that it has, and those of which the
            pipeline holds a bound method.
        ray_remote_options: Options of the tasks, as for `ray.remote`: `num_cpus`, `num_gpus`, `resources`,
            `runtime_env`, `max_retries`.

    Returns:
        An object of the same class. A `device` attribute, as Hugging Face has it, becomes the CPU. One model under
        two names is one stand-in, a `RemoteModel`.

    Raises:
        TypeError: A part cannot be pickled, or an item of `method_names` is not a string.
        ValueError: The pipeline has no models, no model has a named method, or Ray does not know an option.
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
    with_options(ray_remote_options)
    # A bound method of a model, kept by the pipeline, would take the stand-in for the model.
    held = [part for _, part in paths.walk(pipeline, stop_at=actor.MODEL_TYPES)]
    bound = [part for part in held if is_bound_method(part)]
    parts = graph.take_apart(pipeline, LEFT_OUT, bound, in_process=actor.MODEL_TYPES)
    models = [model for _, model in found]
    models += [part for part in parts.carried if isinstance(part, actor.MODEL_TYPES)]  # of functions: globals too
    models = list({id(model): model for model in models}.values())
    methods = _check_methods(models, method_names)
    script_methods = dict.fromkeys(part.name for part in held if isinstance(part, torch.ScriptMethod))
    path_of = {id(model): path for path, model in found}
    standins: dict[int, RemoteModel] = {}
    for tied in _group_tied(models):
        model_ref = _share(tied, name, path_of)
        for number, model in enumerate(tied):
            own = _methods_of(model, methods, script_methods, bound)
            standins[id(model)] = _standin(
                model, model_ref, number if len(tied) > 1 else None, own, ray_remote_options
            )
    return _put_together(parts, standins)


def _share(tied: list[Any], name: str, path_of: dict[int, str]) -> ModelRef:
    """Put models that share bytes into the store together; an error names their places in the pipeline `name`."""
    try:
        return put(tied[0]) if len(tied) == 1 else put(tuple(tied), name=f"models of {name}")
    except TypeError as error:
        where = ", ".join(f"{name}{path_of.get(id(model), '')}" for model in tied)
        raise TypeError(f"{where}: {error}") from error


def _methods_of(
    model: Any, methods: Iterable[str], script_methods: Iterable[str], bound: Iterable[types.MethodType]
) -> list[str]:
    """Return the methods of a model's stand-in: those asked for, and those that the pipeline holds as `bound`."""
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
    return RemoteModel(model_ref, part, kind, facts_of(model), first_dtype(model), tuple(methods), ray_remote_options)


def _put_together(parts: graph.Parts, standins: dict[int, RemoteModel]) -> Any:
    """Rebuild the pipeline here, with stand-ins in the places of its models."""
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
            raise TypeError(f"method_names has {name!r}, which is not a name. Give those of methods: ('__call__',).")
        if name != "__call__" and (hasattr(RemoteModel, name) or name in RESERVED_NAMES):
            raise ValueError(f"method_names: '{name}' has a meaning of its own on a stand-in and cannot be called.")
        if name.startswith("__") and name != "__call__":
            raise ValueError(f"method_names: '{name}' is looked up by Python itself, and cannot be called remotely.")
        if not any(has_method(model, name) for model in models):
            kinds = ", ".join(sorted({type(model).__name__ for model in models}))
            raise ValueError(f"method_names: no model has a method '{name}'. The models are of: {kinds}.")
    return names


def _group_tied(models: list[Any]) -> list[list[Any]]:
    """Group the models, in order, so that those which share a tensor's bytes are together."""
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
