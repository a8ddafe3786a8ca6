r"""Tensors <-> a few buffers and a layout. Knows torch and numpy, no Ray.

Note [Storages, extents, buffers]

Tensors are views of storages; storages are bytes at an address; and two storages may even share bytes (two
`torch.from_numpy` of one array). The way from one to the other, for the bytes of one model::

    storages       |== A: 9 MiB ==|  |= B =|  |= C: only 1 KiB of 1 GiB is reachable ... =|
                          |             |          |
    extents        [======A=======]  [==B==]  [c]          what must be kept of each; overlaps merge
                          |              \     /
    buffers        [======A=======]     [==B==|c|...]      a big one goes as it is, small ones are packed

`unpack` goes back: every source storage becomes a torch storage of its own over its slice of a buffer, because
`torch.save`, `deepcopy`, safetensors and Hugging Face all tell ties, and sizes, by storage. On a device, or with
another dtype, `arrange` says first where each storage is to lie there.
"""

from __future__ import annotations

import ctypes
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = [
    "ALIGNMENT",
    "BUFFER_ALONE",
    "Block",
    "Layout",
    "Packed",
    "Placement",
    "Slice",
    "Span",
    "View",
    "alone",
    "arrange",
    "casts",
    "host_pieces",
    "kinds",
    "pack",
    "reachable",
    "unpack",
    "unpack_arrays",
]

ALIGNMENT = 64
# Bytes from which an extent is a buffer of its own, and so is not copied before the store copies it. Each
# buffer costs a load about 3 us; each packed byte costs the driver a byte of heap while preparing.
BUFFER_ALONE = 64 * 1024
# More buffers than this make ray.get slow (4 ms per thousand): then only the largest stay alone.
MOST_BUFFERS = 1000
# A packed buffer holds at most this share of all bytes, or so many bytes if that is more: it is a copy in the
# driver for as long as it takes to put it into the store.
PACK_SHARE, PACK_AT_LEAST = 0.04, 4 << 20
# A storage is cut down to what is reachable if that is at most this share of it.
COMPACT_BELOW = 0.5
# A storage that would be a buffer by itself begins at a multiple of this on a device, as torch's own allocations do.
DEVICE_ALIGNMENT = 512
# Storages on a device get addresses of this part of the line, where no memory of the host lies.
_DEVICE_ADDRESSES = 1 << 64


# Bytes of a buffer: its number, the offset, how many. Slices and views are plain tuples because every load
# unpickles all of them, and named ones take three times as long.
Slice = tuple[int, int, int]

# One tensor, as torch counts it: number of its storage; number of elements, if it is the only tensor over that
# storage and is exactly all of it in order, else 0; dtype; offset in elements; shape; stride; is it a Parameter;
# does it require a gradient; is it conjugate; is it negative.
View = tuple[int, int, torch.dtype, int, tuple[int, ...], tuple[int, ...], bool, bool, bool, bool]


class Layout(NamedTuple):
    """Where everything lies.

    `buffers` has their lengths; `storages` the slice of each storage; `views` the tensors over them; `arrays`
    the slice of each out-of-band array, and whether it is read-only.
    """

    buffers: list[int]
    storages: list[Slice]
    views: list[View]
    arrays: list[tuple[Slice, bool]]


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


# ---------------------------------------------------------------- packing


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
    owners, numbers, ranges = reachable(tensors)
    extents: list[_Extent] = []
    begins: list[int] = []
    on_device: dict[int, _OnDevice] = {}
    unused = _DEVICE_ADDRESSES
    for storage, (low, high) in zip(owners, ranges, strict=True):
        begins.append(low)
        address = storage.data_ptr() + low
        if not _on_host(storage):
            address, unused = unused, unused + _aligned(high - low)
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


