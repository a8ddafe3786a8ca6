"""One micro-batch through the three methods: to the device and back, and which rows fail.

`MicroBatches` has the three stages that `Stages` runs, for one part of a batch each.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch

from ..errors import log
from . import failed_rows
from .defaults import Dtypes
from .device_copies import Copies
from .failed_rows import ErrorColumn, StageError, in_stage, is_fatal
from .lengths import Lengths, check_rows
from .stages import Stages
from .tables import to_rows
from .totals import Totals

__all__ = ["Job", "Methods", "MicroBatch", "MicroBatches"]


class Methods(Protocol):
    """The object whose methods and options a runner uses; `Options` describes the options."""

    sort_by: Any
    micro_batch_size: Any
    micro_batch_tokens: int | None
    preserve_order: bool
    keep_columns: Any
    on_error: Any
    error_column: str | None

    def preprocess(self, batch: pa.Table) -> Any:
        """Turn rows into the model's inputs."""

    def predict(self, inputs: Any) -> Any:
        """Call the model."""

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        """Turn the model's outputs into rows."""


@dataclass
class Job:
    """A batch and how it is run.

    Attributes:
        methods: The object with methods and options.
        table: The rows in the order in which they go through the stages.
        lengths: The length of each row, all 1 without `sort_by`.
        order: The number of each row in the batch, if it was sorted.
        in_parts: Whether the batch is cut into micro-batches, so that the model runs in its thread.
        keep_rows: Whether `postprocess` must return one row for each.
    """

    methods: Methods
    table: pa.Table
    lengths: Lengths
    order: Any = None
    in_parts: bool = False
    keep_rows: bool = False


@dataclass
class MicroBatch:
    """Part of a batch on its way through the stages.

    Attributes:
        batch: All its rows.
        good: The rows that have not failed.
        errors: The error of each of the other rows, by row.
        values: The model's inputs, then its outputs.
        event: On a GPU, the event that orders the copies of `values`.
        failure: What `predict` raised for all rows together, until the failing rows are found.
    """

    batch: pa.Table
    good: pa.Table
    errors: dict[int, str]
    values: Any = None
    event: Any = None
    failure: StageError | None = None

    @property
    def all_failed(self) -> bool:
        return bool(self.errors) and not len(self.good)


