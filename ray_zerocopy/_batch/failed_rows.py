"""`on_error="null"`: which rows fail, and the output with nulls in their place.

Note [No value in a tensor column]

Ray reads the storage of a tensor column as rows times items, and ignores nulls. Arrow's `take`, which sorts, shuffles
and filters blocks, drops the items of a null list. A null in a tensor column would therefore move all later rows by
one, without an error. So a failed row has a tensor there: NaN for floating-point items, zeros for others, and an
empty tensor in a column of variable shape. Only the error column marks the row as failed.
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

from . import defaults
from .tables import as_table, check_names, described, is_pandas

__all__ = [
    "ErrorColumn",
    "StageError",
    "failing_rows",
    "in_stage",
    "is_fatal",
    "is_tensor",
    "no_rows",
    "same_memory",
    "without",
]

_DROPPED = "__ray_zerocopy_error__"  # the error column while error_column=None


# ---------------------------------------------------------------- which rows fail


class StageError(Exception):
    """An exception with the method that raised it."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(stage, error)
        self.stage = stage
        self.error = error

    def __str__(self) -> str:
        return f"{self.stage}: {_described_error(self.error)}"


def _described_error(error: Exception) -> str:
    """Return the type and the text of an exception, as text that Arrow can hold."""
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception as failed:
        said = f"{type(error).__name__} (its __str__ raised {type(failed).__name__})"
    return said.encode(errors="backslashreplace").decode()  # half a surrogate pair, of a path or a damaged text


