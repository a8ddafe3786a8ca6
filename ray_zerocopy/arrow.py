"""Arrow columns <-> tensors, over the same bytes wherever Arrow and torch can agree on them.

Note [A batch is shared memory]

A batch of Ray Data lies in the node's object store, which every process on the node has mapped::

    store pages      | ... 0.1 0.2 0.3 0.4 0.5 0.6 ... |      one copy, mapped by all workers of the node
                              ^
    Arrow column              offset, length                  read-only, by Arrow's word
                              ^
    tensor                    data_ptr, shape, stride         read-only, by nobody's word but yours

torch has no read-only tensors. A write to what `column_to_tensor` or `column_chunks` returns (`x += 1`,
`x.normal_()`, `out=x`, a layer with `inplace=True` on its input) therefore changes the batch, and with it what
other tasks, retries and other processes on the node read. Make a copy first, `x.clone()`, or use the operation
that is not in-place. A tensor moved to a GPU is a copy; `x.float()` is none where x was float32. What
`column_to_padded` returns is your own.

The tensor keeps its bytes alive: the batch may go first. As long as the tensor lives, the store cannot free or
spill the block, so keep what you computed from it, not the tensor itself, from one batch to the next.

It is the same the other way: a column from `tensor_to_column` shows the tensor's memory where it could, so fill
no output buffer anew before the column is handed on.

Note [What a column is as a tensor]

    Arrow column of n rows                              tensor            bytes
    int8..64, uint8..64, float16/32/64                  (n,)              shared
    Ray's tensor column, fixed shape (V1, V2)           (n, *shape)       shared
    arrow.fixed_shape_tensor, dimensions permuted too   (n, *shape)       shared
    FixedSizeList[k], also nested                       (n, k, ...)       shared
    list, large_list with k values in each row          (n, k, ...)       shared
    Ray's tensor column, variable shape, all rows equal (n, *shape)       shared
    the last two, ragged                                an error          column_to_padded copies once
    any of them in several chunks                       one tensor        copied once; column_chunks shares

bfloat16 and the float8 types, which Arrow does not have, become float32. Every value of them is exactly a
float32, so `column_to_tensor(batch, name).to(torch.bfloat16)` gives back what went in (of a NaN, that it is one);
and every reader of Arrow, Parquet and Ray Data knows float32.
"""

from __future__ import annotations

import ctypes
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ._arrow.columns import (
    DTYPES,
    RAY_VARIABLE,
    Column,
    find_column,
    is_extension,
    is_list,
    nulls_within,
    ragged_error,
    unequal_dimensions,
)

__all__ = ["column_chunks", "column_to_padded", "column_to_tensor", "tensor_to_column"]


_AS_FLOAT32 = frozenset(
    getattr(torch, name)
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
    if hasattr(torch, name)  # torch has gained them one by one
)
_TO_ARROW = frozenset(DTYPES.values()) | _AS_FLOAT32 | {torch.bool}
Int64s = npt.NDArray[np.int64]


# ---------------------------------------------------------------- columns to tensors


def column_to_tensor(batch: pa.Table, name: str) -> torch.Tensor:
    """Return a column as one tensor, rows first, over the batch's own bytes.

    The bytes are shared unless the column has several chunks that hold rows; these are then copied, once, into
    one tensor (`column_chunks` does without). Slices are honoured. Never write to the tensor: see the module's
    Note [A batch is shared memory]. The tensor keeps the bytes alive.

    Args:
        batch: A table or record batch, as Ray Data gives with `batch_format="pyarrow"`.
        name: The column.

    Returns:
        A CPU tensor of shape (rows,) for numbers and (rows, *row shape) for tensors and lists, of the column's
        dtype. A list column without rows says nothing about their width: it gives shape (0, 0).

    Raises:
        TypeError: The column's type has no tensor form (bool, decimal, string, date, struct, ...), or `batch` is
            no Arrow table.
        ValueError: There is no such column, or more than one; it has nulls; its rows differ in shape.

    Example:
        >>> batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4, 5, 6]), 2)})
        >>> column_to_tensor(batch.slice(1), "x")
        tensor([[3, 4],
                [5, 6]])
    """
    column = find_column(batch, name)
    parts = [_rows(chunk, column) for chunk in column.chunks if len(chunk)]
    if not parts:
        return _rows(column.chunks[0], column)
    if len(parts) == 1:
        return parts[0]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(ragged_error(column, f"the rows of its chunks have shapes {sorted(shapes)}", outermost=True))
    return torch.cat(parts)  # copy: the chunks lie apart, and one tensor is one block


