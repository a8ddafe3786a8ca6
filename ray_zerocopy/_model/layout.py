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

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

__all__ = [
    "ALIGNMENT",
    "PACKED_BELOW",
    "Layout",
    "Slice",
    "View",
    "align",
    "dtype_changes",
    "storage_dtypes",
    "storage_over",
    "storages_in_order",
    "unpack",
    "unpack_arrays",
    "unshared_storages",
]


ALIGNMENT = 64
# Bytes from which an extent is a buffer of its own, and so is not copied before the store copies it. Each
# buffer costs a load about 3 us; each packed byte costs the driver a byte of heap while preparing.
PACKED_BELOW = 64 * 1024
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


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


# ---------------------------------------------------------------- another dtype


# What `dtype=` converts. The smaller ones are quantized weights, which mean nothing without scales of their own.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def dtype_changes(layout: Layout, dtype: torch.dtype | None) -> dict[int, torch.dtype]:
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
    for one, other in overlapping_storages(layout.storages) if changed else ():
        if one in changed or other in changed:
            raise _cannot_convert(dtype, f"{seen[one]} and {seen[other]}")
    return changed


def _cannot_convert(dtype: torch.dtype, what: str) -> ValueError:
    return ValueError(
        f"dtype={dtype} cannot be applied: tensors share their bytes as {what}. Convert the model before sharing it."
    )


def storages_in_order(storages: list[Slice]) -> list[tuple[Slice, int]]:
    return sorted((piece, number) for number, piece in enumerate(storages) if piece[2])


def overlapping_storages(storages: list[Slice]) -> Iterator[tuple[int, int]]:
    """Find each storage that has bytes with an earlier one; with it goes the one that begins next before it."""
    end, last = (0, 0), -1
    for (buffer, offset, nbytes), number in storages_in_order(storages):
        if (buffer, offset) < end:
            yield last, number
        end, last = max(end, (buffer, offset + nbytes)), number


def unshared_storages(layout: Layout) -> set[int]:
    """Return the numbers of the tensors with a storage of their own, and bytes, that no other tensor sees."""
    shared = {number for both in overlapping_storages(layout.storages) for number in both}
    return {i for i, (number, elements, *_) in enumerate(layout.views) if elements and number not in shared}


# ---------------------------------------------------------------- unpacking


def storage_dtypes(
    layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None
) -> dict[int, torch.dtype]:
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
    are, the tensors are views of these; a piece that has the dtype of `storage_dtypes` becomes the tensor itself.
    Those of the numbers `changed` have `dtype`. Unless `keep_flags`, no tensor requires a gradient.
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
                storage = ready[number] = storage_over(slices[number], buffers)
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


def storage_over(piece: Slice, buffers: Sequence[tuple[Any, int]]) -> torch.UntypedStorage:
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