def in_stage(stage: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`; an exception for single rows becomes a `StageError`."""
    try:
        return function(*args)
    except Exception as error:
        if is_fatal(error):
            raise
        raise StageError(stage, error) from error


def is_fatal(error: Exception) -> bool:
    """Say whether an exception is about the device, not about rows: its memory is full, or it stopped working."""
    broken = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError))
    return isinstance(error, broken) or (isinstance(error, RuntimeError) and str(error).startswith("CUDA error"))


def failing_rows(function: Callable[[pa.Table], Any], batch: pa.Table, error: Exception) -> dict[int, str]:
    """Return the rows on which `function` raises, with the error of each; it raised `error` for the whole batch.

    The batch is halved until the rows are found. Each halving calls the function about twice for each failing row.
    """
    if len(batch) <= 1:
        said = str(error) if isinstance(error, StageError) else _described_error(error)
        return dict.fromkeys(range(len(batch)), said)
    half = len(batch) // 2
    found: dict[int, str] = {}
    for begin, part in ((0, batch.slice(0, half)), (half, batch.slice(half))):
        try:
            function(part)
        except Exception as part_error:
            if is_fatal(part_error):
                raise
            found |= {begin + row: said for row, said in failing_rows(function, part, part_error).items()}
    return found


def no_rows(batch: pa.Table) -> pa.Table:
    """Return a table without rows. Columns of nulls become numbers, because their rows are wrong, not their type."""
    return pa.schema(field.with_type(_numbers_for_nulls(field.type)) for field in batch.schema).empty_table()


def _numbers_for_nulls(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_null(kind):
        return pa.float32()
    if pa.types.is_list(kind):  # the type of rows without items, too
        return pa.list_(_numbers_for_nulls(kind.value_type))
    return kind


def without(batch: pa.Table, rows: Iterable[int]) -> pa.Table:
    """Return the batch without some of its rows."""
    keep = np.ones(len(batch), dtype=bool)
    keep[list(rows)] = False
    try:
        return batch.filter(pa.array(keep))
    except pa.ArrowNotImplementedError:  # string views, which polars writes to Parquet (pyarrow 26)
        return pa.concat_tables([batch.slice(begin, count) for good, begin, count in _runs(keep) if good])


def _runs(place: npt.NDArray[np.bool_]) -> Iterator[tuple[bool, int, int]]:
    begin = 0
    for value, same in itertools.groupby(place.tolist()):
        count = len(list(same))
        yield value, begin, count
        begin += count


# ---------------------------------------------------------------- the output


class ErrorColumn:
    """The outputs of one predictor with `on_error="null"`: nulls for failed rows, and a column of errors.

    Args:
        name: How errors and log lines call the predictor.
        overridden: Which methods the user wrote.
    """

    def __init__(self, name: str, overridden: Collection[str]) -> None:
        self._name = name
        self._overridden = overridden
        # The schema of the last output, and which of its columns were passed on unchanged.
        self._schema: pa.Schema | None = None
        self._passed: frozenset[str] = frozenset()

    def with_nulls(
        self, rows: Any, good: pa.Table, batch: pa.Table, errors: dict[int, str], column: str | None
    ) -> Any:
        """Return the output for all rows of `batch`, where `rows` is the output for the `good` ones.

        Columns that are the batch's own memory keep their values in all rows. The others have no value where a row
        failed: see Note [No value in a tensor column].
        """
        if is_pandas(rows) or isinstance(rows, pa.Table):
            check_names(rows, self._name)
            rows = as_table(rows)
        else:
            raise TypeError(
                f"{self._name}.postprocess returned {described(rows)}, so on_error='null' cannot tell which rows "
                f"failed. Return a table or a mapping of columns, or set on_error='raise'."
            )
        if len(rows) != len(good):
            raise ValueError(
                f"{self._name}.postprocess returned {len(rows)} rows for {len(good)}, so on_error='null' cannot tell "
                f"which rows failed. Return a row for each, or set on_error='raise'."
            )
        self._check_name_is_free(rows.column_names, column)
        place = np.ones(len(batch), dtype=bool)
        place[list(errors)] = False
        passed, fields, columns = set(), [], []
        for field, values in zip(rows.schema, rows.columns, strict=True):
            unique = batch.schema.get_field_index(field.name) >= 0
            if unique and same_memory(values, good[field.name]):
                passed.add(field.name)
                fields.append(field)
                columns.append(batch[field.name])
            else:
                fields.append(field.with_nullable(True))
                columns.append(_spread(values, place) if errors else values)
        table = pa.Table.from_arrays(columns, schema=pa.schema(fields, rows.schema.metadata))
        if len(table):  # without rows any two columns are the same memory
            self._schema, self._passed = table.schema, frozenset(passed)
        return _append_errors(table, len(batch), errors, column)

    def all_failed(self, batch: pa.Table, errors: dict[int, str], methods: Any) -> pa.Table:
        """Return the output for a part of which every row failed, in the columns of an earlier output.

        Without one, the rows keep the batch's columns, so that they can be found and run again. They do not if no
        column of errors marks them.
        """
        column = methods.error_column
        if self._schema is not None:
            return self._without_values(batch, errors, column)
        if "postprocess" in self._overridden:
            kept = batch.select([name for name in batch.column_names if name != column] if column else [])
        else:
            kept = defaults.kept(batch, methods.keep_columns, self._name)
            self._check_name_is_free(kept.column_names, column)
        return _append_errors(kept, len(batch), errors, column)

    def complete(
        self, parts: list[tuple[range, pa.Table]], batch: pa.Table, column: str | None
    ) -> tuple[list[tuple[range, pa.Table]], bool]:
        """Return the parts of a batch with all columns, and whether these are known.

        Parts that failed before the columns were known get them now. `error_column=None` drops the errors.
        """
        name = column or _DROPPED
        if (schema := self._schema) is not None:
            parts = [
                (part, self._without_values(batch.slice(part.start, len(part)), _errors_in(rows[name]), column))
                if rows[name].null_count == 0 and set(rows.column_names) != {*schema.names, name}
                else (part, rows)
                for part, rows in parts
            ]
        if column is None:
            parts = [(part, rows.drop_columns([_DROPPED])) for part, rows in parts]
        return parts, schema is not None

    def _without_values(self, batch: pa.Table, errors: dict[int, str], column: str | None) -> pa.Table:
        assert self._schema is not None
        fields, columns = [], []
        for field in self._schema:
            own = batch[field.name] if field.name in self._passed and field.name in batch.column_names else None
            if own is None or pa.types.is_null(own.type):
                own = _no_values(field.type, len(batch))
            fields.append(field.with_type(own.type))
            columns.append(own)
        table = pa.Table.from_arrays(columns, schema=pa.schema(fields, self._schema.metadata))
        return _append_errors(table, len(batch), errors, column)

    def _check_name_is_free(self, columns: Iterable[str], column: str | None) -> None:
        if column in list(columns):
            raise ValueError(
                f"{self._name} has a column '{column}' already, and on_error='null' adds one of this name. Set "
                f"error_column='{column}_of_row', or another name."
            )


def _append_errors(rows: pa.Table, count: int, errors: dict[int, str], column: str | None) -> pa.Table:
    values = pa.array([errors.get(row) for row in range(count)], pa.string())
    name = column or _DROPPED
    return rows.append_column(name, values) if rows.num_columns else pa.table({name: values})


def _errors_in(column: pa.ChunkedArray) -> dict[int, str]:
    return {row: said for row, said in enumerate(column.to_pylist()) if said is not None}


def same_memory(column: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Say whether two columns are the same rows of the same memory."""
    return _memory(column) == _memory(other)


def _memory(column: pa.ChunkedArray) -> list[Any]:
    return [
        column.type,
        *(
            (array.offset, len(array), [buffer and buffer.address for buffer in array.buffers()])
            for chunk in column.chunks
            for array in ([chunk, chunk.dictionary] if pa.types.is_dictionary(column.type) else [chunk])
        ),
    ]


# ---------------------------------------------------------------- columns with rows that have no value


def is_tensor(kind: pa.DataType) -> bool:
    """Say whether a type is of tensors: Arrow's, or one of Ray's."""
    ray_types = ("ray.data.arrow_tensor", "ray.data.arrow_variable_shaped_tensor")
    return isinstance(kind, pa.FixedShapeTensorType) or (
        isinstance(kind, pa.BaseExtensionType) and kind.extension_name.startswith(ray_types)
    )


def _spread(column: pa.ChunkedArray, place: npt.NDArray[np.bool_]) -> Any:
    """Return the column with its rows where `place` is, and no values between them."""
    kind, taken = column.type, np.cumsum(place) - 1
    if not is_tensor(kind):
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
    if not is_tensor(kind):
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
