"""Load a model from the object store: one straight line from a handle to the loaded object."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.exceptions
import torch

from .._device.destination import Contents, destination_for
from .._model import gc_pause, graph
from .._model.imports import import_first
from .._model.layout import Layout, dtype_changes, unpack, unpack_arrays
from .._pages.limits import raise_if_exhausted, reached_limits
from .fetch import fetch
from .host import HostMemory
from .ref import Header, Loaded, LoadOptions, ModelRef

__all__ = ["get", "plain_torch_state", "rebuild"]


def get(model_ref: ModelRef, options: LoadOptions) -> Loaded:
    """Rebuild the model behind `model_ref`; see `actor.load_model_in_actor`."""
    try:
        return _get(model_ref, options)
    # Ray makes a RaySystemError of a MemoryError that it meets while it unpickles.
    except (MemoryError, ray.exceptions.RaySystemError) as error:
        if any(reached_limits(errno.ENOMEM, model_ref.nbytes)):
            exhausted = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            exhausted.__cause__ = error
            raise_if_exhausted(exhausted, model_ref.nbytes)
        raise


def _get(model_ref: ModelRef, options: LoadOptions) -> Loaded:
    begin = time.perf_counter()
    bodies, object_ids = fetch(model_ref, options.timeout)
    with plain_torch_state():
        header = Header.from_bytes(bodies[0]["header"])
        import_first(header.name, header.imports, header.operators)
        layout, dtype, keep_flags = header.layout, options.dtype, options.keep_flags
        changed = dtype_changes(layout, dtype, header.fixed_dtype)
        if dtype is not None and header.fixed_dtype_class:
            raise ValueError(
                f"dtype={dtype} cannot be applied to {model_ref!r}: it holds a "
                f"{header.fixed_dtype_class}, whose dtype is fixed. Convert the model before sharing it."
            )
        objects = [body["buffers"] for body in bodies]
        memory = HostMemory(objects, options.without_isolation, object_ids, model_ref.class_name)
        destination = destination_for(options.device, lock_key=model_ref if options.page_lock else None)
        with destination.place(Contents(layout, header.recurrent, changed, dtype), memory) as placed:
            tensors = unpack(
                layout, placed.buffers, pieces=placed.pieces, changed=changed, dtype=dtype, keep_flags=keep_flags
            )
            arrays = unpack_arrays(layout, placed.buffers)
            if placed.wait is not None and header.runs_constructors:
                placed.wait()
            model, importing = graph.put_together(
                header.skeleton,
                tensors,
                arrays,
                bodies[0]["carried"],
                name=header.name,
                keep_flags=keep_flags,
                wait=placed.wait,
            )
    seconds = time.perf_counter() - begin - importing
    shared, private = memory.shared - placed.replaced, memory.copied + placed.private
    return Loaded(model, options.device, seconds, importing, shared, private, memory.isolated)


def rebuild(
    layout: Layout,
    skeleton: bytes,
    buffers: list[tuple[Any, int]],
    carried: Sequence[object],
    arrived: Callable[[], None] | None = None,
    name: str = "the result",
) -> Any:
    """Rebuild an object over writable host buffers; see `graph.put_together`."""
    with plain_torch_state():
        tensors = unpack(layout, buffers)
        arrays = unpack_arrays(layout, buffers)
        return graph.put_together(skeleton, tensors, arrays, carried, name=name, wait=arrived)[0]


@contextlib.contextmanager
def plain_torch_state() -> Iterator[None]:
    """Turn off inference mode, gradients and the garbage collector.

    A tensor that is made in inference mode cannot be used for gradients later. A load makes thousands of small
    objects and no garbage, so a collection would only cost time.
    """
    with gc_pause.pause_gc(), torch.inference_mode(False), torch.no_grad():
        yield
