"""`sort_by`: the lengths of rows, their order, and results put back in the order of the batch.

Note [Sorted batches]

    batch -> lengths -> sorted batch, longest first -> micro-batches -> results -> rows in the batch's own order

Sorting copies the columns of a batch once. Columns that `postprocess` passes on unchanged are not copied back: the
result has the batch's own column. Other columns are moved by one `take`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .._arrow.columns import RAY_FIXED, RAY_VARIABLE, columns_of, is_extension
from .failed_rows import failing_rows, is_tensor, same_memory, without
from .tables import as_table, check_names, described, is_pandas, joined

__all__ = ["Lengths", "SortedBatch", "check_rows", "row_lengths", "sort_rows", "take_rows"]

Lengths = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


class SortedBatch:
    """A batch whose rows are ordered by length, longest first.

    Attributes:
        original: The batch in its own order.
        table: The sorted batch.
        lengths: The lengths of the rows of `table`.
        order: Which row of `original` each row of `table` is.
    """

    def __init__(self, original: pa.Table, lengths: Lengths) -> None:
        self.original = original
        self.order: Int64s = np.argsort(-lengths, kind="stable").astype(np.int64, copy=False)
        self.lengths = lengths[self.order]
        self.table = take_rows(original, self.order)

    def put_back(self, parts: Sequence[tuple[range, Any]], name: str) -> Any:
        """Return the results of all parts of `table` as rows in the order of `original`."""
        place = np.empty_like(self.order)
        place[self.order] = np.arange(len(self.order))
        results = [rows for _, rows in parts]
        if all(is_pandas(rows) for rows in results):
            return joined(results).iloc[place].reset_index(drop=True)
        tables = [as_table(rows) for rows in results]
        rows = _concatenate(tables, name)
        unchanged = self._unchanged_columns([part for part, _ in parts], tables, rows)
        moved = take_rows(rows.drop_columns([*unchanged]), place)
        columns = [self.original[column] if column in unchanged else moved[column] for column in rows.column_names]
        fields = [field.with_type(column.type) for field, column in zip(rows.schema, columns, strict=True)]
        return pa.Table.from_arrays(columns, schema=pa.schema(fields, rows.schema.metadata))

    def _unchanged_columns(self, parts: list[range], tables: list[pa.Table], rows: pa.Table) -> frozenset[str]:
        """Return the columns that are the sorted batch's own memory in every part."""
        names = [*rows.column_names, *self.table.column_names]
        return frozenset(
            column
            for column in set(rows.column_names)
            if names.count(column) == 2
            and column in self.table.column_names
            and all(
                column in table.column_names
                and same_memory(table[column], self.table[column].slice(part.start, len(part)))
                for part, table in zip(parts, tables, strict=True)
            )
        )


def sort_rows(table: pa.Table, sort_by: Any, name: str, *, skip_failing: bool = False) -> tuple[SortedBatch, str]:
    """Return the batch sorted by length, and what `sort_by` raised first for a single row (or "").

    Args:
        table: The batch.
        sort_by: The option.
        name: How errors call the predictor.
        skip_failing: Whether rows on which a function raises have length 0 and reach `preprocess` all the same.
    """
    if isinstance(sort_by, str) or not len(table):
        return SortedBatch(table, row_lengths(table, sort_by, name)), ""
    try:
        return SortedBatch(table, row_lengths(table, sort_by, name)), ""
    except InvalidLengths:
        raise
    except Exception as error:
        if not skip_failing:
            raise
        failed = failing_rows(sort_by, table, error)
        good = np.ones(len(table), dtype=bool)
        good[list(failed)] = False
        lengths = np.zeros(len(table))
        lengths[good] = row_lengths(without(table, failed), sort_by, name)
        return SortedBatch(table, lengths), next(iter(failed.values()), "")


def check_rows(rows: Any, count: int, name: str) -> None:
    """Raise unless `postprocess` returned one row for each of `count` rows, so that they can be put back."""
    remedy = "Return one row for each, or set preserve_order=False to get the rows in the order of their lengths."
    if not (isinstance(rows, pa.Table) or is_pandas(rows)):
        raise TypeError(
            f"{name}.postprocess returned {described(rows)}, whose rows sort_by cannot put back in the order of the "
            f"batch. {remedy}"
        )
    check_names(rows, name)
    if len(rows) != count:
        raise ValueError(
            f"{name}.postprocess returned {len(rows)} rows for {count}, so sort_by cannot put them back in the order "
            f"of the batch. {remedy}"
        )


# ---------------------------------------------------------------- lengths


class InvalidLengths(ValueError):
    """`sort_by` gave something that cannot be the lengths of the rows."""


