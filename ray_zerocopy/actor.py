"""Share a model from the driver and load it in a worker: the functions for actors, replicas and tasks."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from ._device.choose import DeviceLike, resolve_device, set_current_device
from ._model import graph, paths
from ._model.layout import Layout, unpack, unpack_arrays
from ._model.packing import pack
from ._store.get import get, plain_torch_state
from ._store.put import CARRIED, put
from ._store.ref import Loaded, LoadOptions, ModelRef, format_bytes

__all__ = [
    "PipelineSkeleton",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "prepare_model_for_actors",
    "rewrite_pipeline_for_actors",
]

MODEL_TYPES = (torch.nn.Module, torch.jit.ScriptFunction, torch.export.ExportedProgram)


def prepare_model_for_actors(model: object) -> ModelRef:
    """Put a model's weights into Ray's object store, once, and return a small handle to pass to workers.

    The bytes are copied once, from the model straight into the store; the model is not changed and may be
    dropped afterwards. Quantize and cast before sharing: what a worker converts is private to it.

    Args:
        model: Any object with tensors in it that Ray can pickle: an `nn.Module`, a Hugging Face model, an
            object that holds several models. Arrays of numpy inside it are shared like tensors.

    Returns:
        The handle. The model stays in the store until the last copy of it goes, or the process that called
        this function ends.

    Raises:
        TypeError: A part of `model` cannot be pickled, and the message names its attribute path; or `model` is none
            yet: a name, a path, a class, None.
        ZeroCopyError: The store of this node is too small; nothing has been put.

    Example:
        >>> import torch
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(512, 512))
        >>> model_ref.nbytes
        1050624
    """
    return put(model)


def load_model_in_actor(
    model_ref: ModelRef,
    device: DeviceLike = None,
    *,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
    require_isolation: bool = False,
    page_lock: bool = False,
) -> Any:
    """Return the model behind a handle, in any worker or in the driver, in milliseconds and without a copy.

    On the CPU the tensors are views of the store's pages, copy-on-write: reads are shared by all workers of the
    node, a write copies the 4 KiB page for the writer and nobody else sees it. The pages stay valid for as long
    as a tensor of the model lives. Each call gives a model of its own.

    Args:
        model_ref: What `prepare_model_for_actors` returned.
        device: `None` or `"auto"` for the GPU that Ray assigned to this worker, else the CPU; or a device as
            torch names it (`"cuda"`, `"cuda:0"`, an index). A CUDA device becomes the current one of this thread.
        dtype: Convert the floating-point tensors on the way, to float16, bfloat16, float32 or float64. On the CPU
            what is converted is a copy of this process's own, so convert before sharing where you can.
        keep_flags: Keep each module's train or eval mode and each tensor's `requires_grad` as the source had
            them. Otherwise the model is in eval mode and nothing requires a gradient.
        require_isolation: Raise where a private view cannot be had (no /proc, or the raylet is in another pid
            namespace), instead of warning once and sharing the pages for writing too.
        page_lock: For workers that bring the same model to a CUDA device again and again: page-lock the store's
            pages at the first load, for as long as `model_ref` lives in this process, so that the device reads
            them itself. Locking takes longer than one load gains by it.

    Returns:
        An object equal to the source bit for bit.

    Raises:
        TypeError: `model_ref` is not a handle.
        ModelLostError: The model is no longer in the store, or the handle is from another Ray session.
        ValueError: `device` is unknown, absent, or not assigned to this worker by Ray; or `dtype` cannot be applied,
            because bytes are seen as several dtypes, or by a quantized tensor, a subclass or TorchScript.
        ZeroCopyError: Isolation was required and cannot be had; the device has too little memory left.

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
    ).model


# ---------------------------------------------------------------- pipelines


class _Models(NamedTuple):
    """What is shared of a pipeline; `token` says which skeleton it belongs to."""

    token: str
    models: list[Any]
    tensors: list[torch.Tensor]
    arrays: list[Any]


