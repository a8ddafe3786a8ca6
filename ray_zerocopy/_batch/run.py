"""One batch through a predictor's methods: order, micro-batches, stages, failed rows, memory errors, totals.

Note [The way of a batch]

    batch -> table -> sorted -> micro-batches -> preprocess -> to the device -> predict -> to the host -> postprocess
          -> rows in the batch's own order

`BatchRunner` needs neither Ray Data nor Ray: the tests run it on any object that has the options and the methods.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import logging
import time
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import log
from .defaults import Dtypes
from .lengths import SortedBatch, sort_rows
from .part import Job, Methods, MicroBatches
from .sizes import PartSizes
from .stages import DEPTH, Stages, annotate_errors
from .tables import each_to_rows, joined, to_arrow
from .totals import Totals

__all__ = ["BatchRunner"]


class BatchRunner:
    """Takes batches through `preprocess`, `predict` and `postprocess` of one object.

    The object is an argument of `run` and is not kept, so that the model is freed together with its predictor.

    Args:
        overridden: Which of the three methods the user wrote.
        name: How errors and log lines call the object.
        device: Where the model is.
        dtypes: What inputs are cast to, and whether the forward runs under autocast.
        copy_streams: Whether copies to and from a CUDA device run on streams beside the model.
        few_shapes: Whether the numbers of rows of micro-batches are powers of two.
        concurrent_stages: Whether `preprocess` and `postprocess` may run at the same time.
        inference_mode: Whether the methods run under `torch.inference_mode()`.
        totals: Counts the time and the rows.
    """

    def __init__(
        self,
        *,
        overridden: Collection[str],
        name: str,
        device: torch.device,
        dtypes: Dtypes,
        copy_streams: bool,
        few_shapes: bool = False,
        concurrent_stages: bool = False,
        inference_mode: bool = True,
        totals: Totals,
    ) -> None:
        cuda = device.type == "cuda"
        self._name = name
        self._device = device
        self._totals = totals
        self._stages = Stages(concurrent=concurrent_stages, inference_mode=inference_mode)
        self._sizes = PartSizes(name, cuda=cuda, few_shapes=few_shapes or cuda)
        self._work = MicroBatches(
            overridden=overridden,
            name=name,
            device=device,
            dtypes=dtypes,
            copy_streams=copy_streams,
            stages=self._stages,
            totals=totals,
        )
        self._warned_of_split = self._warned_of_lengths = False

    def run(self, methods: Methods, batch: Any) -> Any:
        """Return the rows for a batch of any format that Ray Data gives, or a generator of rows."""
        with self._totals.busy():
            table = to_arrow(batch, self._name)
            in_parts = methods.micro_batch_size is not None or methods.sort_by is not None
            job, batch = Job(methods, table, np.ones(len(table)), in_parts=in_parts), None
            if methods.sort_by is not None:
                batch = self._sort(job)
            results = self._results(job)
            first = next(results)
            parts = [first] if inspect.isgenerator(first[1]) else [first, *results]
            if any(inspect.isgenerator(rows) for _, rows in parts):
                return self._from_generators(itertools.chain(parts, results), job)
        if methods.on_error == "null":
            parts = self._with_all_columns(job, parts)
        self._count_batch()
        if job.keep_rows:
            return batch.put_back(parts, self._name)
        return parts[0][1] if len(parts) == 1 else joined([rows for _, rows in parts])

    def _sort(self, job: Job) -> SortedBatch:
        """Order the rows of the job by length. Return the sorted batch, which can put results back."""
        methods, skip = job.methods, job.methods.on_error == "null"
        with self._stages.host(), self._totals.stage("preprocess"):
            batch, failed = sort_rows(job.table, methods.sort_by, self._name, skip_failing=skip)
        if failed and not self._warned_of_lengths:
            self._warned_of_lengths = True
            log(f"{self._name}: sort_by failed for some rows, which get length 0. The first raised {failed}")
        job.table, job.lengths, job.order, job.keep_rows = batch.table, batch.lengths, batch.order, True
        if not methods.preserve_order:
            job.keep_rows = False
        return batch

    def _from_generators(self, results: Iterator[tuple[range, Any]], job: Job) -> Iterator[Any]:
        """Yield the rows of each part's generator; its code runs when the caller asks for rows."""

        @contextlib.contextmanager
        def step() -> Iterator[None]:
            with (
                annotate_errors(part, len(job.table), job.order),
                self._totals.busy(),
                self._stages.host(),
                self._totals.stage("postprocess"),
            ):
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

    def _results(self, job: Job) -> Iterator[tuple[range, Any]]:
        """Yield each part of the batch with what `postprocess` returned for it, in order.

        If the device's memory is too small for a part, that part and what follows are split into halves. The size is
        remembered for later batches, unless the part was smaller than one that fitted before it.
        """
        work = self._work
        stages = (
            lambda part: work.before(job, part),
            lambda part: work.model(job, part),
            lambda part: work.after(job, part),
        )
        sizes, end = self._sizes, len(job.table)
        begin, limit, split = 0, float("inf"), False
        sizes.start_batch(job.methods, job.lengths)
        while True:
            issued: dict[int, range] = {}
            parts = (issued.setdefault(p.start, p) for p in sizes.parts(job.methods, job.lengths, begin, limit))
            if not job.in_parts:
                results = self._stages.one_by_one(parts, *stages, total=end)
            else:
                depth = 1 if sizes.is_trying(job.methods) else DEPTH
                results = self._stages.overlap(parts, *stages, total=end, order=job.order, depth=depth)
            try:
                began = time.perf_counter()
                for part, rows in results:
                    sizes.done(job.methods, job.lengths, part, time.perf_counter() - began)
                    yield part, rows
                    begin, began = part.stop, time.perf_counter()
                break
            except torch.cuda.OutOfMemoryError:
                if len(issued[begin]) <= 1:
                    raise
            limit, remembered = sizes.did_not_fit(job.lengths, issued[begin])
            split = split or remembered
            self._free_memory()
        if split:
            self._warn_of_split(job)

    def _with_all_columns(self, job: Job, parts: list[tuple[range, pa.Table]]) -> list[tuple[range, pa.Table]]:
        work = self._work
        if work.first_failure is not None and not work.any_row_passed:
            raise work.first_failure  # it is about the model or the class, not about single rows
        work.first_failure = None
        parts, known = work.errors.complete(parts, job.table, job.methods.error_column)
        if len(job.table) and not known:
            log(
                f"{self._name}: all {len(job.table)} rows failed before any row passed, so these rows have only the "
                f"columns {', '.join(map(repr, parts[0][1].column_names))}.",
                logging.WARNING,
            )
        return parts

    def _free_memory(self) -> None:
        self._totals.count(retries=1)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _warn_of_split(self, job: Job) -> None:
        if not self._warned_of_split:
            self._warned_of_split = True
            size, unit = int(self._sizes.tokens_that_fit), "rows" if job.order is None else "tokens"
            option = "micro_batch_size" if job.order is None else "micro_batch_tokens"
            log(
                f"{self._name}: {self._device} has too little memory for a batch of {len(job.table)} rows. The actor "
                f"now gives the model at most {size} {unit} at a time, or fewer if needed. Set {option}={size} to "
                f"start with that size.",
                logging.WARNING,
            )
