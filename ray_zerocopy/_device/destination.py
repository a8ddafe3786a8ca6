"""Where a load puts a model's storages: host memory, a CUDA device, or another device.

Each destination has one method, `place`. It takes the contents of a model (layout, RNNs, dtype conversion) and the
bytes in host memory, and returns a flat tensor for each storage. `_store` uses no other part of this package's rooms
for devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .._model.layout import Layout, storage_dtypes, storage_over
from .cuda import Engine, Recurrent
from .page_lock import page_lock_of
from .placement import Block, place_storages
from .ring import ring_of
from .upload import Source, Upload, divide

__all__ = ["Contents", "Destination", "HostMemory", "Placed", "destination_for"]


class Contents(NamedTuple):
    """The contents of a model.

    Attributes:
        layout: Where each tensor's bytes are in the buffers.
        recurrent: For each RNN, the numbers of its weights, and its settings.
        changed: The storages to convert to `dtype`: number and present dtype.
        dtype: The dtype to convert to, or None.
    """

    layout: Layout
    recurrent: Sequence[tuple[tuple[int, ...], tuple[Any, ...]]]
    changed: dict[int, torch.dtype]
    dtype: torch.dtype | None


class HostMemory(Protocol):
    """A model's bytes in host memory, as a destination sees them."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The addresses at which each object begins and ends."""

    @property
    def objects(self) -> Sequence[object]:
        """The objects that keep these addresses valid."""

    def private_buffers(self) -> list[tuple[Any, int]]:
        """Return writable memory for each buffer, copy-on-write, and the offset at which the buffer begins."""

    def shared_buffers(self) -> list[tuple[Any, int]]:
        """Return the store's memory for each buffer, and the offset of the buffer. It must not be written to."""

    def open_sources(self) -> AbstractContextManager[list[Source]]:
        """Open the files behind the buffers for the length of a `with` block. A buffer may have no file."""


@dataclass
class Placed:
    """Storages at their destination.

    Attributes:
        buffers: Host memory of each buffer, and the offset in it.
        pieces: A flat tensor for each storage. Empty if tensors are views of `buffers`.
        wait: Waits until all bytes have arrived. None if they have.
        private: Bytes that only this process has.
        replaced: The part of `private` that replaces shared bytes, because of a conversion.
    """

    buffers: list[tuple[Any, int]]
    pieces: list[torch.Tensor]
    wait: Callable[[], None] | None = None
    private: int = 0
    replaced: int = 0

    def count_private(self, numbers: Collection[int]) -> None:
        """Count the storages with these numbers as private, each distinct storage once."""
        storages = (self.pieces[number].untyped_storage() for number in numbers)
        self.private = sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Destination(Protocol):
    """A place for storages."""

    def place(self, contents: Contents, memory: HostMemory) -> AbstractContextManager[Placed]:
        """Place the storages. After the `with` block no copy is in progress."""


class _Host:
    """Host memory: tensors are views of the private view, and only converted storages are new."""

    @contextlib.contextmanager
    def place(self, contents: Contents, memory: HostMemory) -> Iterator[Placed]:
        buffers = memory.private_buffers()
        placed = Placed(buffers, [])
        if contents.changed:
            placed.pieces = _flat_tensors(contents, buffers)
            placed.count_private(contents.changed)
            placed.replaced = sum(contents.layout.storages[number][2] for number in contents.changed)
        yield placed


class _Other:
    """A device that torch copies to storage by storage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def place(self, contents: Contents, memory: HostMemory) -> Iterator[Placed]:
        # Reads the shared pages. A copy from the private view could make private pages.
        pieces = _flat_tensors(contents, memory.shared_buffers())
        pieces = [piece.to(self.device) for piece in pieces]  # copy: a device has memory of its own
        placed = Placed(_buffers_for_arrays(contents, memory), pieces)
        placed.count_private(range(len(pieces)))
        yield placed


class _Cuda:
    """A CUDA device: one flat allocation, and one block for each RNN; see Note [The way to a CUDA device]."""

    def __init__(self, device: torch.device, lock_key: object | None) -> None:
        self.device = device
        self.lock_key = lock_key

    @contextlib.contextmanager
    def place(self, contents: Contents, memory: HostMemory) -> Iterator[Placed]:
        buffers = _buffers_for_arrays(contents, memory)
        layout, _, changed, dtype = contents
        ring = ring_of(self.device)
        allocated = _recurrent_blocks(contents, ring.engine)
        placement = place_storages(layout, changed, dtype, [block for block, _ in allocated])
        blocks = [(begin, tensor) for begin, (_, tensor) in zip(placement.blocks, allocated, strict=True)]
        with memory.open_sources() as sources:
            locked = None
            if self.lock_key is not None:
                locked = page_lock_of(self.lock_key, self.device, memory.ranges, memory.objects)
            with Upload(placement.spans, placement.nbytes, sources, ring, blocks=blocks, locked=locked) as upload:
                dtypes = storage_dtypes(layout, changed, dtype)
                pieces = divide(upload.arena, placement.storages, dtypes, blocks)
                placed = Placed(buffers, pieces, upload.wait)
                placed.count_private(range(len(pieces)))
                yield placed


def destination_for(device: torch.device, lock_key: object | None = None) -> Destination:
    """Return the destination for a device.

    With a `lock_key`, the host memory is page-locked for the device until that object is deleted.
    """
    if device.type == "cpu":
        return _Host()
    return _Cuda(device, lock_key) if device.type == "cuda" else _Other(device)


def _buffers_for_arrays(contents: Contents, memory: HostMemory) -> list[tuple[Any, int]]:
    """Return the private buffers if the model has numpy arrays, which stay on the host."""
    return memory.private_buffers() if contents.layout.arrays else []


def _flat_tensors(contents: Contents, buffers: Sequence[tuple[Any, int]]) -> list[torch.Tensor]:
    """Return a flat tensor for each storage over its buffer. Storages in `contents.changed` are converted."""
    pieces = []
    for number, piece in enumerate(contents.layout.storages):
        dtype = contents.changed.get(number, torch.uint8)
        flat = torch.empty(0, dtype=dtype, device="cpu")
        flat.set_(storage_over(piece, buffers), 0, (piece[2] // dtype.itemsize,), (1,))
        pieces.append(
            flat.to(contents.dtype) if number in contents.changed else flat
        )  # copy: another dtype has other bytes
    return pieces


def _recurrent_blocks(contents: Contents, engine: Engine) -> list[tuple[Block, torch.Tensor]]:
    """Return an allocation for the weights of each RNN for which the device needs a certain order."""
    found = []
    layout, recurrent, changed, dtype = contents
    for weights, settings in recurrent:
        views = [layout.views[weight] for weight in weights]
        dtypes = [dtype if dtype is not None and view[0] in changed else view[2] for view in views]
        if len(set(dtypes)) > 1:
            continue
        allocated = engine.recurrent([view[4] for view in views], dtypes[0], Recurrent(*settings))
        if allocated is not None:
            tensor, places = allocated
            storages = (view[0] for view in views)
            found.append((Block(len(tensor), dict(zip(storages, places, strict=True))), tensor))
    return found
