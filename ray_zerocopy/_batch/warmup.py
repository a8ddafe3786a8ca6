"""The warm-up of a predictor, and how long an actor took from its start until it was ready."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from .run import BatchRunner
from .tables import described

__all__ = ["Start", "describe_start", "is_constructed_by", "run_warmup", "warm_up"]


class Start(NamedTuple):
    """Where the time of a new actor went, in seconds.

    Attributes:
        process: From the start of the process until it imported this package.
        imports: Importing this package, torch and the classes of the model.
        load: Loading the model.
        compile: Compiling the model in the warm-up.
        warm_up: The warm-up without compiling.
    """

    process: float
    imports: float
    load: float
    compile: float = 0.0
    warm_up: float = 0.0


def describe_start(start: Start) -> str:
    """Return the split for the log: `process start 1.2 s, imports 4.1 s, load 0.00 s`."""
    spent = [("process start", start.process), ("imports", start.imports), ("load", start.load)]
    if start.compile or start.warm_up:
        spent += [("compile", start.compile), ("warm-up", start.warm_up)]
    return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in spent)


def is_constructed_by(cls: type, owner: type) -> bool:
    """Tell whether the `__init__` of `owner` is the last to return for a new `cls`. Ray's classes do not count."""
    mro = [kind for kind in cls.__mro__ if not kind.__module__.startswith("ray.")]
    return next(kind for kind in mro if "__init__" in kind.__dict__) is owner


def warm_up(predictor: Any, runner: BatchRunner, name: str, start: Start) -> tuple[Start, int]:
    """Run the option `warmup`. Return where the time of the actor went, and the number of rows."""
    compiled, begin = _compile_seconds(), time.perf_counter()
    rows = run_warmup(predictor, runner, name)
    compiled = _compile_seconds() - compiled
    return start._replace(compile=compiled, warm_up=max(time.perf_counter() - begin - compiled, 0.0)), rows


def _compile_seconds() -> float:
    """Return the seconds that torch.compile took in this process so far."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    with contextlib.suppress(Exception):  # the counters are not a public API of torch
        return float(dynamo.calculate_time_spent()["total_wall_time"])
    return 0.0


def run_warmup(predictor: Any, runner: BatchRunner, name: str) -> int:
    """Run the batch of the option `warmup` through the methods of a predictor. Return its number of rows.

    Raises:
        TypeError: The option, or what its function returned, is no batch.
        ValueError: The batch has no rows.
    """
    batch = predictor.warmup
    if not isinstance(batch, (pa.Table, pa.RecordBatch, Mapping)):
        batch = batch()
    if not isinstance(batch, (pa.Table, pa.RecordBatch, Mapping)):
        raise TypeError(f"{name}.warmup returned {described(batch)}. Return a pyarrow.Table, or a dict of columns.")
    rows = batch.num_rows if not isinstance(batch, Mapping) else len(next(iter(batch.values()), ()))
    if not rows:
        raise ValueError(f"{name}.warmup has no rows. Give a batch like those of the dataset.")
    on_error, predictor.on_error = predictor.on_error, "raise"  # a warm-up of failed rows warms nothing up
    try:
        result = runner.run(predictor, batch)
        if inspect.isgenerator(result):
            for _ in result:
                pass
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"{name}: this was raised by the batch of warmup, before the first batch of the dataset.")
        raise
    finally:
        predictor.on_error = on_error
    return int(rows)