def column_chunks(batch: pa.Table, name: str) -> Iterator[torch.Tensor]:
    """Yield a column as one tensor a chunk, in order, each over the batch's own bytes; nothing is copied.

    Ray Data makes a batch of one chunk per source block. Concatenated, the tensors are what `column_to_tensor`
    returns, and what is said there holds here. Nulls and types are checked at once, each chunk's shape when its
    turn comes. A chunk without rows gives a tensor without rows.

    Example:
        >>> batch = pa.table({"x": pa.chunked_array([[1, 2], [3]])})
        >>> [chunk.tolist() for chunk in column_chunks(batch, "x")]
        [[1, 2], [3]]
    """
    column = find_column(batch, name)
    return (_rows(chunk, column) for chunk in column.chunks)


def column_to_padded(batch: pa.Table, name: str, fill: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a ragged column as one tensor, padded at the end of each row, and the lengths of its rows.

    Takes list columns, whether or not the rows of this batch happen to differ, and Ray's tensor columns of
    variable shape. The values are copied once; both tensors are your own to write to.

    Args:
        batch: A table or record batch.
        name: The column.
        fill: What stands where a row has no value.

    Returns:
        `padded`, of the column's dtype and shape (rows, longest row, *shape of a list's items), and `lengths`,
        int64 of shape (rows,). For rows of d > 1 dimensions `padded` is (rows, d largest sizes) and `lengths`
        (rows, d). `torch.arange(padded.shape[1]) < lengths[:, None]` is the mask of what is there.

        The way back is `tensor_to_column([row[:n] for row, n in zip(padded, lengths)])`.

    Raises:
        TypeError: The column is not of lists or variable shapes, its values have no tensor form, or `fill` is no
            number.
        ValueError: There is no such column, or more than one; it has nulls; its rows have different numbers of
            dimensions, or are ragged in a second dimension; the column's dtype cannot hold `fill`.

    Example:
        >>> batch = pa.table({"ids": pa.array([[5, 6, 7], [8]])})
        >>> padded, lengths = column_to_padded(batch, "ids", fill=-1)
        >>> padded
        tensor([[ 5,  6,  7],
                [ 8, -1, -1]])
        >>> lengths
        tensor([3, 1])
    """
    column = find_column(batch, name)
    if not (is_list(column.kind) or is_extension(column.kind, RAY_VARIABLE)):
        raise TypeError(
            f"{column.label} has rows of one shape, so there is nothing to pad. Use "
            f"column_to_tensor(batch, {name!r})."
        )
    ragged = [_ragged_rows(chunk, column) for chunk in column.chunks if len(chunk)]
    ragged = ragged or [_ragged_rows(column.chunks[0], column)]
    shapes = {tuple(values.shape[1:]) for values, _ in ragged}
    if len(shapes) > 1:
        raise ValueError(
            ragged_error(column, f"the items of its lists have shapes {sorted(shapes)}", outermost=False)
        )
    if len({sizes.shape[1] for _, sizes in ragged}) > 1:
        raise ValueError(unequal_dimensions(column, (sizes.shape[1] for _, sizes in ragged)))
    first, _ = ragged[0]
    _check_fill(fill, first.dtype, column)

    sizes = np.concatenate([sizes for _, sizes in ragged])
    largest = sizes.max(axis=0, initial=0).tolist()
    padded = torch.full((len(sizes), *largest, *first.shape[1:]), fill, dtype=first.dtype)
    below = padded.numpy()
    for values, part in ragged:
        _place(below[: len(part)], values.numpy(), part)  # copy: padding moves every row
        below = below[len(part) :]
    lengths = torch.from_numpy(sizes)
    return padded, lengths[:, 0] if sizes.shape[1] == 1 else lengths


def _place(padded: npt.NDArray[Any], values: npt.NDArray[Any], sizes: Int64s) -> None:
    """Write each row's values to the beginning of its place."""
    if sizes.shape[1] == 1:
        padded[np.arange(padded.shape[1]) < sizes] = values
        return
    begin = 0
    for row, shape in zip(padded, sizes.tolist(), strict=True):
        end = begin + int(np.prod(shape))
        row[tuple(slice(size) for size in shape)] = values[begin:end].reshape(shape)
        begin = end


