"""`on_error="null"`: which rows `preprocess` cannot take, and the output with nulls in their place.

Note [No value in a tensor column]

Ray's readers take the storage of a tensor column for dense, rows times items, and look at no nulls; and Arrow's
`take`, which sorts, shuffles and filters blocks, leaves the items of a null list out. A null in such a column
therefore moves all rows after it by one, silently. So a row that failed is a tensor there like any other: of NaN for
floating items, of zeros for others, and an empty one in a column of variable shape. Only the column of errors tells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from .rows import described, is_pandas

__all__ = [
    "ERROR_COLUMN",
    "check_no_errors_yet",
    "completed",
    "failing_rows",
    "no_rows",
    "with_nulls",
    "without",
    "without_values",
]

ERROR_COLUMN = "error"


def failing_rows(preprocess: Callable[[pa.Table], Any], batch: pa.Table, error: Exception) -> dict[int, str]:
    """Return the rows on which `preprocess`, which raised `error` for the batch, raises, and what it says of each.

    The batch is halved until the rows are found: preprocess runs about twice a failing row for each halving.
    """
    if len(batch) <= 1:
        return dict.fromkeys(range(len(batch)), f"{type(error).__name__}: {error}")
    half = len(batch) // 2
    found: dict[int, str] = {}
    for begin, part in ((0, batch.slice(0, half)), (half, batch.slice(half))):
        try:
            preprocess(part)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as part_error:
            found |= {begin + row: said for row, said in failing_rows(preprocess, part, part_error).items()}
    return found


def no_rows(batch: pa.Table) -> pa.Table:
    """Return a table without rows, with numbers where a column has nothing but nulls: its rows fail, not its type."""
    return pa.schema(field.with_type(_numbers_for_nulls(field.type)) for field in batch.schema).empty_table()


def _numbers_for_nulls(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_null(kind):
        return pa.float32()
    if pa.types.is_list(kind):  # as Arrow reads rows without items, too
        return pa.list_(_numbers_for_nulls(kind.value_type))
    return kind


def without(batch: pa.Table, rows: Iterable[int]) -> pa.Table:
    """Return the batch without some of its rows."""
    keep = np.ones(len(batch), dtype=bool)
    keep[list(rows)] = False
    try:
        return batch.filter(pa.array(keep))
    except pa.ArrowNotImplementedError:  # of text as views, which polars writes to Parquet (pyarrow 26)
        return pa.concat_tables([batch.slice(begin, count) for good, begin, count in _runs(keep) if good])


def _runs(place: npt.NDArray[np.bool_]) -> Iterator[tuple[bool, int, int]]:
    begin = 0
    for value, same in itertools.groupby(place.tolist()):
        count = len(list(same))
        yield value, begin, count
        begin += count


def with_nulls(
    rows: Any, good: pa.Table, batch: pa.Table, errors: dict[int, str], name: str
) -> tuple[pa.Table, frozenset[str]]:
    """Return the output for all rows of `batch`, where `rows` is that for the `good` ones, and a column of errors.

    Columns that are the very memory of the batch keep their values in all rows, and are named in the second result.
    The others have no value where a row failed: see Note [No value in a tensor column].
    """
    if is_pandas(rows):
        rows = pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None)
    if not isinstance(rows, pa.Table):
        raise TypeError(
            f"{name}.postprocess returned {described(rows)}, whose rows cannot be told apart, as on_error='null' "
            f"needs. Return a table or a mapping of columns, or set on_error='raise'."
        )
    if len(rows) != len(good):
        raise ValueError(
            f"{name}.postprocess returned {len(rows)} rows for {len(good)}, so on_error='null' cannot tell where a "
            f"null belongs. Return a row for each, or set on_error='raise'."
        )
    check_no_errors_yet(rows.column_names, name)
    place = np.ones(len(batch), dtype=bool)
    place[list(errors)] = False
    passed, fields, columns = set(), [], []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        unique = batch.schema.get_field_index(field.name) >= 0
        if unique and _memory(column) == _memory(good[field.name]):
            passed.add(field.name)
            fields.append(field)
            columns.append(batch[field.name])
        else:
            fields.append(field.with_nullable(True))
            columns.append(_spread(column, place) if errors else column)
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, rows.schema.metadata))
    return _with_errors(table, batch, errors), frozenset(passed)


def without_values(batch: pa.Table, errors: dict[int, str], like: pa.Schema, passed: Collection[str]) -> pa.Table:
    """Return the output for a batch of which every row failed, in the columns of an earlier output."""
    fields, columns = [], []
    for field in like:
        if field.name == ERROR_COLUMN:
            continue
        own = batch[field.name] if field.name in passed and field.name in batch.column_names else None
        if own is None or pa.types.is_null(own.type):
            own = _no_values(field.type, len(batch))
        fields.append(field.with_type(own.type))
        columns.append(own)
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, like.metadata))
    return _with_errors(table, batch, errors)


def completed(
    parts: list[tuple[range, pa.Table]], batch: pa.Table, like: pa.Schema, passed: Collection[str]
) -> list[tuple[range, pa.Table]]:
    """Return the parts of a batch, those that failed before the columns were known now with all columns."""
    return [
        (part, without_values(batch.slice(part.start, len(part)), _errors_in(rows), like, passed))
        if set(rows.column_names) < set(like.names)
        else (part, rows)
        for part, rows in parts
    ]


def _errors_in(rows: pa.Table) -> dict[int, str]:
    return {row: said for row, said in enumerate(rows[ERROR_COLUMN].to_pylist()) if said is not None}


def check_no_errors_yet(columns: Iterable[str], name: str) -> None:
    """Raise ValueError if a column of the user's has the name of the column of errors."""
    if ERROR_COLUMN in columns:
        raise ValueError(
            f"{name} has a column '{ERROR_COLUMN}' already, which on_error='null' would add. Rename it before."
        )


