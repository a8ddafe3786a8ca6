"""Tensors -> buffers: choose the bytes to keep of each storage, and their buffer and offset.

See Note [Storages, extents, buffers] in `layout.py`, which has the reverse direction.
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

__all__ = ["Buffer", "Packed", "freed_tensors", "pack", "reachable_ranges"]


# The largest number of separate buffers: ray.get takes 4 ms per thousand. Beyond it only the largest are separate.
MAX_BUFFERS = 1000
# A packed buffer holds at most this share of all bytes, or this many bytes if that is more. The driver holds a copy
# of a packed buffer until the store has it.
PACK_SHARE, PACK_AT_LEAST = 0.04, 4 << 20
# Only the reachable bytes of a storage are kept if they are at most this share of the storage.
COMPACT_BELOW = 0.5
# Storages on a device get addresses from here on, above all addresses of host memory.
_DEVICE_ADDRESSES = 1 << 64


class _DeviceBytes(NamedTuple):
    """The bytes of a storage on a device, from an offset on."""

    storage: torch.UntypedStorage
    offset: int

    def bytes(self, nbytes: int) -> torch.Tensor:
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage, self.offset, (nbytes,), (1,))


class Buffer(NamedTuple):
    """The source of a buffer: one range of memory, or many small ranges with their offsets in the buffer.

    Attributes:
        nbytes: The size of the buffer.
        parts: Offset in the buffer, address and number of bytes of each range.
        owners: The objects that keep the memory at the addresses alive.
        is_packed: Whether the buffer is made of small ranges.
        device_parts: The ranges on a device, by address.
    """

    nbytes: int
    parts: list[tuple[int, int, int]]
    owners: list[object]
    is_packed: bool
    device_parts: dict[int, _DeviceBytes]

    @property
    def is_staged(self) -> bool:
        """Whether `memory()` returns a copy, and not a view of the source."""
        return self.is_packed or bool(self.device_parts)

    def memory(self) -> memoryview:
        """Return the bytes: a view of the source, or a new copy of packed ranges and of ranges on a device."""
        if not self.is_staged:
            ((_, address, nbytes),) = self.parts
            return _bytes_at(address, nbytes, self.owners)
        stage = np.zeros(self.nbytes, dtype=np.uint8).data
        for place, address, nbytes in self.parts:
            into = stage[place : place + nbytes]
            if address in self.device_parts:
                # copy: the store is host memory
                torch.frombuffer(into, dtype=torch.uint8).copy_(self.device_parts[address].bytes(nbytes))
            else:
                # copy: thousands of small buffers would cost every load more than this copy costs once
                into[:] = _bytes_at(address, nbytes, None)
        return stage


class Packed(NamedTuple):
    """A layout and its buffers."""

    layout: Layout
    buffers: list[Buffer]


class _Extent(NamedTuple):
    """Bytes at an address of this process; `owner` keeps the memory alive."""

    address: int
    nbytes: int
    owner: object


def pack(tensors: Sequence[torch.Tensor], arrays: Sequence[pickle.PickleBuffer] = ()) -> Packed:
    """Arrange the storages of `tensors`, and `arrays`, in buffers. Every distinct storage is kept once.

    Copies nothing. A large buffer is a view of its source. `Buffer.memory` copies the ranges of a packed buffer, and
    the bytes on a device.
    """
    owners, numbers, ranges = reachable_ranges(tensors)
    extents: list[_Extent] = []
    begins: list[int] = []
    device_parts: dict[int, _DeviceBytes] = {}
    unused = _DEVICE_ADDRESSES
    for storage, (low, high) in zip(owners, ranges, strict=True):
        begins.append(low)
        address = storage.data_ptr() + low
        if not _on_host(storage):
            address, unused = unused, unused + align(high - low)
            device_parts[address] = _DeviceBytes(storage, low)
        extents.append(_Extent(address, high - low, storage))
    for array in arrays:
        extents.append(_array_extent(array))

    slices, buffers = _assign_buffers(extents, device_parts)
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
    """Return the storages of `tensors`, the number of each tensor's storage, and the bytes to keep of each."""
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
        low, high = _reachable_range(tensor)
        if high > low:
            known_low, known_high, align = spans[number]
            spans[number] = (min(low, known_low), max(high, known_high), max(align, tensor.element_size()))
    ranges = [
        _kept_range(storage.nbytes(), low, high, align)
        for storage, (low, high, align) in zip(owners, spans, strict=True)
    ]
    return owners, numbers, ranges


