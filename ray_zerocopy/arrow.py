"""Arrow columns <-> tensors, over the same bytes where Arrow and torch have the same layout.

Note [A batch is shared memory]

A batch of Ray Data is in the node's object store, which every process on the node has mapped. A tensor over the batch
is a private view of these pages, copy-on-write::

    store pages      | ... 0.1 0.2 0.3 0.4 0.5 0.6 ... |      one copy, mapped by all workers of the node
                              ^
    Arrow column              offset, length                  read-only for Arrow
                              ^
    tensor                    data_ptr, shape, stride         reads the same pages; a write copies one page

So a write to what `column_to_tensor` or `column_chunks` returns (`x += 1`, `out=x`, a layer with `inplace=True`)
changes the tensor and never the dataset. On a platform without private views (macOS, another pid namespace) the
tensor is a copy. It is also a copy if the batch is in memory of this process alone: a table that you made, a block
under 100 KiB, the output of an operator that Ray Data runs in the same process. Such memory has other users too, such
as the columns that the batch keeps.

The tensor keeps its bytes alive, also after the batch is deleted. While the tensor lives, the store cannot free or
spill the block. So from one batch to the next, keep the results computed from a tensor instead of the tensor.

A column from `tensor_to_column` shows the tensor's memory where possible. Do not write to the tensor before Ray Data
has taken the column.

Note [What a column is as a tensor]::

    Arrow column of n rows                              tensor            bytes
    int8..64, uint8..64, float16/32/64                  (n,)              shared
    Ray's tensor column, fixed shape (V1, V2)           (n, *shape)       shared
    arrow.fixed_shape_tensor, dimensions permuted too   (n, *shape)       shared
    FixedSizeList[k], also nested                       (n, k, ...)       shared
    list, large_list with k values in each row          (n, k, ...)       shared
    Ray's tensor column, variable shape, all rows equal (n, *shape)       shared
    another extension over lists (datasets' Array2D)    as the lists      shared
    the last three, ragged                              an error          column_to_padded copies once
    any of them in several chunks                       one tensor        copied once; column_chunks shares

Arrow lacks bfloat16 and the float8 types, so these become float32, which every reader of Arrow, Parquet and Ray Data
knows. Every such value is exactly a float32, so `column_to_tensor(batch, name).to(torch.bfloat16)` restores the
values (a NaN stays a NaN, its bits may change).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    is_over_lists,
    nulls_within,
    ragged_error,
    unequal_dimensions,
)
from ._arrow.values import to_numpy
from ._pages import views

__all__ = ["column_chunks", "column_to_padded", "column_to_tensor", "tensor_to_column"]


Int64s = npt.NDArray[np.int64]


# ---------------------------------------------------------------- columns to tensors


def column_to_tensor(batch: pa.Table, name: str) -> torch.Tensor:
    """Return a column as one tensor, rows first.

    The tensor is a copy-on-write view of the object store's pages. It is a copy if the batch is not in the store, or
    if the column has several chunks that hold rows; `column_chunks` needs no copy for that. A write to the tensor
    never changes the batch or a dataset: see the module's Note [A batch is shared memory]. The tensor keeps the bytes
    alive.

    Args:
        batch: A table or record batch, as Ray Data gives with `batch_format="pyarrow"`.
        name: The column.

    Returns:
        A CPU tensor of the column's dtype, of shape (rows,) for numbers and `(rows, *row_shape)` for tensors and
        lists. A list column without rows does not say how long its rows are. Its shape is (0, 0).

    Raises:
        TypeError: The column's type has no tensor form (bool, decimal, string, date, struct, ...), or `batch` is
            not an Arrow table.
        ValueError: There is no such column, or more than one; it has nulls; its rows differ in shape.

    Example:
        >>> batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4, 5, 6]), 2)})
        >>> column_to_tensor(batch.slice(1), "x")
        tensor([[3, 4],
                [5, 6]])
    """
    column = find_column(batch, name)
    chunks = [chunk for chunk in column.chunks if len(chunk)] or column.chunks[:1]
    if len(chunks) == 1:
        return _rows(chunks[0], column)
    parts = [_rows(chunk, column, numbers_of=_shared_numbers) for chunk in chunks]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(ragged_error(column, f"the rows of its chunks have shapes {sorted(shapes)}", outermost=True))
    return torch.cat(parts)  # copy: a tensor is one block of memory


def column_chunks(batch: pa.Table, name: str) -> Iterator[torch.Tensor]:
    """Yield one tensor for each chunk of a column, in order. `column_to_tensor` says which tensors are copies.

    Ray Data makes a batch of one chunk per source block. Concatenated, the tensors are what `column_to_tensor`
    returns, which copies a column of several chunks. Nulls and types are checked at once, the shape of a chunk when
    it is yielded. A chunk without rows gives a tensor without rows.

    Example:
        >>> batch = pa.table({"x": pa.chunked_array([[1, 2], [3]])})
        >>> [chunk.tolist() for chunk in column_chunks(batch, "x")]
        [[1, 2], [3]]
    """
    column = find_column(batch, name)
    return (_rows(chunk, column) for chunk in column.chunks)


def column_to_padded(batch: pa.Table, name: str, fill: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a ragged column as one tensor, padded at the end of each row, and the lengths of its rows.

    Takes list columns and Ray's tensor columns of variable shape, also if the rows of this batch have one shape. The
    values are copied once. You can write to both tensors.

    Args:
        batch: A table or record batch.
        name: The column.
        fill: The value for the places where a row has none; 0 by default.

    Returns:
        `padded`, of the column's dtype and shape `(rows, longest row, *item_shape)`, and `lengths`,
        int64 of shape (rows,). For rows of d > 1 dimensions `padded` is (rows, d largest sizes) and `lengths`
        (rows, d). The mask of the values is `torch.arange(padded.shape[1]) < lengths[:, None]`.

        `tensor_to_column([row[:n] for row, n in zip(padded, lengths)])` is the inverse.

    Raises:
        TypeError: The column is not of lists or variable shapes, its values have no tensor form, or `fill` is not a
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
            f"a fill in this range, or cast the column first."
        )


# ---------------------------------------------------------------- one chunk


def _own_numbers(array: Any) -> torch.Tensor:
    """Return a tensor with the bytes of an array of numbers, to which the caller may write."""
    return _tensor_over(array, views.own_memory)


def _shared_numbers(array: Any) -> torch.Tensor:
    """Return a tensor over the bytes of an array of numbers, for reading only."""
    return _tensor_over(array, views.shared_view)


def _rows(
    array: Any, column: Column, outermost: bool = True, numbers_of: Callable[[Any], torch.Tensor] = _own_numbers
) -> torch.Tensor:
    """Return an Arrow array as a tensor over its bytes. `check_type` has accepted the type."""
    kind = array.type
    count = len(array)
    if array.null_count:
        raise ValueError(nulls_within(column, array))
    if kind.id in DTYPES:
        return numbers_of(array)
    if is_over_lists(kind):
        return _rows(array.storage, column, outermost, numbers_of)
    if pa.types.is_fixed_size_list(kind):
        # `values` belongs to the whole array, not to this slice of it.
        items = array.values.slice(array.offset * kind.list_size, count * kind.list_size)
        values = _rows(items, column, outermost=False, numbers_of=numbers_of)
        return values.view(count, kind.list_size, *values.shape[1:])
    if is_list(kind):
        offsets = _offsets(array)
        widths = np.diff(offsets)
        width = int(widths[0]) if count else 0
        if (widths != width).any():
            raise ValueError(
                ragged_error(column, f"its rows have {widths.min()} to {widths.max()} values", outermost)
            )
        values = _rows(_items(array, offsets), column, outermost=False, numbers_of=numbers_of)
        return values.view(count, width, *values.shape[1:])
    if is_extension(kind, RAY_VARIABLE):
        sizes = _sizes(array, column)
        if (sizes != sizes[:1]).any():
            spans = " x ".join(f"{low}..{high}" for low, high in zip(sizes.min(0), sizes.max(0), strict=True))
            raise ValueError(ragged_error(column, f"its rows have shapes {spans}", outermost))
        shape = sizes[0].tolist() if count else [0] * kind.ndim
        # Not from the lengths of the lists: rows of shape (2, 0) and (3, 0) have the same length.
        data = array.storage.field("data")
        values = _rows(_items(data, _offsets(data)), column, outermost=False, numbers_of=numbers_of)
        return values.view(count, *shape)
    values = _rows(array.storage, column, outermost, numbers_of).view(count, *kind.shape)
    if getattr(kind, "permutation", None):
        # kind.shape is the order of the bytes. Dimension i of a row is dimension permutation[i] of the bytes. Arrow's
        # to_tensor() returns wrong strides for longer cycles.
        values = values.permute(0, *(dimension + 1 for dimension in kind.permutation))
    return values


def _ragged_rows(array: Any, column: Column) -> tuple[torch.Tensor, Int64s]:
    """Return the items of all rows, one after the other, and each row's size in each ragged dimension."""
    if array.null_count:
        raise ValueError(nulls_within(column, array))
    if is_list(array.type):
        offsets = _offsets(array)
        return _rows(_items(array, offsets), column, False, _shared_numbers), np.diff(offsets)[:, None]
    data = array.storage.field("data")
    return _rows(_items(data, _offsets(data)), column, False, _shared_numbers), _sizes(array, column)


