r"""A layout and buffers -> tensors, as views. Needs torch, but not Ray.

Note [Storages, extents, buffers]

A tensor is a view of a storage, and a storage is a range of bytes at an address. Two storages can share bytes, such
as two `torch.from_numpy` of one array. `pack` maps the storages of a model to buffers::

    storages       |== A: 9 MiB ==|  |= B =|  |= C: only 1 KiB of 1 GiB is reachable ... =|
                          |             |          |
    extents        [======A=======]  [==B==]  [c]          the bytes to keep of each; overlapping ones merge
                          |              \     /
    buffers        [======A=======]     [==B==|c|...]      a large extent is a buffer, small ones share a buffer

`unpack` reverses this: every source storage becomes a separate torch storage over its slice of a buffer. They stay
separate because `torch.save`, `deepcopy`, safetensors and Hugging Face detect ties, and measure sizes, by storage. On
a device, or with another dtype, `_device/placement.py` first chooses an address for each storage, and `unpack` gets
one flat tensor for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
# An extent of at least this many bytes gets a separate buffer, which only the store copies. Smaller ones share a
# buffer. Each buffer costs a load about 3 us. Each packed byte costs the driver a byte of heap during `prepare`.
PACKED_BELOW = 64 * 1024
# A range of a buffer: number of the buffer, offset in bytes, number of bytes. Slices and views are plain tuples,
# because every load unpickles all of them, and named tuples take three times as long.
Slice = tuple[int, int, int]


# One tensor: number of its storage; number of elements if it is contiguous and the only tensor over all of that
# storage, otherwise 0; dtype; offset in elements; shape; stride; is a Parameter; requires a gradient; is conjugate;
# is negative.
View = tuple[int, int, torch.dtype, int, tuple[int, ...], tuple[int, ...], bool, bool, bool, bool]


class Layout(NamedTuple):
    """Where the bytes of a model are.

    Attributes:
        buffers: The size of each buffer in bytes.
        storages: The slice of each storage.
        views: The tensors, as views of the storages.
        arrays: The slice of each out-of-band array, and whether the array is read-only.
    """

    buffers: list[int]
    storages: list[Slice]
    views: list[View]
    arrays: list[tuple[Slice, bool]]


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


# ---------------------------------------------------------------- another dtype


# The dtypes that `dtype=` converts. Smaller floats are quantized weights, which need their scales.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def dtype_changes(layout: Layout, dtype: torch.dtype | None, fixed: Collection[int] = ()) -> dict[int, torch.dtype]:
    """Return the present dtypes, by number, of the storages to convert so that floating-point tensors become `dtype`.

    The tensors numbered in `fixed` keep their dtype.

    Raises:
        ValueError: `dtype` is no floating-point dtype; or tensors share bytes that have several dtypes or belong to
            several storages. After a conversion, they could not share the bytes.
    """
    if dtype is None:
        return {}
    if dtype not in _FLOATING:
        raise ValueError(
            f"dtype={dtype!r} is not supported: weights can be converted to torch.float16, torch.bfloat16, "
            f"torch.float32 or torch.float64. Give one of these."
        )
    fixed_storages = {layout.views[number][0] for number in fixed}
    seen: dict[int, dict[torch.dtype, tuple[int, ...]]] = {}
    for number, _, kind, _, shape, *_ in layout.views:
        seen.setdefault(number, {})[kind] = shape
    changed: dict[int, torch.dtype] = {}
    for number, kinds in seen.items():
        if number in fixed_storages or _FLOATING.isdisjoint(kinds.keys() - {dtype}):
            continue
        if len(kinds) > 1:
            raise _cannot_convert(dtype, " and ".join(f"{kind} {list(shape)}" for kind, shape in kinds.items()))
        (changed[number],) = kinds
    for one, other in overlapping_storages(layout.storages) if changed else ():
        if one in changed or other in changed:
            raise _cannot_convert(dtype, f"{seen[one]} and {seen[other]}")
    return changed


def _cannot_convert(dtype: torch.dtype, shared_as: str) -> ValueError:
    return ValueError(
        f"dtype={dtype} cannot be applied: tensors share bytes as {shared_as}, and could not share them after the "
        f"conversion. Convert the model before sharing it: model.to({dtype})."
    )


def storages_in_order(storages: list[Slice]) -> list[tuple[Slice, int]]:
    return sorted((piece, number) for number, piece in enumerate(storages) if piece[2])


def overlapping_storages(storages: list[Slice]) -> Iterator[tuple[int, int]]:
    """Yield (predecessor, storage) for each storage that overlaps an earlier one, in the order of offsets."""
    end, last = (0, 0), -1
    for (buffer, offset, nbytes), number in storages_in_order(storages):
        if (buffer, offset) < end:
            yield last, number
        end, last = max(end, (buffer, offset + nbytes)), number


def unshared_storages(layout: Layout) -> set[int]:
    """Return the numbers of the tensors that have bytes which no other tensor shares."""
    shared = {number for both in overlapping_storages(layout.storages) for number in both}
    return {i for i, (number, elements, *_) in enumerate(layout.views) if elements and number not in shared}


# ---------------------------------------------------------------- unpacking


def storage_dtypes(
    layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None
) -> dict[int, torch.dtype]:
    """Return the dtype, after the conversion, of each storage that one tensor covers, by number."""
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
    """Make the tensors of a layout as views of buffers or of flat tensors.

    Args:
        layout: Describes the tensors.
        buffers: Writable memory of each buffer, and the offset at which the buffer begins. A storage keeps its
            buffer alive.
        pieces: Replaces the buffers: a flat tensor with the bytes of each storage, on any device. A piece that has
            the dtype of `storage_dtypes` becomes the tensor, without a new view.
        changed: The storages that were converted to `dtype`, by number; see `dtype_changes`.
        dtype: The dtype of these storages.
        keep_flags: Keeps `requires_grad`. By default no tensor requires a gradient.
    """
    ready: list[torch.UntypedStorage | None] = [None] * len(layout.storages)
    slices = layout.storages
    make_parameter = torch.Tensor._make_subclass
    parameter_type = torch.nn.Parameter
    tensors: list[torch.Tensor] = []
    for number, elements, kind, offset, shape, stride, parameter, flag, conjugate, negative in layout.views:
        if elements and not pieces:
            # The fastest way, 2 us with the Parameter: torch makes the storage along with the tensor.
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
    """Return the memory of each out-of-band array, read-only if the source was read-only."""
    arrays = []
    for (buffer, offset, nbytes), readonly in layout.arrays:
        memory, base = buffers[buffer]
        view = memoryview(memory).cast("B")[base + offset : base + offset + nbytes]
        arrays.append(view.toreadonly() if readonly else view)
    return arrays