def reachable(
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

    large = sorted((begin - end, begin) for begin, end, _ in merged if end - begin >= BUFFER_ALONE)
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
        filled += _aligned(end - begin)
    if parts:
        buffers.append(Buffer(filled, parts, [extents], True, on_device))
    return slices, buffers


def _aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


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


# ---------------------------------------------------------------- another dtype, another place


class Span(NamedTuple):
    """Bytes to bring to a device: where they go and how many there, and the buffer and offset that they come from.

    `cast` has the dtype that they have and the one that they get, where these differ.
    """

    place: int
    nbytes: int
    buffer: int
    offset: int
    cast: tuple[torch.dtype, torch.dtype] | None


class Block(NamedTuple):
    """An allocation on a device for storages whose order there is given: the place of each in it, by its number."""

    nbytes: int
    places: dict[int, int]


class Placement(NamedTuple):
    """Where the storages of a layout lie on a device, on one line of places.

    The first `nbytes` places are one allocation, the arena; each block is another, and begins at the place that
    `blocks` has for it. `storages` has place and bytes of each storage, `spans` what to copy, by place.
    """

    nbytes: int
    storages: list[tuple[int, int]]
    spans: list[Span]
    blocks: list[int]


# What `dtype=` converts. The smaller ones are quantized weights, which mean nothing without scales of their own.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def casts(layout: Layout, dtype: torch.dtype | None) -> dict[int, torch.dtype]:
    """Return the numbers of the storages that change where floating-point tensors become `dtype`, with their dtype.

    Raises ValueError where bytes are seen as more than one dtype: converted, they could not be shared any more.
    """
    if dtype is None:
        return {}
    if dtype not in _FLOATING:
        raise ValueError(
            f"dtype={dtype!r} is not one to convert weights to. Give torch.float16, torch.bfloat16, torch.float32 or "
            f"torch.float64."
        )
    seen: dict[int, dict[torch.dtype, tuple[int, ...]]] = {}
    for number, _, kind, _, shape, *_ in layout.views:
        seen.setdefault(number, {})[kind] = shape
    changed: dict[int, torch.dtype] = {}
    for number, kinds in seen.items():
        if _FLOATING.isdisjoint(kinds.keys() - {dtype}):
            continue
        if len(kinds) > 1:
            raise _cannot_convert(dtype, " and ".join(f"{kind} {list(shape)}" for kind, shape in kinds.items()))
        (changed[number],) = kinds
    for one, other in _sharing_bytes(layout.storages) if changed else ():
        if one in changed or other in changed:
            raise _cannot_convert(dtype, f"{seen[one]} and {seen[other]}")
    return changed


def _cannot_convert(dtype: torch.dtype, what: str) -> ValueError:
    return ValueError(
        f"dtype={dtype} cannot be applied: tensors share their bytes as {what}. Convert the model before sharing it."
    )


def _in_order(storages: list[Slice]) -> list[tuple[Slice, int]]:
    return sorted((piece, number) for number, piece in enumerate(storages) if piece[2])


def _sharing_bytes(storages: list[Slice]) -> Iterator[tuple[int, int]]:
    """Find each storage that has bytes with an earlier one; with it goes the one that begins next before it."""
    end, last = (0, 0), -1
    for (buffer, offset, nbytes), number in _in_order(storages):
        if (buffer, offset) < end:
            yield last, number
        end, last = max(end, (buffer, offset + nbytes)), number


def alone(layout: Layout) -> set[int]:
    """Return the numbers of the tensors with a storage of their own, and bytes, that no other tensor sees."""
    shared = {number for both in _sharing_bytes(layout.storages) for number in both}
    return {i for i, (number, elements, *_) in enumerate(layout.views) if elements and number not in shared}


def arrange(
    layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None, blocks: Sequence[Block] = ()
) -> Placement:
    """Place the storages of a layout, those of `changed` as `dtype`; what overlaps stays together.

    The storages of `blocks` go there, all others into one arena. No place within `DEVICE_ALIGNMENT` of a block's
    first or last one is another's, so that no copy reaches over.
    """
    places = [(0, 0)] * len(layout.storages)
    spans: list[Span] = []

    def as_copied(number: int, nbytes: int) -> tuple[int, tuple[torch.dtype, torch.dtype] | None]:
        if number not in changed or dtype is None:
            return nbytes, None
        return nbytes // changed[number].itemsize * dtype.itemsize, (changed[number], dtype)

    elsewhere = {number for block in blocks for number in block.places}
    order = [(piece, number) for piece, number in _in_order(layout.storages) if number not in elsewhere]
    known, reached = -1, 0  # the buffer that was met last, and how far
    first = end = start = 0  # a span that others may still join: place, place of its end, offset in the buffer
    shift, cast = 0, None
    for i, ((buffer, offset, nbytes), number) in enumerate(order):
        size, own_cast = as_copied(number, nbytes)
        joins = buffer == known and cast is own_cast is None
        if buffer != known or offset >= reached:
            # Elements of what overlaps stay aligned together, as in the store.
            overlapped = i + 1 < len(order) and order[i + 1][0][:2] < (buffer, offset + nbytes)
            alignment = DEVICE_ALIGNMENT if nbytes >= BUFFER_ALONE else ALIGNMENT
            place = _aligned(end, alignment) + (offset % 16 if overlapped else 0)
            joins = joins and place - offset == shift
            shift, reached = place - offset, offset
        place = offset + shift
        places[number] = (place, size)
        if not joins:
            if end > first:
                spans.append(Span(first, end - first, known, start, cast))
            first, start, cast, known = place, offset, own_cast, buffer
        end = max(end, place + size)
        reached = max(reached, offset + nbytes)
    if end > first:
        spans.append(Span(first, end - first, known, start, cast))

    nbytes_of_arena, begins = end, []
    for block in blocks:
        begins.append(_aligned(end, DEVICE_ALIGNMENT) + DEVICE_ALIGNMENT)
        end = begins[-1] + block.nbytes
        for number, place in sorted(block.places.items(), key=lambda item: item[1]):
            buffer, offset, nbytes = layout.storages[number]
            size, own_cast = as_copied(number, nbytes)
            places[number] = (begins[-1] + place, size)
            spans.append(Span(begins[-1] + place, size, buffer, offset, own_cast))
    return Placement(nbytes_of_arena, places, spans, begins)


def host_pieces(
    layout: Layout, buffers: Sequence[tuple[Any, int]], changed: dict[int, torch.dtype], dtype: torch.dtype | None
) -> list[torch.Tensor]:
    """Return a flat tensor for each storage of a layout over its buffers, those of `changed` converted."""
    pieces = []
    for number, piece in enumerate(layout.storages):
        storage = _storage(piece, buffers)
        kind = changed.get(number, torch.uint8)
        given = torch.empty(0, dtype=kind, device="cpu").set_(storage, 0, (piece[2] // kind.itemsize,), (1,))
        pieces.append(given.to(dtype) if number in changed else given)  # copy: other bytes than those shared
    return pieces


# ---------------------------------------------------------------- unpacking


def kinds(layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None) -> dict[int, torch.dtype]:
    """Return the dtype of each storage that is one tensor and no more, by its number, where floats become `dtype`."""
    found = {number: kind for number, elements, kind, *_ in layout.views if elements}
    if dtype is not None:
        found.update((number, dtype) for number in changed.keys() & found.keys())
    return found


def unpack(
    layout: Layout,
    buffers: Sequence[tuple[Any, int]],
    *,
    pieces: Sequence[torch.Tensor] = (),
    changed: dict[int, torch.dtype] | None = None,
    dtype: torch.dtype | None = None,
    keep_flags: bool = False,
) -> list[torch.Tensor]:
    """Make the tensors of a layout as views of writable buffers, each given with the offset at which it begins.

    Every storage holds on to its buffer. With `pieces`, a flat tensor for the bytes of each storage, wherever they
    are, the tensors are views of these; a piece that has the dtype of `kinds` becomes the tensor itself. Those of the
    numbers `changed` have `dtype`. Unless `keep_flags`, no tensor requires a gradient.
    """
    ready: list[torch.UntypedStorage | None] = [None] * len(layout.storages)
    slices = layout.storages
    make_parameter = torch.Tensor._make_subclass
    parameter_type = torch.nn.Parameter
    tensors: list[torch.Tensor] = []
    for number, elements, kind, offset, shape, stride, parameter, flag, conjugate, negative in layout.views:
        if elements and not pieces:
            # The quickest way there is, 2 us with the Parameter: the storage is made along with the tensor.
            buffer, begin, _ = slices[number]
            memory, base = buffers[buffer]
            tensor = torch.frombuffer(memory, dtype=kind, count=elements, offset=base + begin)
            if len(shape) != 1:
                tensor.resize_(shape)
        elif pieces:
            piece = pieces[number]
            if changed and number in changed and dtype is not None:
                kind = dtype
            if elements and piece.dtype is kind:
                tensor = piece.resize_(shape)
            else:
                offset += int(piece.storage_offset()) // kind.itemsize
                tensor = torch.empty(0, dtype=kind, device=piece.device)
                tensor.set_(piece.untyped_storage(), offset, shape, stride)
        else:
            storage = ready[number]
            if storage is None:
                storage = ready[number] = _storage(slices[number], buffers)
            tensor = torch.empty(0, dtype=kind, device="cpu").set_(storage, offset, shape, stride)
        if conjugate:
            tensor = tensor.conj()
        if negative:
            tensor = tensor._neg_view()
        if parameter:
            tensor = make_parameter(parameter_type, tensor, flag and keep_flags)
        elif flag and keep_flags:
            tensor.requires_grad_()
        tensors.append(tensor)
    return tensors


def _storage(piece: Slice, buffers: Sequence[tuple[Any, int]]) -> torch.UntypedStorage:
    buffer, offset, nbytes = piece
    if nbytes == 0:
        return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    memory, base = buffers[buffer]
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=base + offset).untyped_storage()


def unpack_arrays(layout: Layout, buffers: Sequence[tuple[Any, int]]) -> list[memoryview]:
    """Return the memory of each out-of-band array of a layout, read-only where the source was."""
    arrays = []
    for (buffer, offset, nbytes), readonly in layout.arrays:
        memory, base = buffers[buffer]
        view = memoryview(memory).cast("B")[base + offset : base + offset + nbytes]
        arrays.append(view.toreadonly() if readonly else view)
    return arrays