def _tensor_over(array: Any, memory_at: Callable[[int, int, object], Any]) -> torch.Tensor:
    """Return a tensor over the bytes of an array of numbers, which live as long as the tensor.

    Not `torch.from_numpy` or `torch.frombuffer` of the array: they warn of read-only memory at every batch.
    """
    dtype = DTYPES[array.type.id]
    if not len(array):
        return torch.empty(0, dtype=dtype)
    buffer = array.buffers()[1]
    address = buffer.address + array.offset * dtype.itemsize
    return torch.frombuffer(memory_at(address, len(array) * dtype.itemsize, buffer), dtype=dtype)


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
    """Return the Arrow column that a reader of Ray Data expects for a tensor, or for one tensor per row.

    - A tensor of shape (rows,) gives plain numbers, or bools.
    - A tensor of shape `(rows, *row_shape)` gives the tensor column that Ray Data would make. Its format is
      `DataContext.arrow_fixed_shape_tensor_format`, by default Ray's V2, whose shape all batch formats of Ray Data
      keep. Set it to `ARROW_NATIVE` for readers outside Ray. The column is then an `arrow.fixed_shape_tensor`.
    - A list with one tensor per row gives a list column if the tensors have one dimension, else Ray's tensor column
      of variable shape. This holds also if all rows have one shape, so that the column has one type in all batches.

    A single tensor is not copied if it is contiguous, on the CPU, and of a dtype that Arrow has. The column then is
    a view of the tensor's memory, so do not write to the tensor afterwards. Bools are packed into bits. bfloat16 and
    float8 become float32, which is exact. Rows of a list are copied once, into one block. The column has no gradient.

    Args:
        values: A tensor with the rows as its first dimension, or a list of tensors of one dtype and one number of
            dimensions, on any device.

    Raises:
        TypeError: Arrow has no type for the dtype (complex, quantized) or layout (sparse, nested), the rows of a list
            differ in dtype, or a value is not a tensor.
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
                f"a column is made of a tensor, or of a list with one tensor per row, not of a "
                f"{type(values).__module__}.{type(values).__qualname__}."
            )
        return _rows_to_column(list(values))
    if values.ndim == 0:
        raise ValueError("a tensor of shape () has no rows. Give it a dimension for the rows: tensor.reshape(1).")
    array = to_numpy(values, "the tensor")
    if array.ndim == 1:
        return pa.array(array)
    from ray.data.extensions import ArrowTensorArray  # 0.7 s to import, unless Ray Data is running

    return ArrowTensorArray.from_numpy(array)


def _rows_to_column(rows: list[Any]) -> pa.Array:
    for number, row in enumerate(rows):
        if not isinstance(row, torch.Tensor):
            raise TypeError(
                f"row {number} is a {type(row).__module__}.{type(row).__qualname__}, not a tensor. Give a tensor "
                f"for all rows or a list with one tensor per row. For plain values use pa.array."
            )
    if not rows:
        raise ValueError("an empty list gives a column no type. Give a tensor without rows: torch.empty(0, ...).")
    dtypes = sorted({str(row.dtype) for row in rows})
    if len(dtypes) > 1:
        raise TypeError(f"the rows are {' and '.join(dtypes)}, and a column has one type. Cast them to one dtype.")
    dimensions = sorted({row.ndim for row in rows})
    if len(dimensions) > 1 or dimensions == [0]:
        raise ValueError(
            f"the rows are tensors of {' and '.join(map(str, dimensions))} dimensions. Give all rows the same number "
            f"of dimensions, at least 1. For single numbers use torch.stack(rows)."
        )
    arrays = [to_numpy(row, f"row {number}") for number, row in enumerate(rows)]
    if dimensions == [1]:
        offsets = np.cumsum([0, *map(len, arrays)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"the rows have {offsets[-1]} values, and a list column holds 2**31-1. Make the batch smaller."
            )
        items = pa.array(np.concatenate(arrays))  # copy: a list column is one block of memory
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
    from ray.data.extensions import ArrowVariableShapedTensorArray

    each = np.empty(len(arrays), dtype=object)
    for number, array in enumerate(arrays):  # numpy would make one array of equal shapes
        each[number] = array
    return ArrowVariableShapedTensorArray.from_numpy(each)  # copy: as above
