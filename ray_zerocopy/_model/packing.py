"""Tensors -> buffers: which bytes of each storage are kept, and at which offset of which buffer they go.

See Note [Storages, extents, buffers] in `layout.py`, which goes the other way.
"""

from __future__ import annotations

import ctypes
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .layout import ALIGNMENT, PACKED_BELOW, Layout, Slice, View, align

__all__ = ["Buffer", "Packed", "pack", "reachable_ranges"]


# More buffers than this make ray.get slow (4 ms per thousand): then only the largest stay alone.
MOST_BUFFERS = 1000
# A packed buffer holds at most this share of all bytes, or so many bytes if that is more: it is a copy in the
# driver for as long as it takes to put it into the store.
PACK_SHARE, PACK_AT_LEAST = 0.04, 4 << 20
# A storage is cut down to what is reachable if that is at most this share of it.
COMPACT_BELOW = 0.5
# Storages on a device get addresses of this part of the line, where no memory of the host lies.
_DEVICE_ADDRESSES = 1 << 64


class _OnDevice(NamedTuple):
    """Bytes of a storage that is not in host memory, from an offset on."""

    storage: torch.UntypedStorage
    offset: int

    def bytes(self, nbytes: int) -> torch.Tensor:
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage, self.offset, (nbytes,), (1,))


class Buffer(NamedTuple):
    """A buffer to be: one range of the source's memory, or many small ones with their places in the buffer."""

    nbytes: int
    parts: list[tuple[int, int, int]]
    """Place in the buffer, address, bytes."""
    owners: list[object]
    """What keeps the addresses good."""
    packed: bool
    on_device: dict[int, _OnDevice]
    """The parts that are on a device, by address."""

    @property
    def staged(self) -> bool:
        """Whether the bytes are in this process's memory only from `memory()` until what that returned goes."""
        return self.packed or bool(self.on_device)

    def memory(self) -> memoryview:
        """Return the bytes: a view of the source, or a fresh copy of small parts and of those on a device."""
        if not self.staged:
            ((_, address, nbytes),) = self.parts
            return _bytes_at(address, nbytes, self.owners)
        stage = np.zeros(self.nbytes, dtype=np.uint8).data
        for place, address, nbytes in self.parts:
            into = stage[place : place + nbytes]
            if address in self.on_device:
                # copy: the store is host memory
                torch.frombuffer(into, dtype=torch.uint8).copy_(self.on_device[address].bytes(nbytes))
            else:
                # copy: thousands of small buffers would cost every load more than packing costs once
                into[:] = _bytes_at(address, nbytes, None)
        return stage


class Packed(NamedTuple):
    """A layout, and the buffers that it speaks of."""

    layout: Layout
    buffers: list[Buffer]


class _Extent(NamedTuple):
    """Bytes at an address of this process; `owner` keeps them there."""

    address: int
    nbytes: int
    owner: object


def pack(tensors: Sequence[torch.Tensor], arrays: Sequence[pickle.PickleBuffer] = ()) -> Packed:
    """Lay out the storages under `tensors`, and `arrays`, in buffers.

    Every distinct storage is kept once. The buffers are views of the sources' own memory but for the small
    ones, which are packed when their bytes are asked for, and those on a device, which come to the host then.
    """
    owners, numbers, ranges = reachable_ranges(tensors)
    extents: list[_Extent] = []
    begins: list[int] = []
    on_device: dict[int, _OnDevice] = {}
    unused = _DEVICE_ADDRESSES
    for storage, (low, high) in zip(owners, ranges, strict=True):
        begins.append(low)
        address = storage.data_ptr() + low
        if not _on_host(storage):
            address, unused = unused, unused + align(high - low)
            on_device[address] = _OnDevice(storage, low)
        extents.append(_Extent(address, high - low, storage))
    for array in arrays:
        extents.append(_array_extent(array))

    slices, buffers = _fill(extents, on_device)
    users = Counter(numbers)
    views = [
        _view(tensor, number, begins[number], slices[number], users[number] == 1)
        for tensor, number in zip(tensors, numbers, strict=True)
    ]
    array_slices = [(piece, array.raw().readonly) for piece, array in zip(slices[len(owners) :], arrays, strict=True)]
    layout = Layout([b.nbytes for b in buffers], slices[: len(owners)], views, array_slices)
    return Packed(layout, buffers)


