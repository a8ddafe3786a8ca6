"""`on_error="null"`: which rows `preprocess` cannot take, and the output with nulls in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ._batches import described, is_pandas

__all__ = ["ERROR_COLUMN", "failing_rows", "null_columns", "with_nulls", "without"]

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


def without(batch: pa.Table, rows: Iterable[int]) -> pa.Table:
    """Return the batch without some of its rows."""
    keep = np.ones(len(batch), dtype=bool)
    keep[list(rows)] = False
    return batch.filter(pa.array(keep))


def with_nulls(rows: Any, good: pa.Table, batch: pa.Table, errors: dict[int, str], name: str) -> pa.Table:
    """Return the output for all rows of `batch`, where `rows` is that for the `good` ones, and a column of errors.

    Columns that came through as they were keep their values in all rows; the others are null where a row failed.
    """
    if is_pandas(rows):
        rows = pa.Table.from_pandas(rows, preserve_index=False)
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
    if ERROR_COLUMN in rows.column_names:
        raise ValueError(
            f"{name} has a column '{ERROR_COLUMN}' already, which on_error='null' would add. Rename it before."
        )
    if errors:
        place = np.ones(len(batch), dtype=bool)
        place[list(errors)] = False
        taken = pa.array(np.cumsum(place) - 1, mask=~place)
        columns = {}
        for column in rows.column_names:
            same = column in batch.column_names and _same(rows[column], good[column])
            columns[column] = batch[column] if same else rows[column].take(taken)
        rows = pa.table(columns)
    return _with_errors(rows, batch, errors)


def null_columns(batch: pa.Table, errors: dict[int, str], like: pa.Schema) -> pa.Table:
    """Return the output for a batch of which every row failed, in the columns of an earlier output."""
    columns = {
        field.name: batch[field.name]
        if field.name in batch.column_names and batch[field.name].type == field.type
        else pa.nulls(len(batch), field.type)
        for field in like
        if field.name != ERROR_COLUMN
    }
    return _with_errors(pa.table(columns), batch, errors)


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Say whether columns are equal; one and the same column is, also where it holds NaN."""

    def memory(column: pa.ChunkedArray) -> list[Any]:
        return [(c.offset, len(c), [b and b.address for b in c.buffers()]) for c in column.chunks]

    return bool(one.type == other.type and (memory(one) == memory(other) or one.equals(other)))


def _with_errors(rows: pa.Table, batch: pa.Table, errors: dict[int, str]) -> pa.Table:
    column = pa.array([errors.get(row) for row in range(len(batch))], pa.string())
    return rows.append_column(ERROR_COLUMN, column) if rows.num_columns else pa.table({ERROR_COLUMN: column})