@dataclass(frozen=True, eq=False)
class PipelineSkeleton:
    """A pipeline without its models: small, picklable, to be passed to workers beside the `refs`.

    Attributes:
        class_name: The class of the pipeline.
        models: Where its models are in it, such as `.encoder` or `.stages[0]`; empty for one that has tensors only.
    """

    class_name: str
    models: tuple[str, ...]
    _token: str
    _stream: bytes
    _rest: tuple[Layout, list[bytes]] | None

    def __repr__(self) -> str:
        rest = sum(map(len, self._rest[1])) if self._rest else 0
        size = format_bytes(len(self._stream) + rest)
        gone = ", ".join(path or "itself" for path in self.models) or "its tensors"
        return f"PipelineSkeleton({self.class_name} without {gone}; {size})"


def rewrite_pipeline_for_actors(
    pipeline: object, model_attr_names: Iterable[str] | None = None
) -> tuple[PipelineSkeleton, ModelRef]:
    """Put the models of a pipeline into Ray's object store, and return the pipeline without them and a handle.

    A pipeline is any object with models in it, wherever they are: attributes, slots, lists, dicts, nested objects,
    bound methods of models. What tensors and numpy arrays it has beside its models, or in place of any, are shared
    with them. It is not changed, and none of its properties is run.

    Args:
        pipeline: The object, such as a Hugging Face `pipeline()`.
        model_attr_names: Share only the models of these names, as paths from the pipeline (`"encoder"`,
            `"stages[0].model"`); anything else travels in the skeleton, a copy for each worker. By default
            everything that has tensors is shared.

    Returns:
        The skeleton and the handle for `load_pipeline_in_actor`. One model under two names is stored once, and
        tensors tied across models stay tied, so all models are behind one handle. A part of a TorchScript module
        that is held separately as well stays that part.

    Raises:
        TypeError: A part cannot be pickled, or a name in `model_attr_names` is not a model.
        ValueError: The pipeline has neither models nor tensors, or a name in `model_attr_names` is not in it.
        ZeroCopyError: The store of this node is too small; nothing has been put.

    Example:
        >>> import torch, types
        >>> pipeline = types.SimpleNamespace(encoder=torch.nn.Linear(4, 4), labels=["no", "yes"])
        >>> skeleton, refs = rewrite_pipeline_for_actors(pipeline)
        >>> skeleton.models
        ('.encoder',)
        >>> load_pipeline_in_actor(skeleton, refs).labels
        ['no', 'yes']
    """
    name = type(pipeline).__name__
    found = find_models(pipeline)
    token = uuid.uuid4().hex
    rest = None
    if model_attr_names is None:
        parts = graph.take_apart(pipeline, leave_out=(*MODEL_TYPES, *CARRIED))
        shared = _Models(token, parts.carried, parts.tensors, [_as_array(array) for array in parts.arrays])
        kept = {id(model) for model in parts.carried}
        found = [(path, model) for path, model in found if id(model) in kept]  # a __getstate__ may drop some
        if not (any(isinstance(p, MODEL_TYPES) for p in parts.carried) or parts.tensors or parts.arrays):
            raise ValueError(
                f"{name} has no models in it to share, and no tensors. Any other object goes to workers as it is."
            )
    else:
        found = _named(pipeline, model_attr_names, found)
        parts = graph.take_apart(pipeline, CARRIED, [model for _, model in found])
        shared = _Models(token, parts.carried, [], [])
        packed = pack(parts.tensors, parts.arrays)
        rest = (packed.layout, [bytes(buffer.memory()) for buffer in packed.buffers])  # copy: not to be shared
    try:
        refs = put(shared, name=f"models of {name}")
    except TypeError:
        graph.take_apart(pipeline, leave_out=CARRIED)  # fails likewise, and says where in the pipeline
        raise
    return PipelineSkeleton(name, tuple(path for path, _ in found), token, parts.skeleton, rest), refs


