"""The object store -> a model: one straight line from a handle to the loaded object."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .._device.destination import Contents, destination_for
from .._model import gc_pause, graph
from .._model.layout import Layout, dtype_changes, unpack, unpack_arrays
from .host import HostMemory, fetch
from .ref import Header, Loaded, LoadOptions, ModelRef, check

__all__ = ["get", "plain_torch_state", "rebuild"]


def get(model_ref: ModelRef, options: LoadOptions) -> Loaded:
    """Rebuild the model behind `model_ref`; see `actor.load_model_in_actor`."""
    begin = time.perf_counter()
    check(model_ref)
    bodies = fetch(model_ref)
    with plain_torch_state():
        header = Header.from_bytes(bodies[0]["header"])
        layout, dtype, keep_flags = header.layout, options.dtype, options.keep_flags
        changed = dtype_changes(layout, dtype)
        if dtype is not None and header.composed:
            raise ValueError(
                f"dtype={dtype} cannot be applied to {model_ref!r}: it holds a {header.composed}, which knows its "
                f"dtype by itself. Convert the model before sharing it."
            )
        memory = HostMemory([body["buffers"] for body in bodies], options.require_isolation)
        destination = destination_for(options.device, lock_key=model_ref if options.page_lock else None)
        with destination.place(Contents(layout, header.recurrent, changed, dtype), memory) as placed:
            tensors = unpack(
                layout, placed.buffers, pieces=placed.pieces, changed=changed, dtype=dtype, keep_flags=keep_flags
            )
            arrays = unpack_arrays(layout, placed.buffers)
            if placed.wait is not None and header.constructs:
                placed.wait()
            model, importing = graph.put_together(
                header.skeleton, tensors, arrays, bodies[0]["carried"], keep_flags=keep_flags, arrived=placed.wait
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
) -> Any:
    """Put an object together over writable host buffers; see `graph.put_together`."""
    with plain_torch_state():
        tensors = unpack(layout, buffers)
        arrays = unpack_arrays(layout, buffers)
        return graph.put_together(skeleton, tensors, arrays, carried, arrived=arrived)[0]


@contextlib.contextmanager
def plain_torch_state() -> Iterator[None]:
    """Build outside inference mode and without gradients; the garbage collector waits.

    A tensor that is made in inference mode refuses what users do with it later. A load makes thousands of small
    objects and no garbage.
    """
    with gc_pause.gc_paused(), torch.inference_mode(False), torch.no_grad():
        yield
