"""`BatchRunner` without Ray and without Ray Data: plain objects with the three methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import torch
from batch_runner import batch_runner

from ray_zerocopy._batch.options import Options


class Doubles(Options):
    """Doubles a column, and notes how many rows each call of `predict` gets."""

    keep_columns: Any = True

    def __init__(self, micro_batch_size: int | None = None, on_error: str = "raise", room: int = 1 << 30) -> None:
        self.micro_batch_size = micro_batch_size
        self.on_error: Any = on_error
        self.room = room
        self.sizes: list[int] = []

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        values = batch.column("x").to_pylist()
        if None in values:
            raise ValueError(f"no value in {values}")
        return torch.tensor(values, dtype=torch.float64)

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > self.room:
            raise torch.cuda.OutOfMemoryError(f"no room for {len(inputs)} rows")
        self.sizes.append(len(inputs))
        return inputs * 2

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
        return batch.append_column("y", pa.array(outputs.tolist(), pa.float64()))


class Generates(Doubles):
    """Returns rows from a generator, one table for each row."""

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Iterator[Any]:
        for row, value in enumerate(outputs.tolist()):
            yield {"x": [batch.column("x")[row].as_py()], "y": [value]}


def rows_of(result: Any) -> list[dict[str, Any]]:
    parts = result if inspect.isgenerator(result) else [result]
    return [row for part in parts for row in pa.table(part).to_pylist()]


def numbers(*values: float | None) -> pa.Table:
    return pa.table({"x": pa.array(values, pa.float64())})


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 10, 11, 100])
@pytest.mark.parametrize("kind", [Doubles, Generates])
def test_rows_come_in_order(kind: type[Doubles], micro_batch_size: int | None) -> None:
    """Every row comes out once and in its place, for whole batches, micro-batches and generators."""
    methods = kind(micro_batch_size)
    result = batch_runner("Doubles").run(methods, numbers(*range(10)))
    assert rows_of(result) == [{"x": float(i), "y": 2.0 * i} for i in range(10)]
    assert sum(methods.sizes) == 10
    assert max(methods.sizes) == min(micro_batch_size or 10, 10)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_an_empty_batch_goes_through_once(micro_batch_size: int | None) -> None:
    """A batch without rows reaches the methods once, and comes out with all its columns."""
    methods = Doubles(micro_batch_size)
    result = batch_runner("Doubles").run(methods, numbers())
    assert result.column_names == ["x", "y"]
    assert len(result) == 0
    assert methods.sizes == [0]


@pytest.mark.parametrize("micro_batch_size", [None, 2, 3])
def test_failed_rows_become_nulls(micro_batch_size: int | None) -> None:
    """With on_error="null", a row that fails has a null and its error, and the other rows have their values."""
    run = batch_runner("Doubles")
    result = run.run(Doubles(micro_batch_size, "null"), numbers(1, None, 3, None, None, 6))
    assert result.column("y").to_pylist() == [2.0, None, 6.0, None, None, 12.0]
    errors = result.column("error").to_pylist()
    assert [error is None for error in errors] == [True, False, True, False, False, True]
    assert all("no value in [None]" in error for error in errors if error)
    assert (run._totals.rows, run._totals.failed_rows) == (6, 3)


def test_an_error_names_its_rows() -> None:
    """With on_error="raise" an error names the rows of its micro-batch, and later parts do not reach the model."""
    methods = Doubles(2)
    run, batch = batch_runner("Doubles"), numbers(1, 2, 3, None, 5, 6, 7, 8)
    with pytest.raises(ValueError, match="no value") as error:
        run.run(methods, batch)
    notes = [*getattr(error.value, "__notes__", ()), str(error.value.__cause__)]
    assert any("in rows 2 to 3 of the batch" in note for note in notes)
    assert sum(methods.sizes) <= 2


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_memory_errors_halve_the_rows(micro_batch_size: int | None) -> None:
    """A part that does not fit is split into halves until it fits, in order, and each row goes through once."""
    run, methods = batch_runner("Doubles"), Doubles(micro_batch_size, room=3)
    result = run.run(methods, numbers(*range(16)))
    assert rows_of(result) == [{"x": float(i), "y": 2.0 * i} for i in range(16)]
    assert max(methods.sizes) == 2
    assert sum(methods.sizes) == 16
    assert run._totals.retries > 0


def test_the_size_that_fits_is_remembered() -> None:
    """Later batches begin with the size that fitted, so that no more memory errors occur."""
    run, methods = batch_runner("Doubles"), Doubles(room=5)
    run.run(methods, numbers(*range(16)))
    retries = run._totals.retries
    methods.sizes.clear()
    run.run(methods, numbers(*range(16)))
    assert methods.sizes == [4, 4, 4, 4]
    assert run._totals.retries == retries


def test_a_row_that_never_fits_raises() -> None:
    """A memory error with one row is the user's to see."""
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room for 1 rows"):
        batch_runner("Doubles").run(Doubles(room=0), numbers(1, 2, 3))


def test_totals_count_batches_rows_and_stages() -> None:
    """The totals count each batch and row once, and every stage has taken some time."""
    run = batch_runner("Doubles")
    for size in (4, 0, 7):
        run.run(Doubles(3), numbers(*range(size)))
    assert (run._totals.batches, run._totals.rows, run._totals.failed_rows) == (3, 11, 0)
    assert all(run._totals.seconds[stage] > 0 for stage in ("preprocess", "predict", "postprocess"))


def test_a_generator_counts_when_it_ends() -> None:
    """A batch whose rows come from a generator is counted once its last row was taken."""
    run = batch_runner("Doubles")
    result = run.run(Generates(2), numbers(1, 2, 3))
    next(result)
    assert run._totals.batches == 0
    list(result)
    assert (run._totals.batches, run._totals.rows) == (1, 3)


@pytest.mark.parametrize("batch", [{"x": [1.0, 2.0]}, numbers(1, 2).to_pandas(), numbers(1, 2).to_batches()[0]])
def test_any_batch_format(batch: Any) -> None:
    """A mapping, a DataFrame and a RecordBatch go through as a Table does."""
    assert rows_of(batch_runner("Doubles").run(Doubles(), batch)) == [{"x": 1.0, "y": 2.0}, {"x": 2.0, "y": 4.0}]