def reachable_ranges(
    tensors: Sequence[torch.Tensor],
) -> tuple[list[torch.UntypedStorage], list[int], list[tuple[int, int]]]:
    """Return the storages under `tensors`, the number of each tensor's, and the bytes to keep of each storage."""
    storages: dict[int, int] = {}
    owners: list[torch.UntypedStorage] = []
    spans: list[tuple[int, int, int]] = []
    numbers: list[int] = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        number = storages.setdefault(storage._cdata, len(owners))
        if number == len(owners):
            owners.append(storage)
            spans.append((storage.nbytes(), 0, 1))
        numbers.append(number)
        low, high = _reach(tensor)
        if high > low:
            known_low, known_high, align = spans[number]
            spans[number] = (min(low, known_low), max(high, known_high), max(align, tensor.element_size()))
    ranges = [
        _keep(storage.nbytes(), low, high, align) for storage, (low, high, align) in zip(owners, spans, strict=True)
    ]
    return owners, numbers, ranges


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the byte range of its storage that `tensor` can reach."""
    if tensor.numel() == 0:
        return 0, 0
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset())
    size = tensor.element_size()
    return begin * size, (begin + last + 1) * size


def _keep(nbytes: int, low: int, high: int, align: int) -> tuple[int, int]:
    """Return the range of a storage to keep: all of it, unless only a small part is reachable."""
    if high <= low:
        return 0, 0
    low -= low % math.lcm(align, ALIGNMENT)
    return (low, high) if high - low <= COMPACT_BELOW * nbytes else (0, nbytes)


def _on_host(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _array_extent(array: pickle.PickleBuffer) -> _Extent:
    raw = np.frombuffer(array.raw(), dtype=np.uint8)
    return _Extent(raw.__array_interface__["data"][0], raw.nbytes, (raw, array))


def _fill(extents: list[_Extent], on_device: dict[int, _OnDevice]) -> tuple[list[Slice], list[Buffer]]:
    """Merge extents that share bytes, give the large ones a buffer each and pack the others into few."""
    order = sorted((i for i, e in enumerate(extents) if e.nbytes), key=lambda i: extents[i].address)
    merged: list[tuple[int, int, list[int]]] = []
    for i in order:
        # From where malloc would align it, in the same allocation: elements stay aligned in the store.
        begin, end = extents[i].address // 16 * 16, extents[i].address + extents[i].nbytes
        if merged and begin < merged[-1][1]:
            known_begin, known_end, members = merged[-1]
            members.append(i)
            merged[-1] = (known_begin, max(known_end, end), members)
        else:
            merged.append((begin, end, [i]))

    large = sorted((begin - end, begin) for begin, end, _ in merged if end - begin >= PACKED_BELOW)
    alone = {begin for _, begin in large[:MOST_BUFFERS]}
    slices: list[Slice] = [(0, 0, 0)] * len(extents)
    buffers: list[Buffer] = []

    def place(begin: int, end: int, members: list[int], at: int) -> None:
        for i in members:
            slices[i] = (len(buffers), at + extents[i].address - begin, extents[i].nbytes)

    small = []
    for begin, end, members in merged:
        if begin not in alone:
            small.append((begin, end, members))
        else:
            place(begin, end, members, 0)
            owners = [extents[i].owner for i in members]
            there = {begin: on_device[begin]} if begin in on_device else {}
            buffers.append(Buffer(end - begin, [(0, begin, end - begin)], owners, False, there))

    most = max(PACK_AT_LEAST, int(PACK_SHARE * sum(end - begin for begin, end, _ in merged)))
    parts: list[tuple[int, int, int]] = []
    filled = 0
    for begin, end, members in small:
        if filled + end - begin > most and parts:
            buffers.append(Buffer(filled, parts, [extents], True, on_device))
            parts, filled = [], 0
        place(begin, end, members, filled)
        parts.append((filled, begin, end - begin))
        filled += align(end - begin)
    if parts:
        buffers.append(Buffer(filled, parts, [extents], True, on_device))
    return slices, buffers


def _bytes_at(address: int, nbytes: int, owner: object) -> memoryview:
    block = (ctypes.c_uint8 * nbytes).from_address(address)
    block.owner = owner  # type: ignore[attr-defined]
    return memoryview(block).cast("B")


def _view(tensor: torch.Tensor, number: int, begin: int, piece: Slice, alone: bool) -> View:
    size = tensor.element_size()
    offset = max(0, int(tensor.storage_offset()) - begin // size)  # of an empty tensor, anything
    shape, stride = tuple(tensor.shape), tensor.stride()
    elements = tensor.numel()
    whole = (
        alone
        and offset == 0
        and elements * size == piece[2] > 0
        and tensor.dtype in _FROM_BUFFER
        and stride == _contiguous_stride(shape)
    )
    parameter = isinstance(tensor, torch.nn.Parameter)
    flags = (parameter, tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
    return (number, elements if whole else 0, tensor.dtype, offset, shape, stride, *flags)


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# The dtypes that torch.frombuffer takes; any other goes through a byte view of the storage.
_FROM_BUFFER = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)
