"""Share a model from the driver and load it in a worker: the functions for actors, replicas and tasks."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from ._device.choose import DeviceLike, resolve_device, set_current_device
from ._model import graph, paths
from ._model.aoti import CompiledModel, compile_model, compile_with
from ._model.imports import Import, check_imports, import_first
from ._model.layout import Layout, unpack, unpack_arrays
from ._model.packing import pack
from ._store.get import get, plain_torch_state
from ._store.publish import existing, naming_of, put_named
from ._store.put import CARRIED, put
from ._store.ref import Loaded, LoadOptions, ModelRef, WithoutIsolation, format_bytes
from ._store.waits import check_timeout
from .models import NamedModel, get_model, list_models, prepare_model_from, remove_model

__all__ = [
    "CompiledModel",
    "NamedModel",
    "PipelineSkeleton",
    "compile_model",
    "get_model",
    "list_models",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "prepare_model_for_actors",
    "prepare_model_from",
    "remove_model",
    "rewrite_pipeline_for_actors",
]

MODEL_TYPES = (torch.nn.Module, torch.jit.ScriptFunction, torch.export.ExportedProgram, CompiledModel)


def prepare_model_for_actors(
    model: object,
    *,
    name: str | None = None,
    namespace: str | None = None,
    lifetime: str | None = None,
    get_if_exists: bool = False,
    replace: bool = False,
    allow_meta: bool = False,
    imports: Iterable[str | ModuleType] = (),
    compile: bool | Mapping[str, Any] = False,
    **ray_options: Any,
) -> ModelRef:
    """Put a model's weights into Ray's object store, once, and return a small handle to pass to workers.

    The bytes are copied once, and the model is not changed. Quantize and cast before sharing: what a worker converts
    is private to that worker. The model stays in the store while this process runs and a handle exists. With a name,
    a Ray actor owns the model, which outlives its handles, and with `lifetime="detached"` also this process.

    Args:
        model: An `nn.Module`, or any other object with tensors. Numpy arrays inside it are shared like tensors.
        name: The name under which any process of the cluster finds the model: `get_model(name)`. A handle with a name
            can be pickled anywhere. `remove_model(name)` ends the model.
        namespace: The namespace of the name. By default models have a namespace of their own, `"ray_zerocopy"`.
        lifetime: `"detached"` for a model that outlives this process. By default it ends with the last handle here.
        get_if_exists: Return the model that has the name, if there is one. By default a taken name is an error.
        replace: Make this the next version of the name, for new loads. The store frees the old bytes when the last
            process drops its model.
        allow_meta: Share a model although some tensors have no values: those on the meta device and those of lazy
            modules that never ran. By default they are an error.
        imports: Modules (names) and shared libraries (paths) that a worker imports first. They register operators and
            pytree types. Those that the model uses are found without this option if torch knows who registered them.
        compile: Compile a `torch.export.ExportedProgram` here, once, so that no worker compiles. A mapping has
            options: `args`, `kwargs` and `dynamic_shapes` export an `nn.Module` first, as `torch.export.export` does.
            `fallback=True` lets a worker with another CPU, device or torch run the program without the compiled code.
            All others are options of inductor.
        ray_options: Options of the owner, as for a Ray actor: `num_cpus` (0 by default), `memory`, `resources`, ...
            By default the owner runs on this node if its store has room, else on the node with the most room.

    Returns:
        The handle.

    Raises:
        TypeError: A part of `model`, which the message names, cannot be pickled. Or `model` is not loaded: a name, a
            path, a class, None. Or an option does not exist. Or `compile` has no example inputs.
        ValueError: Tensors have no values here. Or the name is taken or empty. Or torch cannot export or compile.
        ZeroCopyError: No store has room for the model, and nothing was put. Or there is no C++ compiler.

    Example:
        >>> import torch
        >>> prepare_model_for_actors(torch.nn.Linear(512, 512)).nbytes
        1050624
    """
    naming = naming_of("prepare_model_for_actors", name, namespace, lifetime, get_if_exists, replace, ray_options)
    if naming is not None and compile and (there := existing(naming)) is not None:
        return there
    model = compile_with(model, compile)
    if naming is None:
        return put(model, allow_meta=allow_meta, imports=imports)
    return put_named(model, naming, ray_options, allow_meta=allow_meta, imports=imports)


def load_model_in_actor(
    model_ref: ModelRef,
    device: DeviceLike = None,
    *,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
    require_isolation: bool = False,
    page_lock: bool = False,
    timeout: float | None = None,
) -> Any:
    """Return the model behind a handle, in any worker or in the driver, in milliseconds and without a copy.

    On the CPU the tensors are copy-on-write views of the store's pages. All workers of the node share the pages for
    reading. A write copies the 4 KiB page for the writer, and no other process sees it. The pages stay valid while a
    tensor of the model lives. Each call returns a separate model.

    Args:
        model_ref: The handle, from `prepare_model_for_actors`, `prepare_model_from` or `get_model`.
        device: The device to load to. `None` and `"auto"` mean the GPU that Ray assigned to this worker, else the
            CPU. A device can also have torch's form (`"cuda"`, `"cuda:0"`, an index). A CUDA device becomes the
            current device of this thread.
        dtype: Convert floating-point tensors during the load, to float16, bfloat16, float32 or float64. On the CPU
            converted tensors are a private copy, so convert before sharing if you can.
        keep_flags: Keep the train or eval mode of each module and the `requires_grad` of each tensor. By default the
            model is in eval mode, and no tensor requires a gradient.
        require_isolation: Raise an error if no private view is possible (no /proc, or the raylet is in another pid
            namespace). By default the load then warns once, and writes reach other workers.
        page_lock: Page-lock the store's pages at the first load, while `model_ref` lives in this process, so that a
            CUDA device reads them directly. This is for workers that load the same model again and again: locking
            takes longer than one load gains.
        timeout: Seconds to wait for the bytes, which may come from another node, and for the owner of a named model.
            None waits without end. A wait of more than 30 s logs what it waits for.

    Returns:
        An object equal to the source bit for bit.

    Raises:
        TypeError: `model_ref` is not a handle.
        ModelLostError: The model is no longer in the store, or the handle is from another Ray session.
        ModelTimeoutError: The model did not arrive within `timeout`.
        ValueError: `device` is unknown or absent, or Ray did not assign it to this worker. Or `dtype` cannot be
            applied: to bytes of several dtypes, a quantized tensor, a subclass or TorchScript.
        ZeroCopyError: This worker cannot import a class, function or module of the model. Or isolation was required
            and is not possible. Or the device has too little memory left.

    Example:
        >>> import torch
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(2, 2).train())
        >>> load_model_in_actor(model_ref).training
        False
    """
    return load_one(
        model_ref,
        device,
        dtype=dtype,
        keep_flags=keep_flags,
        require_isolation=require_isolation,
        page_lock=page_lock,
        timeout=timeout,
    ).model


# ---------------------------------------------------------------- pipelines


class _Models(NamedTuple):
    """The shared part of a pipeline. Its skeleton has the same `token`."""

    token: str
    models: list[Any]
    tensors: list[torch.Tensor]
    arrays: list[Any]


@dataclass(frozen=True, eq=False)
class PipelineSkeleton:
    """A pipeline without its models. It is small and picklable; pass it to workers together with the `refs`.

    Attributes:
        class_name: The class of the pipeline.
        models: The paths of its models, such as `.encoder` or `.stages[0]`. Empty if it has only tensors.
    """

    class_name: str
    models: tuple[str, ...]
    _token: str
    _stream: bytes
    _rest: tuple[Layout, list[bytes]] | None
    _needs: tuple[list[Import], list[str]]

    def __repr__(self) -> str:
        rest = sum(map(len, self._rest[1])) if self._rest else 0
        size = format_bytes(len(self._stream) + rest)
        gone = ", ".join(path or "itself" for path in self.models) or "its tensors"
        return f"PipelineSkeleton({self.class_name} without {gone}; {size})"


def rewrite_pipeline_for_actors(
    pipeline: object,
    model_attr_names: Iterable[str] | None = None,
    *,
    name: str | None = None,
    namespace: str | None = None,
    lifetime: str | None = None,
    replace: bool = False,
    allow_meta: bool = False,
    imports: Iterable[str | ModuleType] = (),
    **ray_options: Any,
) -> tuple[PipelineSkeleton, ModelRef]:
    """Put the models of a pipeline into Ray's object store, and return the pipeline without them and a handle.

    A pipeline is any object that contains models: in attributes, slots, lists, dicts, nested objects, bound methods.
    Its other tensors and numpy arrays are shared too. The pipeline is not changed, and its properties are not run.

    Args:
        pipeline: The object, such as a Hugging Face `pipeline()`.
        model_attr_names: Share only these models, by path (`"encoder"`, `"stages[0].model"`). Each worker has a copy
            of everything else. By default everything with tensors is shared.
        name: As for `prepare_model_for_actors`. Keep the skeleton where the name is used: it fits these models only.
        namespace: As for `prepare_model_for_actors`.
        lifetime: As for `prepare_model_for_actors`.
        replace: As for `prepare_model_for_actors`.
        allow_meta: As for `prepare_model_for_actors`.
        imports: As for `prepare_model_for_actors`.
        ray_options: As for `prepare_model_for_actors`.

    Returns:
        The skeleton and the handle for `load_pipeline_in_actor`. All models have one handle: a model under two names
        is stored once, and tensors tied across models stay tied. If the pipeline also holds a part of a TorchScript
        module separately, the loaded pipeline does too.

    Raises:
        TypeError: A part cannot be pickled, or a name in `model_attr_names` is not a model.
        ValueError: The pipeline has neither models nor tensors, or lacks a model that is named. Or `name` is taken.
        ZeroCopyError: No store has room for the models. Nothing was put.

    Example:
        >>> import torch, types
        >>> pipeline = types.SimpleNamespace(encoder=torch.nn.Linear(4, 4), labels=["no", "yes"])
        >>> skeleton, refs = rewrite_pipeline_for_actors(pipeline)
        >>> skeleton.models
        ('.encoder',)
        >>> load_pipeline_in_actor(skeleton, refs).labels
        ['no', 'yes']
    """
    naming = naming_of("rewrite_pipeline_for_actors", name, namespace, lifetime, False, replace, ray_options)
    skeleton, shared = _divide(pipeline, model_attr_names, imports)
    try:
        label = f"models of {skeleton.class_name}"
        if naming is None:
            return skeleton, put(shared, label, allow_meta=allow_meta, root=pipeline, imports=imports)
        return skeleton, put_named(
            shared, naming, ray_options, label=label, allow_meta=allow_meta, root=pipeline, imports=imports
        )
    except TypeError:
        graph.take_apart(pipeline, leave_out=CARRIED)  # raises the same error, with the path from the pipeline
        raise


def _divide(
    pipeline: object, model_attr_names: Iterable[str] | None, imports: Iterable[str | ModuleType]
) -> tuple[PipelineSkeleton, _Models]:
    """Divide a pipeline into its skeleton and what is shared."""
    class_name = type(pipeline).__name__
    listed = check_imports(imports)
    found = find_models(pipeline)
    token = uuid.uuid4().hex
    rest = None
    if model_attr_names is None:
        parts = graph.take_apart(pipeline, leave_out=(*MODEL_TYPES, *CARRIED), imports=listed)
        shared = _Models(token, parts.carried, parts.tensors, [_as_array(array) for array in parts.arrays])
        kept = {id(model) for model in parts.carried}
        found = [(path, model) for path, model in found if id(model) in kept]  # a __getstate__ may drop some
        if not (any(isinstance(p, MODEL_TYPES) for p in parts.carried) or parts.tensors or parts.arrays):
            raise ValueError(
                f"{class_name} has no models in it to share, and no tensors. Pass any other object as it is."
            )
    else:
        found = _named(pipeline, model_attr_names, found)
        parts = graph.take_apart(pipeline, CARRIED, [model for _, model in found], imports=listed)
        shared = _Models(token, parts.carried, [], [])
        packed = pack(parts.tensors, parts.arrays)
        rest = (packed.layout, [bytes(buffer.memory()) for buffer in packed.buffers])  # copy: not to be shared
    needs = parts.imports, parts.operators
    skeleton = PipelineSkeleton(class_name, tuple(path for path, _ in found), token, parts.skeleton, rest, needs)
    return skeleton, shared


def load_pipeline_in_actor(
    skeleton: PipelineSkeleton,
    refs: ModelRef,
    device: DeviceLike = None,
    *,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
    require_isolation: bool = False,
    page_lock: bool = False,
    timeout: float | None = None,
) -> Any:
    """Return a pipeline with its models, in any worker. The models load as by `load_model_in_actor`.

    Args:
        skeleton: The pipeline without models, from `rewrite_pipeline_for_actors`.
        refs: The handle from the same call.
        device: As for `load_model_in_actor`. If the pipeline has a `device` attribute, as in Hugging Face, it is set.
        dtype: As for `load_model_in_actor`, for the models.
        keep_flags: As for `load_model_in_actor`.
        require_isolation: As for `load_model_in_actor`.
        page_lock: As for `load_model_in_actor`.
        timeout: As for `load_model_in_actor`.

    Returns:
        An object equal to the source, whose models are views of the store's pages.

    Raises:
        TypeError: `skeleton` and `refs` are not from one call of `rewrite_pipeline_for_actors`.
        ModelLostError, ValueError, ZeroCopyError: As for `load_model_in_actor`.
    """
    _check_skeleton(skeleton)
    loaded = load(
        refs,
        device,
        dtype=dtype,
        keep_flags=keep_flags,
        require_isolation=require_isolation,
        page_lock=page_lock,
        timeout=timeout,
    )
    if not isinstance(loaded.model, _Models) or loaded.model.token != skeleton._token:
        later = " The name has another version now." if refs.name else ""
        raise TypeError(
            f"{refs!r} and {skeleton!r} do not belong together.{later} Pass both from one call: skeleton, refs = "
            f"rewrite_pipeline_for_actors(pipeline)."
        )
    _, models, tensors, arrays = loaded.model
    import_first(skeleton.class_name, *skeleton._needs)
    with plain_torch_state():
        if skeleton._rest:
            layout, blocks = skeleton._rest
            buffers = [(bytearray(block), 0) for block in blocks]  # copy: model_attr_names asked for it
            tensors = unpack(layout, buffers, keep_flags=keep_flags)
            arrays = unpack_arrays(layout, buffers)
        pipeline, _ = graph.put_together(
            skeleton._stream, tensors, arrays, models, name=skeleton.class_name, keep_flags=keep_flags
        )
    set_device(pipeline, loaded.device)
    return pipeline


def _check_skeleton(skeleton: object) -> None:
    if not isinstance(skeleton, PipelineSkeleton):
        raise TypeError(
            f"a PipelineSkeleton is needed, not {type(skeleton).__module__}.{type(skeleton).__qualname__}. "
            f"Make one in the driver: skeleton, refs = rewrite_pipeline_for_actors(pipeline)."
        )


def set_device(pipeline: object, device: torch.device) -> None:
    """Set the `device` attribute of a pipeline, if it has one as in Hugging Face."""
    attributes = paths.attributes_of(pipeline)
    if isinstance(attributes.get("device"), torch.device):
        attributes["device"] = device


def find_models(pipeline: object) -> list[tuple[str, Any]]:
    """Return the models in an object with their paths, each model once, without the parts of models."""
    return [(path, part) for path, part in paths.walk(pipeline, stop_at=MODEL_TYPES) if isinstance(part, MODEL_TYPES)]


def _named(pipeline: object, names: Iterable[str], found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    there = f"Its models are: {', '.join(path.lstrip('.') for path, _ in found)}."
    chosen: dict[int, tuple[str, Any]] = {}
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"model_attr_names has {name!r}, which is not a name. {there}")
        path = name if name.startswith((".", "[")) else f".{name}"
        try:
            part = paths.follow(pipeline, path)
        except LookupError:
            raise ValueError(f"{type(pipeline).__name__} has no part '{name}'. {there}") from None
        if not isinstance(part, MODEL_TYPES):
            kind = type(part).__qualname__
            raise TypeError(f"'{name}' of {type(pipeline).__name__} is of type {kind}, not a model. {there}")
        chosen.setdefault(id(part), (path, part))
    if not chosen:
        raise ValueError(f"model_attr_names is empty. {there}")
    return list(chosen.values())


def _as_array(buffer: pickle.PickleBuffer) -> np.ndarray[Any, Any]:
    return np.frombuffer(buffer.raw(), dtype=np.uint8)


def load(
    model_ref: ModelRef,
    device: DeviceLike,
    *,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
    require_isolation: bool = False,
    without_isolation: WithoutIsolation = WithoutIsolation.SHARE,
    page_lock: bool = False,
    timeout: float | None = None,
) -> Loaded:
    """Load as `load_model_in_actor` does; return the model with facts about the load."""
    if require_isolation:
        without_isolation = WithoutIsolation.RAISE
    check_timeout(timeout)
    chosen = resolve_device(device, _assigned_gpus())
    set_current_device(chosen)
    return get(model_ref, LoadOptions(chosen, dtype, keep_flags, without_isolation, page_lock, timeout))


def load_one(model_ref: ModelRef, device: DeviceLike, **options: Any) -> Loaded:
    """Load a model as `load` does; raise TypeError if the handle is of a pipeline."""
    loaded = load(model_ref, device, **options)
    check_one(loaded.model, model_ref)
    return loaded


def check_one(model: Any, model_ref: ModelRef) -> None:
    """Raise TypeError if the loaded object is the shared part of a pipeline."""
    if isinstance(model, _Models):
        raise TypeError(
            f"{model_ref!r} is of a pipeline. Load it with load_pipeline_in_actor(skeleton, refs). To call its "
            f"models as tasks, rewrite the pipeline with rewrite_pipeline(pipeline)."
        )


def _assigned_gpus() -> list[str] | None:
    """Return the GPUs that Ray assigned to this worker, or None in a driver: Ray assigns it none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