def row_lengths(table: pa.Table, sort_by: Any, name: str) -> Lengths:
    """Return the length of each row; nulls have length 0.

    Raises TypeError for a column without a length, ValueError for a column that is not there and for lengths that are
    negative, NaN or infinite, not numbers, or not one for each row.
    """
    if isinstance(sort_by, str):
        values = _column_lengths(table, sort_by, name)
        what = f"{name}.sort_by: column '{sort_by}'"
    elif not len(table):
        return np.zeros(0)
    else:
        returned = sort_by(table)
        what = f"{name}.sort_by"
        values = _as_numbers(returned, what)
        if len(values) != len(table):
            raise InvalidLengths(f"{what} returned {len(values)} lengths for {len(table)} rows. Return one for each.")
    lengths: Lengths = pc.fill_null(values.cast(pa.float64(), safe=False), 0.0).to_numpy()
    wrong = ~(np.isfinite(lengths) & (lengths >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidLengths(
            f"{what} gives row {row} the length {lengths[row]:g} ({int(wrong.sum())} of {len(lengths)} rows). "
            f"A length is a finite number, at least 0; use 0 for a row that has none."
        )
    return lengths


def _column_lengths(table: pa.Table, column: str, name: str) -> Any:
    indices = table.schema.get_all_field_indices(column)
    if len(indices) != 1:
        raise ValueError(
            f"{name}.sort_by: the batch has {len(indices) or 'no'} column{'s' * (len(indices) > 1)} '{column}'. "
            f"{columns_of(table)}"
        )
    values = table.column(indices[0])
    lengths = _lengths_of(values)
    if lengths is None:
        raise TypeError(
            f"{name}.sort_by: column '{column}' ({values.type}) has no length. Name a column of text, bytes, lists, "
            f"tensors or numbers, or give a function that takes the batch and returns a length for each row."
        )
    return lengths


def _lengths_of(values: pa.ChunkedArray) -> Any:
    """Return the lengths of the rows of a column, or None if its type has no length."""
    kind, types = values.type, pa.types
    if types.is_null(kind):
        return pa.chunked_array([pa.nulls(len(values), pa.int64())])
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return values
    if types.is_dictionary(kind):
        return _lengths_of(values.cast(kind.value_type))
    if types.is_string(kind) or types.is_large_string(kind) or kind == _view("string"):
        return pc.utf8_length(values.cast(pa.large_string()) if kind == _view("string") else values)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return pc.binary_length(values)
    if kind == _view("binary"):
        return pc.binary_length(values.cast(pa.large_binary()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or "list_view" in str(kind):
        return pc.list_value_length(values)
    if isinstance(kind, pa.FixedShapeTensorType) or is_extension(kind, RAY_FIXED | RAY_VARIABLE):
        return _tensor_sizes(values)
    return None


def _view(kind: str) -> Any:
    make = getattr(pa, f"{kind}_view", None)  # pyarrow 16
    return make() if make else None


def _tensor_sizes(values: pa.ChunkedArray) -> Any:
    """Return the number of items of each tensor of a column."""
    stored = [chunk.storage for chunk in values.chunks]
    sizes = [
        pc.list_value_length(array.field("data") if pa.types.is_struct(array.type) else array) for array in stored
    ]
    return pa.chunked_array([size.cast(pa.int64()) for size in sizes], pa.int64())


def _as_numbers(values: Any, what: str) -> Any:
    """Return what a function returned as an Arrow array of numbers."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    elif type(values).__name__ in ("Series", "Index"):
        values = pa.array(values, from_pandas=True)  # missing numbers become nulls
    elif isinstance(values, range):
        values = list(values)
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        array: Any = values
    elif isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.ndim == 1):
        try:
            array = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            array = None
    else:
        array = None
    kind = None if array is None else array.type
    if kind is None or not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):
        found = described(values) if kind is None else f"{described(values)} with values of type {kind}"
        raise InvalidLengths(f"{what} returned {found}. Return a list or an array with one number for each row.")
    return pa.chunked_array([array]) if isinstance(array, pa.Array) else array


# ---------------------------------------------------------------- rows in another order


def take_rows(table: pa.Table, rows: Int64s) -> pa.Table:
    """Return the rows of a table in the order of `rows`."""
    indices = pa.array(rows)
    columns = [_take(column, indices) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _take(column: pa.ChunkedArray, indices: pa.Array) -> pa.ChunkedArray:
    try:
        return column.take(indices)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # views; over 2 GiB of text with 32-bit offsets
        pieces = (column.slice(row, 1).chunks for row in indices.to_pylist())
        return pa.chunked_array([chunk for piece in pieces for chunk in piece], column.type)


def _concatenate(tables: list[pa.Table], name: str) -> pa.Table:
    """Return the tables as one, with one type for each column."""
    names = list(dict.fromkeys(column for table in tables for column in table.column_names))
    for column in names:
        kinds = [table.schema.field(column).type for table in tables if column in table.column_names]
        if any(kind != kinds[0] for kind in kinds) and all(map(is_tensor, kinds)):
            tables = [_with_variable_shapes(table, column) for table in tables]
    for promote in ("default", "permissive"):
        try:
            table = pa.concat_tables(tables, promote_options=promote)
            return table.select(names) if len(names) == table.num_columns else table
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            reason = error
    raise TypeError(
        f"{name}.postprocess returned columns of different types for parts of a batch, so sort_by cannot put them "
        f"back in order ({reason}). Return one type for each column, or set preserve_order=False."
    )


def _with_variable_shapes(table: pa.Table, column: str) -> pa.Table:
    """Return the table with a tensor column in the form that takes rows of different shapes."""
    from ray.data.extensions import ArrowVariableShapedTensorArray

    index = table.column_names.index(column)
    if index < 0 or is_extension(table.schema.field(index).type, RAY_VARIABLE):
        return table
    tensors = [tensor for chunk in table.column(index).chunks for tensor in _to_numpy(chunk)]
    rows = np.empty(len(tensors), dtype=object)
    for number, tensor in enumerate(tensors):  # numpy would take equal shapes for one array of more dimensions
        rows[number] = tensor
    return table.set_column(index, column, ArrowVariableShapedTensorArray.from_numpy(rows))


def _to_numpy(chunk: Any) -> Any:
    return chunk.to_numpy_ndarray() if hasattr(chunk, "to_numpy_ndarray") else chunk.to_numpy()