def _memory(column: pa.ChunkedArray) -> list[Any]:
    return [
        column.type,
        *(
            (array.offset, len(array), [buffer and buffer.address for buffer in array.buffers()])
            for chunk in column.chunks
            for array in ([chunk, chunk.dictionary] if pa.types.is_dictionary(column.type) else [chunk])
        ),
    ]


def _with_errors(rows: pa.Table, batch: pa.Table, errors: dict[int, str]) -> pa.Table:
    column = pa.array([errors.get(row) for row in range(len(batch))], pa.string())
    return rows.append_column(ERROR_COLUMN, column) if rows.num_columns else pa.table({ERROR_COLUMN: column})


# ---------------------------------------------------------------- columns with rows that have no value


def _is_tensor(kind: pa.DataType) -> bool:
    ray_types = ("ray.data.arrow_tensor", "ray.data.arrow_variable_shaped_tensor")
    return isinstance(kind, pa.FixedShapeTensorType) or (
        isinstance(kind, pa.BaseExtensionType) and kind.extension_name.startswith(ray_types)
    )


def _spread(column: pa.ChunkedArray, place: npt.NDArray[np.bool_]) -> Any:
    """Return the column with its rows where `place` is, and no values between them."""
    kind, taken = column.type, np.cumsum(place) - 1
    if not _is_tensor(kind):
        try:
            return column.take(pa.array(taken, mask=~place))
        except pa.ArrowNotImplementedError:  # as in `without`
            pieces = [
                column.slice(taken[begin], count).chunks if good else [pa.nulls(count, kind)]
                for good, begin, count in _runs(place)
            ]
            return pa.chunked_array([chunk for piece in pieces for chunk in piece], kind)
    taken[~place] = len(column)
    stored = pa.concat_arrays([*(chunk.storage for chunk in column.chunks), _no_values(kind, 1).storage])
    return pa.ExtensionArray.from_storage(kind, stored.take(pa.array(taken)))


def _no_values(kind: pa.DataType, rows: int) -> Any:
    """Return a column of rows without a value: null, NaN or 0, an empty tensor."""
    if not _is_tensor(kind):
        return pa.nulls(rows, kind)
    stored = kind.storage_type
    if pa.types.is_struct(stored):
        return pa.ExtensionArray.from_storage(kind, pa.array([{"data": [], "shape": [0] * kind.ndim}] * rows, stored))
    item, size = stored.value_type, math.prod(kind.shape)
    if pa.types.is_floating(item):
        items = pa.array(np.full(size, np.nan, item.to_pandas_dtype()))
    else:  # numbers, bools, times, and the bytes of Ray's tensors of text
        items = pa.Array.from_buffers(item, size, [None, pa.py_buffer(bytes(size * item.bit_width // 8 + 1))])
    row = pa.ListArray.from_arrays(pa.array([0, size], pa.int32()), items).cast(stored)
    return pa.ExtensionArray.from_storage(kind, row.take(pa.array(np.zeros(rows, dtype=np.int64))))
