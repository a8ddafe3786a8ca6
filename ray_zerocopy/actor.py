"""Share a model from the driver and load it in a worker: the functions for actors, replicas and tasks."""

from __future__ import annotations

from typing import Any

import ray

from . import _store
from ._device import DeviceLike, resolve
from ._store import Loaded, ModelRef

__all__ = ["load_model_in_actor", "prepare_model_for_actors"]


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
        TypeError: A part of `model` cannot be pickled; the message names its attribute path.
        ZeroCopyError: The store of this node is too small; nothing has been put.

    Example:
        >>> import torch
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(512, 512))
        >>> model_ref.nbytes
        1050624
    """
    return _store.put(model)


def load_model_in_actor(
    model_ref: ModelRef,
    device: DeviceLike = None,
    *,
    keep_flags: bool = False,
    require_isolation: bool = False,
) -> Any:
    """Return the model behind a handle, in any worker or in the driver, in milliseconds and without a copy.

    On the CPU the tensors are views of the store's pages, copy-on-write: reads are shared by all workers of the
    node, a write copies the 4 KiB page for the writer and nobody else sees it. The pages stay valid for as long
    as a tensor of the model lives. Each call gives a model of its own.

    Args:
        model_ref: What `prepare_model_for_actors` returned.
        device: `None` or `"auto"` for the GPU that Ray assigned to this worker, else the CPU; or a device as
            torch names it.
        keep_flags: Keep each module's train or eval mode and each tensor's `requires_grad` as the source had
            them. Otherwise the model is in eval mode and nothing requires a gradient.
        require_isolation: Raise where a private view cannot be had (no /proc, or the raylet is in another pid
            namespace), instead of warning once and sharing the pages for writing too.

    Returns:
        An object equal to the source bit for bit.

    Raises:
        TypeError: `model_ref` is not a handle.
        ModelLostError: The model is no longer in the store, or the handle is from another Ray session.
        ValueError: `device` is unknown, absent, or not assigned to this worker by Ray.
        ZeroCopyError: Isolation was required and cannot be had.

    Example:
        >>> import torch
        >>> model_ref = prepare_model_for_actors(torch.nn.Linear(2, 2).train())
        >>> load_model_in_actor(model_ref).training
        False
    """
    return load(model_ref, device, keep_flags=keep_flags, require_isolation=require_isolation).model


def load(
    model_ref: ModelRef, device: DeviceLike, *, keep_flags: bool = False, require_isolation: bool = False
) -> Loaded:
    """Load as `load_model_in_actor` does, and say how it went."""
    chosen = resolve(device, _assigned_gpus())
    return _store.get(model_ref, chosen, keep_flags=keep_flags, require_isolation=require_isolation)


def _assigned_gpus() -> list[str] | None:
    """Return the GPUs that Ray assigned to this worker, or None in a driver, to which it assigns nothing."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
