"""Where a predictor's time went: a running total in the process, and the same numbers for Ray's metrics."""

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
        seconds: For each stage, and for "waiting": how long no batch was there.
        batches: How many batches were completed.
        rows: How many rows came in with them.
        failed_rows: How many of these were written as nulls.
        retries: How often the device's memory was too small for a part of a batch.
    """

    def __init__(self, name: str, load_seconds: float, shared: int, private: int) -> None:
        self.name = name
        self.seconds = dict.fromkeys(("waiting", *STAGES), 0.0)
        self.batches = self.rows = self.failed_rows = self.retries = 0
        self._lock = threading.Lock()
        self._active = 0
        self._began = self._idle_since = self._said = time.perf_counter()
        self._pause = 0.0
        self._said_batches = 0
        self._metrics = _metrics() if ray.is_initialized() else None
        self._tags = {"predictor": name}
        if self._metrics:
            self._metrics["load_seconds"].observe(load_seconds, self._tags)
            self._metrics["bytes_shared"].set(shared, self._tags)
            self._metrics["bytes_private"].set(private, self._tags)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark that a batch is there, and so the time between two of these as waiting."""
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
        """Add what the block takes to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._add(stage, time.perf_counter() - begin)

    def count(self, *, batches: int = 0, rows: int = 0, failed_rows: int = 0, retries: int = 0) -> None:
        """Add to what is counted."""
        with self._lock:
            self.batches += batches
            for what, count in (("rows", rows), ("failed_rows", failed_rows), ("retries", retries)):
                if count:
                    setattr(self, what, getattr(self, what) + count)
                    if self._metrics:
                        self._metrics[what].inc(count, self._tags)

    def due(self, *, last: bool = False) -> bool:
        """Say that it is time for a line in the log: after the first batch, less and less often, and at last.

        Not only at last: what an actor says as it ends is lost where the driver ends, or leaves Ray, right after.
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
        retried = f"; {self.retries} retries for want of device memory" if self.retries else ""
        return (
            f"{self.name}: {self.rows} rows{failed} in {self.batches} batches and {total:.2f} s "
            f"since it was loaded: {spent}{retried}"
        )


@functools.cache
def _metrics() -> dict[str, Any]:
    """Make the metrics, once in a process; Ray puts `ray_` before their names."""
    from ray.util.metrics import Counter, Gauge, Histogram

    tags = ("predictor",)
    made: list[tuple[str, Any]] = [
        ("load_seconds", Histogram("zerocopy_load_seconds", "Time to load a model.", BOUNDARIES, tags)),
        ("bytes_shared", Gauge("zerocopy_bytes_shared", "Weights that are pages of the object store.", tags)),
        ("bytes_private", Gauge("zerocopy_bytes_private", "Weights that had to be copied.", tags)),
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
        ("failed_rows", Counter("zerocopy_failed_rows", "Rows written as nulls, preprocess having failed.", tags)),
        ("retries", Counter("zerocopy_memory_retries", "Batches split for want of device memory.", tags)),
    ]
    return dict(made)