def freed_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors whose storage has fewer bytes than they reach, as after `untyped_storage().resize_(0)`."""
    return [tensor for tensor in tensors if _reachable_range(tensor)[1] > tensor.untyped_storage().nbytes()]


def _reachable_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the byte range of a tensor's storage that the tensor can reach."""
    if tensor.numel() == 0:
        return 0, 0
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset())
    size = tensor.element_size()
    return begin * size, (begin + last + 1) * size


def _kept_range(nbytes: int, low: int, high: int, align: int) -> tuple[int, int]:
    """Return the byte range of a storage to keep: all of it, unless only a small part is reachable."""
    if high <= low:
        return 0, 0
    low -= low % math.lcm(align, ALIGNMENT)
    return (low, high) if high - low <= COMPACT_BELOW * nbytes else (0, nbytes)


def _on_host(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _array_extent(array: pickle.PickleBuffer) -> _Extent:
    raw = np.frombuffer(array.raw(), dtype=np.uint8)
    return _Extent(raw.__array_interface__["data"][0], raw.nbytes, (raw, array))


def _assign_buffers(
    extents: list[_Extent], device_parts: dict[int, _DeviceBytes]
) -> tuple[list[Slice], list[Buffer]]:
    """Merge extents that share bytes, give each large one a separate buffer, and pack the others into few buffers."""
    order = sorted((i for i, e in enumerate(extents) if e.nbytes), key=lambda i: extents[i].address)
    merged: list[tuple[int, int, list[int]]] = []
    for i in order:
        # Rounded down to malloc's alignment, which is in the same allocation, so elements stay aligned in the store.
        begin, end = extents[i].address // 16 * 16, extents[i].address + extents[i].nbytes
        if merged and begin < merged[-1][1]:
            known_begin, known_end, members = merged[-1]
            members.append(i)
            merged[-1] = (known_begin, max(known_end, end), members)
        else:
            merged.append((begin, end, [i]))

    large = sorted((begin - end, begin) for begin, end, _ in merged if end - begin >= PACKED_BELOW)
    separate = {begin for _, begin in large[:MAX_BUFFERS]}
    slices: list[Slice] = [(0, 0, 0)] * len(extents)
    buffers: list[Buffer] = []

    def place(begin: int, members: list[int], offset: int) -> None:
        for i in members:
            slices[i] = (len(buffers), offset + extents[i].address - begin, extents[i].nbytes)

    small = []
    for begin, end, members in merged:
        if begin not in separate:
            small.append((begin, end, members))
        else:
            place(begin, members, 0)
            owners = [extents[i].owner for i in members]
            own_device_parts = {begin: device_parts[begin]} if begin in device_parts else {}
            buffers.append(Buffer(end - begin, [(0, begin, end - begin)], owners, False, own_device_parts))

    pack_limit = max(PACK_AT_LEAST, int(PACK_SHARE * sum(end - begin for begin, end, _ in merged)))
    parts: list[tuple[int, int, int]] = []
    filled = 0
    for begin, end, members in small:
        if filled + end - begin > pack_limit and parts:
            buffers.append(Buffer(filled, parts, [extents], True, device_parts))
            parts, filled = [], 0
        place(begin, members, filled)
        parts.append((filled, begin, end - begin))
        filled += align(end - begin)
    if parts:
        buffers.append(Buffer(filled, parts, [extents], True, device_parts))
    return slices, buffers


def _bytes_at(address: int, nbytes: int, owner: object) -> memoryview:
    block = (ctypes.c_uint8 * nbytes).from_address(address)
    block.owner = owner  # type: ignore[attr-defined]
    return memoryview(block).cast("B")


def _view(tensor: torch.Tensor, number: int, begin: int, piece: Slice, is_only_view: bool) -> View:
    size = tensor.element_size()
    offset = max(0, int(tensor.storage_offset()) - begin // size)  # an empty tensor may lie before the kept bytes
    shape, stride = tuple(tensor.shape), tensor.stride()
    elements = tensor.numel()
    whole = (
        is_only_view
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


# The dtypes that torch.frombuffer accepts. `unpack` makes tensors of other dtypes as views of bytes.
_FROM_BUFFER = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)
