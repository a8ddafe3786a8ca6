"""Where a predictor's time went: totals in the process, and the same numbers as Ray metrics."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

__all__ = ["STAGES", "SUMMARY_SECONDS", "Totals"]

SUMMARY_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5
STAGES = ("preprocess", "predict", "postprocess")
BOUNDARIES = [step * 10.0**exponent for exponent in range(-4, 3) for step in (1, 2, 5)]  # 0.1 ms to 500 s


class Totals:
    """Seconds and rows of one predictor since it was loaded.

    Attributes:
        seconds: The time in each stage, and in "waiting": no batch was being processed.
        batches: How many batches were completed.
        rows: How many rows came in with them.
        failed_rows: How many of these failed and were written as nulls.
        retries: How often the device's memory was too small for a part of a batch.

    Without `metrics`, as for a warm-up, the numbers go neither to Ray nor to the log.
    """

    def __init__(self, name: str, load_seconds: float, shared: int, private: int, *, metrics: bool = True) -> None:
        self.name = name
        self.seconds = dict.fromkeys(("waiting", *STAGES), 0.0)
        self.batches = self.rows = self.failed_rows = self.retries = 0
        self._lock = threading.Lock()
        self._active = 0
        self._began = self._idle_since = self._said = time.perf_counter()
        self._pause = 0.0 if metrics else float("inf")
        self._said_batches = 0
        self._metrics = _metrics() if metrics and ray.is_initialized() else None
        self._tags = {"predictor": name}
        if self._metrics:
            self._metrics["load_seconds"].observe(load_seconds, self._tags)
            self._metrics["bytes_shared"].set(shared, self._tags)
            self._metrics["bytes_private"].set(private, self._tags)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark that a batch is being processed. The time between batches counts as waiting."""
        with self._lock:
            if not self._active:
                self._add("waiting", time.perf_counter() - self._idle_since)
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                self._idle_since = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._add(stage, time.perf_counter() - begin)

    def count(self, *, batches: int = 0, rows: int = 0, failed_rows: int = 0, retries: int = 0) -> None:
        """Add to the counters."""
        with self._lock:
            self.batches += batches
            for what, count in (("rows", rows), ("failed_rows", failed_rows), ("retries", retries)):
                if count:
                    setattr(self, what, getattr(self, what) + count)
                    if self._metrics:
                        self._metrics[what].inc(count, self._tags)

    def due(self, *, last: bool = False) -> bool:
        """Return whether it is time for a log line: after the first batch, then less and less often, and at the end.

        A line at the end alone would be lost if the driver ends, or disconnects from Ray, right after.
        """
        with self._lock:
            now = time.perf_counter()
            said = self.batches == self._said_batches
            if due := not said and (last or now - self._said >= self._pause):
                self._said, self._said_batches = now, self.batches
                self._pause = min(max(FIRST_PAUSE_SECONDS, 2 * self._pause), SUMMARY_SECONDS)
            return due

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds
        if self._metrics:
            self._metrics["stage_seconds"].observe(seconds, {**self._tags, "stage": stage})

    def __str__(self) -> str:
        with self._lock:
            seconds = dict(self.seconds)
            total = (time.perf_counter() if self._active else self._idle_since) - self._began
        spent = ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in seconds)
        failed = f", {self.failed_rows} of them failed" if self.failed_rows else ""
        retried = f"; {self.retries} retries because device memory was full" if self.retries else ""
        return (
            f"{self.name}: {self.rows} rows{failed} in {self.batches} batches and {total:.2f} s "
            f"since it was loaded: {spent}{retried}"
        )


@functools.cache
def _metrics() -> dict[str, Any]:
    """Create the metrics, once in a process. Ray adds the prefix `ray_` to their names."""
    from ray.util.metrics import Counter, Gauge, Histogram

    tags = ("predictor",)
    made: list[tuple[str, Any]] = [
        ("load_seconds", Histogram("zerocopy_load_seconds", "Time to load a model.", BOUNDARIES, tags)),
        (
            "bytes_shared",
            Gauge("zerocopy_bytes_shared", "Bytes of weights that are shared pages of the object store.", tags),
        ),
        ("bytes_private", Gauge("zerocopy_bytes_private", "Bytes of weights that are private copies.", tags)),
        (
            "stage_seconds",
            Histogram(
                "zerocopy_stage_seconds",
                "Time of a part of a batch in a stage: waiting, preprocess, predict, postprocess.",
                BOUNDARIES,
                (*tags, "stage"),
            ),
        ),
        ("rows", Counter("zerocopy_rows", "Rows of the batches that were completed.", tags)),
        ("failed_rows", Counter("zerocopy_failed_rows", "Rows that failed and were written as nulls.", tags)),
        (
            "retries",
            Counter("zerocopy_memory_retries", "Parts of batches that did not fit into device memory.", tags),
        ),
    ]
    return dict(made)