def _check_fill(fill: float, dtype: torch.dtype, column: Column) -> None:
    if not isinstance(fill, numbers.Real):
        raise TypeError(f"{column.label} cannot be filled with {fill!r}: fill is a number, such as 0.")
    if dtype.is_floating_point:
        limits: Any = torch.finfo(dtype)
        fits, kind = not math.isfinite(fill) or limits.min <= fill <= limits.max, "numbers"
    else:
        limits = torch.iinfo(dtype)
        fits, kind = float(fill).is_integer() and limits.min <= fill <= limits.max, "whole numbers"
    if not fits:
        raise ValueError(
            f"{column.label} cannot hold fill={fill}: its values are {kind} from {limits.min} to {limits.max}. Give "
            f"such a fill, or cast the column first."
        )


# ---------------------------------------------------------------- one chunk


def _rows(array: Any, column: Column, outermost: bool = True) -> torch.Tensor:
    """Return an Arrow array of a type that `check_type` let pass as a tensor over its bytes."""
    kind = array.type
    count = len(array)
    if array.null_count:
        raise ValueError(nulls_within(column, array))
    if kind.id in DTYPES:
        return _numbers(array)
    if pa.types.is_fixed_size_list(kind):
        # values is the whole array's, whatever the slice.
        items = array.values.slice(array.offset * kind.list_size, count * kind.list_size)
        values = _rows(items, column, outermost=False)
        return values.view(count, kind.list_size, *values.shape[1:])
    if is_list(kind):
        offsets = _offsets(array)
        widths = np.diff(offsets)
        width = int(widths[0]) if count else 0
        if (widths != width).any():
            raise ValueError(
                ragged_error(column, f"its rows have {widths.min()} to {widths.max()} values", outermost)
            )
        values = _rows(_items(array, offsets), column, outermost=False)
        return values.view(count, width, *values.shape[1:])
    if is_extension(kind, RAY_VARIABLE):
        sizes = _sizes(array, column)
        if (sizes != sizes[:1]).any():
            spans = " x ".join(f"{low}..{high}" for low, high in zip(sizes.min(0), sizes.max(0), strict=True))
            raise ValueError(ragged_error(column, f"its rows have shapes {spans}", outermost))
        shape = sizes[0].tolist() if count else [0] * kind.ndim
        # Through the items, since rows of shape (2, 0) and (3, 0) are lists of one length.
        data = array.storage.field("data")
        return _rows(_items(data, _offsets(data)), column, outermost=False).view(count, *shape)
    values = _rows(array.storage, column, outermost).view(count, *kind.shape)
    if getattr(kind, "permutation", None):
        # kind.shape is how the bytes lie; dimension i of a row is dimension permutation[i] of them. Arrow's own
        # to_tensor() gets the strides of longer cycles wrong.
        values = values.permute(0, *(dimension + 1 for dimension in kind.permutation))
    return values


