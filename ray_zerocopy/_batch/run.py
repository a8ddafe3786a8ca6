"""One batch through a predictor's methods: parts, stages, failed rows, memory errors, totals.

Note [The way of a batch]

    batch -> table -> micro-batches -> preprocess -> to the device -> predict -> to the host -> postprocess -> rows

`BatchRunner` knows no Ray Data and no Ray: the tests run it on any object that has the three methods.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch

from . import defaults, failed_rows
from .copies import Copies
from .rows import each_to_rows, joined, to_arrow, to_rows
from .stages import Stages, annotate_errors, inference_context, ranges
from .totals import Totals

__all__ = ["BatchRunner", "MicroBatch", "log"]

logger = logging.getLogger(__name__.partition(".")[0])


class Methods(Protocol):
    """The object whose methods and options a runner uses."""

    micro_batch_size: int | None
    on_error: Any
    keep_columns: Any

    def preprocess(self, batch: pa.Table) -> Any:
        """Turn rows into the model's inputs."""

    def predict(self, inputs: Any) -> Any:
        """Call the model."""

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        """Turn the model's outputs into rows."""


@dataclass
class MicroBatch:
    """Part of a batch on its way through the stages.

    Attributes:
        batch: All its rows.
        good: The rows that `preprocess` accepted.
        errors: What `preprocess` raised for each of the other rows, by row.
        values: The model's inputs, then its outputs.
        event: On a GPU, the event that orders the copies of `values`.
    """

    batch: pa.Table
    good: pa.Table
    errors: dict[int, str]
    values: Any = None
    event: Any = None

    @property
    def all_failed(self) -> bool:
        return bool(self.errors) and not len(self.good)