class MicroBatches:
    """The stages of one predictor: `before`, `model` and `after`.

    Args:
        overridden: Which of the three methods the user wrote.
        name: How errors and log lines call the predictor.
        device: Where the model is.
        dtypes: What inputs are cast to, and whether the forward runs under autocast.
        copy_streams: Whether copies to and from a CUDA device run on streams beside the model.
        stages: The locks and threads.
        totals: Counts the time and the rows.

    Attributes:
        errors: The outputs with `on_error="null"`.
        first_failure: What `predict` or `postprocess` raised first for all rows of a part.
        any_row_passed: Whether any row has come out of `postprocess`, with `on_error="null"`.
    """

    def __init__(
        self,
        *,
        overridden: Collection[str],
        name: str,
        device: torch.device,
        dtypes: Dtypes,
        copy_streams: bool,
        stages: Stages,
        totals: Totals,
    ) -> None:
        self._overridden = overridden
        self._name = name
        self._device = device
        self._autocast = dtypes.autocast
        self._copies = Copies(device, dtypes.inputs, streams=copy_streams and device.type == "cuda")
        self._stages = stages
        self._totals = totals
        self.errors = ErrorColumn(name, overridden)
        self.first_failure: Exception | None = None
        self.any_row_passed = False

    def before(self, job: Job, rows: range) -> MicroBatch:
        """Return the rows of the job as a micro-batch with the model's inputs on their way to the device."""
        methods = job.methods
        batch = job.table.slice(rows.start, len(rows))
        part = MicroBatch(batch, batch, {})
        with self._totals.stage("preprocess"):
            try:
                part.values, part.event = self._copies.begin(methods.preprocess(batch))
            except Exception as error:
                if is_fatal(error) or methods.on_error == "raise" or not len(batch):
                    raise
                if "preprocess" not in self._overridden:
                    methods.preprocess(failed_rows.no_rows(batch))  # raises if the column is wrong, not a row
                self._find_failing(part, lambda b: in_stage("preprocess", methods.preprocess, b), error, "preprocess")
                if not part.all_failed:
                    part.values, part.event = self._copies.begin(methods.preprocess(part.good))
        return part

    def _find_failing(self, part: MicroBatch, function: Any, error: Exception, stage: str) -> None:
        """Move the rows of the part on which `function` raises from `good` to `errors`."""
        good = [row for row in range(len(part.batch)) if row not in part.errors]
        found = failed_rows.failing_rows(function, part.good, StageError(stage, error))
        part.errors |= {good[row]: said for row, said in found.items()}
        part.good = failed_rows.without(part.batch, part.errors)

    def model(self, job: Job, part: MicroBatch) -> MicroBatch:
        """Call `predict` for a micro-batch."""
        if part.all_failed:
            return part
        values, part.values = part.values, None
        with self._totals.stage("predict"):
            try:
                part.values, part.event = self._forward(job.methods, values, part.event)
            except Exception as error:
                if is_fatal(error) or job.methods.on_error == "raise" or not len(part.good):
                    raise
                part.failure, part.event = StageError("predict", error), None
        return part

    def _forward(self, methods: Methods, inputs: Any, event: Any) -> tuple[Any, Any]:
        inputs = self._copies.arrive(inputs, event)
        with self._device_context():
            outputs = methods.predict(inputs)
        return self._copies.leave(outputs)

    def after(self, job: Job, part: MicroBatch) -> Any:
        """Return the rows for a micro-batch: what `postprocess` returned, with nulls for failed rows."""
        methods = job.methods
        if part.event is not None:
            with self._totals.stage("predict"):  # which only began the work on the device
                part.event.synchronize()
        with self._totals.stage("postprocess"):
            rows = None if part.all_failed else self._rows_of_good(job, part)
            if part.all_failed:
                rows = self.errors.all_failed(part.batch, part.errors, methods)
            else:
                rows = rows if inspect.isgenerator(rows) else to_rows(rows, self._name)
                if methods.on_error == "null":
                    rows = self.errors.with_nulls(rows, part.good, part.batch, part.errors, methods.error_column)
                    self.any_row_passed = self.any_row_passed or len(part.good) > 0
            if job.keep_rows:
                check_rows(rows, len(part.batch), self._name)
        if part.errors and not self._totals.failed_rows:
            first = next(iter(part.errors.values()))
            log(f"{self._name}: {len(part.errors)} of {len(part.batch)} rows failed, the first in {first}")
        self._totals.count(rows=len(part.batch), failed_rows=len(part.errors))
        return rows

    def _rows_of_good(self, job: Job, part: MicroBatch) -> Any:
        """Return what `postprocess` returns for the good rows, after those that fail are found."""
        methods = job.methods
        failure = part.failure
        if failure is None:
            outputs, part.values = self._copies.end(part.values, part.event), None
            try:
                return methods.postprocess(outputs, part.good)
            except Exception as error:
                if is_fatal(error) or methods.on_error == "raise" or not len(part.good):
                    raise
                failure = StageError("postprocess", error)
        self._find_failing(part, lambda batch: self._all_stages(job, batch), failure.error, failure.stage)
        if part.all_failed:
            self.first_failure = self.first_failure or failure.error
            return None
        try:
            return self._all_stages(job, part.good)
        except StageError as error:
            raise error.error from None

    def _all_stages(self, job: Job, batch: pa.Table) -> Any:
        """Take rows through the three methods, one after the other; an error says in which it was raised."""
        methods, stages = job.methods, self._stages
        values, event = in_stage("preprocess", lambda: self._copies.begin(methods.preprocess(batch)))
        values, event = in_stage(
            "predict", lambda: stages.call_model(self._forward, methods, values, event, in_thread=job.in_parts)
        )
        if event is not None:
            event.synchronize()
        return in_stage("postprocess", methods.postprocess, self._copies.end(values, event), batch)

    @contextlib.contextmanager
    def _device_context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))  # a thread begins with the first one
            if self._autocast is not None:
                stack.enter_context(torch.autocast(self._device.type, self._autocast))
            yield