def _ragged_rows(array: Any, column: Column) -> tuple[torch.Tensor, Int64s]:
    """Return the items of all rows, one after the other, and each row's size in each ragged dimension."""
    if array.null_count:
        raise ValueError(nulls_within(column, array))
    if is_list(array.type):
        offsets = _offsets(array)
        return _rows(_items(array, offsets), column, outermost=False), np.diff(offsets)[:, None]
    data = array.storage.field("data")
    return _rows(_items(data, _offsets(data)), column, outermost=False), _sizes(array, column)


def _numbers(array: Any) -> torch.Tensor:
    """Return a tensor over the bytes of an array of numbers, which live as long as the tensor.

    Not `torch.from_numpy` or `torch.frombuffer` of the array, which warn of read-only memory on each healthy
    batch; that warning is this module's Note [A batch is shared memory].
    """
    dtype = DTYPES[array.type.id]
    if not len(array):
        return torch.empty(0, dtype=dtype)
    buffer = array.buffers()[1]
    memory = (ctypes.c_char * (len(array) * dtype.itemsize)).from_address(
        buffer.address + array.offset * dtype.itemsize
    )
    memory.owner = buffer  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=dtype)


def _offsets(array: Any) -> Int64s:
    """Return where each list of the array begins in its values, and where the last ends."""
    if not len(array):
        return np.zeros(1, dtype=np.int64)
    offsets: Int64s = array.offsets.to_numpy().astype(np.int64, copy=False)  # a number a row, not the values
    return offsets


def _items(array: Any, offsets: Int64s) -> Any:
    return array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))


def _sizes(array: Any, column: Column) -> Int64s:
    """Return the shapes of the rows of Ray's variable-shaped tensor column: (rows, dimensions)."""
    shapes = array.storage.field("shape")
    offsets = _offsets(shapes)
    dimensions = np.diff(offsets)
    if not len(dimensions):
        return np.zeros((0, array.type.ndim), dtype=np.int64)
    if (dimensions != dimensions[0]).any():
        raise ValueError(unequal_dimensions(column, dimensions.tolist()))
    # copy: a few numbers a row; the caller hands them on as lengths to write to
    return np.array(_items(shapes, offsets)).reshape(len(array), int(dimensions[0]))


# ---------------------------------------------------------------- tensors to columns


def tensor_to_column(values: torch.Tensor | Sequence[torch.Tensor]) -> pa.Array:
    """Return the Arrow column that a reader of Ray Data expects for a tensor, or for a tensor a row.

    - A tensor of shape (rows,) gives plain numbers (or bools).
    - A tensor of shape (rows, *row shape) gives the tensor column that Ray Data itself would make: the one set
      in `DataContext.arrow_fixed_shape_tensor_format`, by default Ray's own V2, in which all formats of Ray Data
      find the shape again. Set it to `ARROW_NATIVE` for readers outside Ray: the column is then an
      `arrow.fixed_shape_tensor`.
    - A list of tensors, a tensor a row, of shape (length,) gives a list column, and of more dimensions Ray's
      tensor column of variable shape: also where all rows happen to be of one shape, so that a column has one
      type in all batches.

    One tensor is not copied if it is contiguous, on the CPU and of a dtype that Arrow has: the column then shows
    the tensor's memory, so do not write to it afterwards. Bools are packed into bits, bfloat16 and float8 become
    float32, which holds them exactly. Rows of a list are copied once, into one block. The column has no gradient.

    Args:
        values: A tensor with the rows as its first dimension, or a list of tensors of one dtype and one number of
            dimensions. Any device.

    Raises:
        TypeError: Arrow has no form for the dtype (complex, quantized) or the layout (sparse, nested), the rows
            of a list differ in dtype, or something is not a tensor.
        ValueError: A tensor has no dimension for the rows, the rows of a list differ in how many dimensions they
            have, or the list is empty.

    Example:
        >>> tensor_to_column(torch.tensor([0.5, 0.25])).type
        DataType(float)
        >>> tensor_to_column([torch.tensor([1, 2, 3]), torch.tensor([4])]).to_pylist()
        [[1, 2, 3], [4]]
        >>> tensor_to_column(torch.zeros(8, 3, 4)).type
        ArrowTensorTypeV2(shape=(3, 4), dtype=float)
    """
    if not isinstance(values, torch.Tensor):
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
            raise TypeError(
                f"a column is made of a tensor, or of a list with a tensor a row, not of a "
                f"{type(values).__module__}.{type(values).__qualname__}."
            )
        return _rows_to_column(list(values))
    if values.ndim == 0:
        raise ValueError("a tensor of shape () has no rows to make a column of. Give it some: tensor.reshape(1).")
    array = _to_numpy(values, "the tensor")
    if array.ndim == 1:
        return pa.array(array)
    from ray.data.extensions import ArrowTensorArray  # 0.7 s to import, unless Ray Data is running

    return ArrowTensorArray.from_numpy(array)


