"""Conversion of Ray Data's batches into Arrow tables, and of what `postprocess` returns into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..arrow import tensor_to_column

__all__ = ["as_table", "check_names", "described", "each_to_rows", "is_pandas", "joined", "to_arrow", "to_rows"]


def to_arrow(batch: Any, name: str) -> pa.Table:
    """Return a batch of any of Ray Data's formats as a table."""
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, pa.RecordBatch):
        return pa.Table.from_batches([batch])
    from ray.data.block import BlockAccessor  # 0.7 s to import; here it is imported already

    if isinstance(batch, Mapping):
        try:
            if texts := [key for key, value in batch.items() if isinstance(value, (str, bytes))]:
                raise TypeError(f"{texts[0]!r} is one text, not a column")  # Arrow would make a row of each letter
            return BlockAccessor.batch_to_arrow_block(dict(batch))
        except Exception as error:  # Ray raises errors of several types where Arrow refuses
            raise TypeError(
                f"{name} got a mapping that is not a batch of columns ({error}). Use it in ds.map_batches, which "
                f"passes batches of rows, not in ds.map or ds.flat_map, which pass single rows."
            ) from error
    if is_pandas(batch):
        try:
            return BlockAccessor.for_block(batch).to_arrow()
        except (pa.ArrowException, TypeError):  # a column that Arrow cannot hold, or a name that is not text
            columns = {str(label): _pandas_to_arrow(batch.iloc[:, [i]]) for i, label in enumerate(batch.columns)}
            return pa.table(columns)
    raise TypeError(
        f"{name} got a batch of type {type(batch).__module__}.{type(batch).__qualname__}, which is not a "
        f"batch format of Ray Data. Use it in ds.map_batches(..., batch_format='pyarrow')."
    )


def _pandas_to_arrow(frame: Any) -> pa.ChunkedArray:
    """Return the one column of a DataFrame. Ray Data pickles what Arrow cannot hold, as in numpy batches."""
    from ray.data.block import BlockAccessor

    frame = frame.set_axis(["column"], axis=1)
    try:
        return BlockAccessor.for_block(frame).to_arrow().column(0)
    except (pa.ArrowException, TypeError):
        return BlockAccessor.batch_to_arrow_block({"column": frame["column"].to_numpy()}).column(0)


def is_pandas(value: Any) -> bool:
    """Return whether `value` is a pandas DataFrame, without importing pandas."""
    return type(value).__name__ == "DataFrame" and type(value).__module__.split(".")[0] == "pandas"


def as_table(rows: Any) -> pa.Table:
    """Return rows, a table or a DataFrame, as a table without the index. Cells may be arrays of any dimensions."""
    if not is_pandas(rows):
        return rows
    try:
        table = pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):  # such as cells that are matrices
        table = pa.table({str(name): _to_column(rows[name], f"column '{name}' of a DataFrame") for name in rows})
    return table.replace_schema_metadata(None)


def check_names(rows: Any, name: str) -> None:
    """Raise if two columns of a table or a DataFrame have the same name: nothing can tell them apart."""
    _check_unique(list(rows.columns) if is_pandas(rows) else rows.column_names, name)


def _check_unique(names: list[Any], name: str) -> None:
    if twice := [column for column in names if names.count(column) > 1]:
        raise ValueError(
            f"{name}.postprocess returned two columns named '{twice[0]}'. Give each column another name."
        )


def each_to_rows(parts: Iterator[Any], stage: Callable[[], AbstractContextManager[None]], name: str) -> Iterator[Any]:
    """Yield each result of a generator as rows. Each of its steps runs in a `stage`."""
    while True:
        with stage():
            try:
                part = next(parts)
            except StopIteration:
                return
            rows = to_rows(part, name)
        yield rows


def joined(results: list[Any]) -> Any:
    """Return the rows of several parts of a batch as one table, or a generator of the parts if their types differ."""
    if all(is_pandas(rows) for rows in results):
        import pandas

        return pandas.concat(results, ignore_index=True)
    tables = [as_table(rows) for rows in results]
    try:
        table = pa.concat_tables(tables, promote_options="default")  # a column that a part lacks becomes nulls
        names = max(tables, key=lambda part: part.num_columns).column_names
        return table.select(names) if len(names) == table.num_columns else table
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return (rows for rows in results)  # such as parts of different widths, which Ray Data can join


def to_rows(rows: Any, name: str) -> Any:
    """Return what `postprocess` returned as a table or a DataFrame; raise if it cannot be a batch of rows."""
    if isinstance(rows, pa.Table) or is_pandas(rows):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"{name}.postprocess returned {described(rows)}. Return a pyarrow.Table, or a mapping from column "
            f"name to array or tensor, such as {{'prediction': outputs}}."
        )
    _check_unique([str(key) for key in rows], name)
    columns: dict[str, Any] = {}
    for key, value in rows.items():
        columns[str(key)] = _to_column(value, f"{name}.postprocess returned {described(value)} as column '{key}'")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(
            f"{name}.postprocess returned columns of unequal length: {lengths}. Each column needs one entry a row."
        )
    return pa.table(columns)


def _to_column(values: Any, what: str) -> Any:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if isinstance(values, torch.Tensor) and values.ndim > 0:
        return tensor_to_column(values)
    if isinstance(values, list) and values and all(isinstance(value, torch.Tensor) for value in values):
        return tensor_to_column(values) if values[0].ndim else tensor_to_column(torch.stack(values))
    sequence = isinstance(values, (list, tuple, range)) or type(values).__name__ in ("Series", "Index")
    if not (sequence or (isinstance(values, np.ndarray) and values.ndim > 0)):
        raise TypeError(f"{what}. A column is an array, a tensor or a list with one entry for each row.")
    from ray.data.block import BlockAccessor

    if type(values).__name__ in ("Series", "Index") and not isinstance(values.dtype, np.dtype):
        return pa.array(values, from_pandas=True)  # a type of pandas that has nulls
    column = list(values) if sequence else np.asarray(values)
    return BlockAccessor.batch_to_arrow_block({"column": column}).column(0)


def described(value: Any) -> str:
    """Return the type and shape of a value, for an error."""
    nested = isinstance(value, torch.Tensor) and value.is_nested  # torch raises for the shape of a nested tensor
    shape = f" of shape {tuple(value.shape)}" if not nested and hasattr(value, "shape") else ""
    return f"a {type(value).__module__}.{type(value).__qualname__}{shape}" if value is not None else "None"