class BatchRunner:
    """Takes batches through `preprocess`, `predict` and `postprocess` of one object.

    The object is an argument of `run` and not kept: a model goes as soon as its predictor goes.

    Args:
        overridden: Which of the three methods the user wrote.
        name: How errors and log lines call the object.
        device: Where the model is.
        dtypes: What inputs are cast to, and whether the forward runs under autocast.
        copy_streams: Whether copies to and from a CUDA device run on streams beside the model.
        totals: Counts the time and the rows.
    """

    def __init__(
        self,
        *,
        overridden: Collection[str],
        name: str,
        device: torch.device,
        dtypes: defaults.Dtypes,
        copy_streams: bool,
        totals: Totals,
    ) -> None:
        self._overridden = overridden
        self._name = name
        self._device = device
        self._autocast = dtypes.autocast
        self._totals = totals
        self._copies = Copies(device, dtypes.inputs, streams=copy_streams and device.type == "cuda")
        self._stages = Stages()
        # How many rows fit into the device's memory, once a batch did not fit.
        self._rows_that_fit: int | None = None
        self._warned_of_split = False
        # With on_error="null": the schema of the last output with its error column, and which columns were passed on.
        self._schema: pa.Schema | None = None
        self._passed: frozenset[str] = frozenset()

    def run(self, methods: Methods, batch: Any) -> Any:
        """Return the rows for a batch of any format that Ray Data gives, or a generator of rows."""
        with self._totals.busy():
            table = to_arrow(batch, self._name)
            results = self._results(methods, table)
            first = next(results)
            parts = [first] if inspect.isgenerator(first[1]) else [first, *results]
            if any(inspect.isgenerator(rows) for _, rows in parts):
                return self._from_generators(itertools.chain(parts, results), len(table))
        if methods.on_error == "null":
            parts = self._with_all_columns(parts, table)
        self._count_batch()
        return parts[0][1] if len(parts) == 1 else joined([rows for _, rows in parts])

    def _from_generators(self, results: Iterator[tuple[range, Any]], end: int) -> Iterator[Any]:
        """Yield the rows of each part's generator; its code runs when the caller asks for rows."""

        @contextlib.contextmanager
        def step() -> Iterator[None]:
            annotated = annotate_errors(part) if len(part) < end else contextlib.nullcontext()
            with annotated, self._totals.busy(), self._totals.stage("postprocess"):
                yield

        while True:
            with self._totals.busy():
                result = next(results, None)
            if result is None:
                break
            part, rows = result
            yield from each_to_rows(rows, step, self._name) if inspect.isgenerator(rows) else [rows]
        self._count_batch()

    def _count_batch(self) -> None:
        self._totals.count(batches=1)
        if self._totals.due():
            log(str(self._totals))

    # ------------------------------------------------------------ a batch in parts

    def _results(self, methods: Methods, table: pa.Table) -> Iterator[tuple[range, Any]]:
        """Yield each part of the batch with what `postprocess` returned for it, in order.

        If the device's memory is too small for a part, that part and what follows are split into halves. The size is
        remembered for later batches, unless the part was the last and shorter than one that fitted before it.
        """
        begin = 0
        end = limit = len(table)
        split = False
        while True:
            usual = min(methods.micro_batch_size or end, self._rows_that_fit or end)
            size = min(usual, limit)
            try:
                if end - begin <= size:
                    part = range(begin, end)
                    yield part, self._run_alone(methods, table, part, annotate=len(part) < end)
                else:
                    for part, rows in self._stages.overlap(
                        ranges(begin, end, size),
                        lambda part: self._before(methods, table, part),
                        lambda part: self._model(methods, part),
                        lambda part: self._after(methods, part),
                    ):
                        yield part, rows
                        begin = part.stop
                break
            except torch.cuda.OutOfMemoryError:
                tried = min(size, end - begin)
                if tried <= 1:
                    raise
            limit = tried // 2
            if tried == usual:
                self._rows_that_fit, split = limit, True
            self._free_memory()
        if split:
            self._warn_of_split(end)

    def _run_alone(self, methods: Methods, table: pa.Table, part: range, *, annotate: bool) -> Any:
        def run() -> Any:
            inputs = self._before(methods, table, part)
            return self._after(methods, self._stages.in_model_thread(self._model, methods, inputs))

        with annotate_errors(part) if annotate else contextlib.nullcontext():
            return inference_context(torch.get_num_threads(), run)

    def _before(self, methods: Methods, table: pa.Table, rows: range) -> MicroBatch:
        batch = table.slice(rows.start, len(rows))
        preprocess = methods.preprocess
        with self._totals.stage("preprocess"):
            part = MicroBatch(batch, batch, {})
            try:
                inputs = preprocess(batch)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                if methods.on_error == "raise" or not len(batch):
                    raise
                if "preprocess" not in self._overridden:
                    preprocess(failed_rows.no_rows(batch))  # raises if the column is wrong, not a row
                part.errors = failed_rows.failing_rows(preprocess, batch, error)
                part.good = failed_rows.without(batch, part.errors)
                if part.all_failed:
                    return part
                inputs = preprocess(part.good)
            part.values, part.event = self._copies.begin(inputs)
        return part

    def _model(self, methods: Methods, part: MicroBatch) -> MicroBatch:
        if part.all_failed:
            return part
        with self._totals.stage("predict"):
            inputs = self._copies.arrive(part.values, part.event)
            part.values = None
            with self._device_context():
                outputs = methods.predict(inputs)
            part.values, part.event = self._copies.leave(outputs)
        return part

    def _after(self, methods: Methods, part: MicroBatch) -> Any:
        name = self._name
        if part.event is not None:
            with self._totals.stage("predict"):  # which only began the work on the device
                part.event.synchronize()
        with self._totals.stage("postprocess"):
            if part.all_failed:
                rows = self._all_null(methods, part)
            else:
                rows = methods.postprocess(self._copies.end(part.values, part.event), part.good)
                rows = rows if inspect.isgenerator(rows) else to_rows(rows, name)
                if methods.on_error == "null":
                    rows, passed = failed_rows.with_nulls(rows, part.good, part.batch, part.errors, name)
                    if len(rows):  # without rows any two columns are the same memory
                        self._schema, self._passed = rows.schema, passed
        if part.errors and not self._totals.failed_rows:
            first = next(iter(part.errors.values()))
            log(f"{name}: preprocess failed for {len(part.errors)} of {len(part.batch)} rows, the first with {first}")
        self._totals.count(rows=len(part.batch), failed_rows=len(part.errors))
        return rows

    def _all_null(self, methods: Methods, part: MicroBatch) -> pa.Table:
        if self._schema is not None:
            return failed_rows.without_values(part.batch, part.errors, self._schema, self._passed)
        if "postprocess" in self._overridden:
            kept = part.batch.select([])
        else:
            kept = defaults.kept(part.batch, methods.keep_columns, self._name)
        failed_rows.check_no_errors_yet(kept.column_names, self._name)
        return failed_rows.without_values(part.batch, part.errors, kept.schema, kept.column_names)

    def _with_all_columns(self, parts: list[tuple[range, pa.Table]], batch: pa.Table) -> list[tuple[range, pa.Table]]:
        if self._schema is not None:
            return failed_rows.completed(parts, batch, self._schema, self._passed)
        if len(batch):
            log(
                f"{self._name}: preprocess failed for all {len(batch)} rows before any row went through, so "
                f"these rows go on with the columns {', '.join(map(repr, parts[0][1].column_names))} alone.",
                logging.WARNING,
            )
        return parts

    def _free_memory(self) -> None:
        self._totals.count(retries=1)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _warn_of_split(self, rows: int) -> None:
        if not self._warned_of_split:
            self._warned_of_split = True
            log(
                f"{self._name}: {self._device} has too little memory for a batch of {rows} rows. This actor "
                f"gives the model {self._rows_that_fit} rows at a time from now on, or fewer if need be. "
                f"micro_batch_size={self._rows_that_fit} does so from the start.",
                logging.WARNING,
            )

    @contextlib.contextmanager
    def _device_context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))  # a thread begins with the first one
            if self._autocast is not None:
                stack.enter_context(torch.autocast(self._device.type, self._autocast))
            yield


def log(line: str, level: int = logging.INFO) -> None:
    """Log a line; without a handler it goes to standard error, which Ray shows in the driver."""
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.log(level, line)