def _rows_to_column(rows: list[Any]) -> pa.Array:
    for number, row in enumerate(rows):
        if not isinstance(row, torch.Tensor):
            raise TypeError(
                f"row {number} is a {type(row).__module__}.{type(row).__qualname__}, not a tensor. Give a tensor "
                f"for all rows or a list with a tensor a row; pa.array takes plain values."
            )
    if not rows:
        raise ValueError("an empty list says no type for a column. Give a tensor without rows: torch.empty(0, ...).")
    dtypes = sorted({str(row.dtype) for row in rows})
    if len(dtypes) > 1:
        raise TypeError(f"the rows are of {' and '.join(dtypes)}, and a column has one type. Cast them to one dtype.")
    dimensions = sorted({row.ndim for row in rows})
    if len(dimensions) > 1 or dimensions == [0]:
        raise ValueError(
            f"the rows are tensors of {' and '.join(map(str, dimensions))} dimensions. Give rows of one number of "
            f"dimensions, at least 1; torch.stack makes a tensor of single numbers."
        )
    arrays = [_to_numpy(row, f"row {number}") for number, row in enumerate(rows)]
    if dimensions == [1]:
        offsets = np.cumsum([0, *map(len, arrays)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"the rows have {offsets[-1]} values, and a list column holds 2**31-1. Make the batch smaller."
            )
        items = pa.array(np.concatenate(arrays))  # copy: the rows lie apart, and a list column is one block
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
    from ray.data.extensions import ArrowVariableShapedTensorArray

    each = np.empty(len(arrays), dtype=object)
    for number, array in enumerate(arrays):  # numpy would take equal shapes for one array of more dimensions
        each[number] = array
    return ArrowVariableShapedTensorArray.from_numpy(each)  # copy: as above


def _to_numpy(tensor: torch.Tensor, what: str) -> npt.NDArray[Any]:
    """Return a tensor's values as a contiguous array of a type that Arrow has, its own memory where possible."""
    if tensor.is_nested:  # of layout strided, or jagged
        raise TypeError(f"{what} is nested, for which Arrow has no column. Give list(tensor.unbind()).")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{what} is of layout {tensor.layout}, for which Arrow has no column. Give tensor.to_dense()."
        )
    if tensor.dtype not in _TO_ARROW:
        remedy = "tensor.dequantize()" if tensor.is_quantized else "a tensor of another dtype"
        if tensor.dtype.is_complex:
            remedy = "torch.view_as_real(tensor)"
        raise TypeError(f"{what} is of {tensor.dtype}, for which Arrow has no type. Give {remedy}.")
    if tensor.device.type == "meta":
        raise TypeError(f"{what} is on the meta device, so it has no values. Materialize it first.")
    tensor = tensor.detach().cpu()  # copy: only from a device
    if tensor.dtype in _AS_FLOAT32:
        tensor = tensor.to(torch.float32)  # copy: Arrow has no such type; float32 holds each value exactly
    tensor = tensor.resolve_neg().contiguous()  # copy: only of a negated or strided view
    array: npt.NDArray[Any] = tensor.numpy()
    return array