def load_pipeline_in_actor(
    skeleton: PipelineSkeleton,
    refs: ModelRef,
    device: DeviceLike = None,
    *,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
    require_isolation: bool = False,
    page_lock: bool = False,
) -> Any:
    """Return the pipeline with its models, loaded as `load_model_in_actor` does, in any worker.

    Args:
        skeleton: The pipeline without models, from `rewrite_pipeline_for_actors`.
        refs: The handle that came with it.
        device: As for `load_model_in_actor`; a `device` attribute of the pipeline, as Hugging Face has it, follows.
        dtype: As for `load_model_in_actor`, for the models.
        keep_flags: As for `load_model_in_actor`.
        require_isolation: As for `load_model_in_actor`.
        page_lock: As for `load_model_in_actor`.

    Returns:
        An object equal to the source, whose models are views of the store's pages.

    Raises:
        TypeError: `skeleton` or `refs` is not what `rewrite_pipeline_for_actors` returned.
        ModelLostError, ValueError, ZeroCopyError: As for `load_model_in_actor`.
    """
    if not isinstance(skeleton, PipelineSkeleton):
        raise TypeError(
            f"a PipelineSkeleton is needed, not {type(skeleton).__module__}.{type(skeleton).__qualname__}. "
            f"Make one in the driver: skeleton, refs = rewrite_pipeline_for_actors(pipeline)."
        )
    loaded = load(
        refs, device, dtype=dtype, keep_flags=keep_flags, require_isolation=require_isolation, page_lock=page_lock
    )
    if not isinstance(loaded.model, _Models) or loaded.model.token != skeleton._token:
        raise TypeError(f"{refs!r} is not the handle that came with {skeleton!r}: both come from one call.")
    _, models, tensors, arrays = loaded.model
    with plain_torch_state():
        if skeleton._rest:
            layout, blocks = skeleton._rest
            buffers = [(bytearray(block), 0) for block in blocks]  # copy: model_attr_names asked for it
            tensors = unpack(layout, buffers, keep_flags=keep_flags)
            arrays = unpack_arrays(layout, buffers)
        pipeline, _ = graph.put_together(skeleton._stream, tensors, arrays, models, keep_flags=keep_flags)
    set_device(pipeline, loaded.device)
    return pipeline


def set_device(pipeline: object, device: torch.device) -> None:
    """Let a `device` attribute of a pipeline, as Hugging Face has it, follow its models."""
    attributes = paths.attributes_of(pipeline)
    if isinstance(attributes.get("device"), torch.device):
        attributes["device"] = device


def find_models(pipeline: object) -> list[tuple[str, Any]]:
    """Return the models in an object, each once, with the path that leads there; not the parts of a model."""
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
    page_lock: bool = False,
) -> Loaded:
    """Load as `load_model_in_actor` does, and say how it went."""
    chosen = resolve_device(device, _assigned_gpus())
    set_current_device(chosen)
    return get(model_ref, LoadOptions(chosen, dtype, keep_flags, require_isolation, page_lock))


def load_one(model_ref: ModelRef, device: DeviceLike, **options: Any) -> Loaded:
    """Load a model as `load` does; raise TypeError if the handle is of a pipeline."""
    loaded = load(model_ref, device, **options)
    check_one(loaded.model, model_ref)
    return loaded


def check_one(model: Any, model_ref: ModelRef) -> None:
    """Raise TypeError if what was loaded is what a pipeline shares."""
    if isinstance(model, _Models):
        raise TypeError(
            f"{model_ref!r} is of a pipeline: load it with load_pipeline_in_actor(skeleton, refs). Its models can be "
            f"called as tasks where the pipeline is rewritten by rewrite_pipeline(pipeline)."
        )


def _assigned_gpus() -> list[str] | None:
    """Return the GPUs that Ray assigned to this worker, or None in a driver, to which it assigns nothing."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
