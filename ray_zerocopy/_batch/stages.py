"""Three stages at once: while one part of a batch is in the model, the next is prepared and the one before finished.

Note [The threads of a predictor]

    thread     of                    runs                                        part:  3   2   1
    before     each calling thread   preprocess, copies to the device                   x
    model      the predictor         predict: of all calls, one after the other             x
    after      each calling thread   copies to the host, postprocess                            x

Each runs its parts in order, so results come in order. At most `DEPTH` parts are between the first thread and the
caller, whatever the speeds. The model is only ever called in the one thread, also for batches that are not split.
A call that fails starts no further part and waits for what runs. One whose results nobody takes any more starts no
further part either, and waits for nothing: Python may collect it in one of these very threads. The threads end with
the predictor; those of a calling thread end with that, too.

torch keeps inference mode and the number of threads for each thread: every stage enters the one, and takes the
other from the calling thread, so that sums come out bit for bit as they do without overlap.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

__all__ = ["DEPTH", "Stages", "annotate_errors", "inference_context", "ranges"]

DEPTH = 4
Result = TypeVar("Result")


class Stages:
    """The threads of one predictor, and the way of parts through them."""

    def __init__(self) -> None:
        self._model = ThreadPoolExecutor(1, "ray_zerocopy-model")
        self._callers = threading.local()

    def in_model_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function in the model's thread, once that is free, and return what it returns."""
        return self._model.submit(inference_context, torch.get_num_threads(), function, *args).result()

    def overlap(
        self,
        parts: Iterator[range],
        before: Callable[[range], Any],
        model: Callable[[Any], Any],
        after: Callable[[Any], Result],
    ) -> Iterator[tuple[range, Result]]:
        """Yield each part with what `after(model(before(part)))` gave for it, in order.

        The first part that failed raises what its stage raised; later parts have no effect then. Close the
        iterator, or let it go, and the rest is not begun.
        """
        threads = torch.get_num_threads()
        first, last = self._of_caller()
        failed: list[int] = []  # parts; those behind them are for nothing

        def stage(part: range, function: Callable[..., Any], *args: Any) -> Any:
            if any(part.start > start for start in failed):
                raise CancelledError
            try:
                return inference_context(threads, function, *args)
            except BaseException:
                failed.append(part.start)
                raise

        def begin(part: range) -> Future[Any]:
            inputs = stage(part, before, part)
            return self._model.submit(stage, part, model, inputs)

        def finish(part: range, begun: Future[Future[Any]]) -> Result:
            outputs = begun.result().result()
            result: Result = stage(part, after, outputs)
            return result

        pending: deque[tuple[range, Future[Result]]] = deque()
        try:
            for part in parts:
                pending.append((part, last.submit(finish, part, first.submit(begin, part))))
                if len(pending) == DEPTH:
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
        except GeneratorExit:
            failed.append(-1)
            raise
        except BaseException:
            failed.append(-1)
            wait([future for _, future in pending])
            raise

    def _of_caller(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        try:
            pair: tuple[ThreadPoolExecutor, ThreadPoolExecutor] = self._callers.pair
        except AttributeError:
            pair = ThreadPoolExecutor(1, "ray_zerocopy-before"), ThreadPoolExecutor(1, "ray_zerocopy-after")
            self._callers.pair = pair
        return pair


def ranges(begin: int, end: int, size: int) -> Iterator[range]:
    """Yield the rows from `begin` to `end` in ranges of `size`, the last of what is left."""
    for start in range(begin, end, size):
        yield range(start, min(start + size, end))


def inference_context(threads: int, function: Callable[..., Result], *args: Any) -> Result:
    """Run a stage's function with inference mode and the number of threads.

    A StopIteration becomes a RuntimeError, as Python does where it leaves a generator: parts go through several.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        try:
            return function(*args)
        except StopIteration as error:
            raise RuntimeError("StopIteration was raised by a method, which nothing there iterates over") from error


def _result(part: range, future: Future[Result]) -> tuple[range, Result]:
    with annotate_errors(part):
        return part, future.result()


# ---------------------------------------------------------------- where an exception came from


class RowsOfBatch(Exception):
    """Says, as the last cause of another exception, which rows of a batch it came from (Python 3.10)."""


@contextlib.contextmanager
def annotate_errors(part: range) -> Iterator[None]:
    """Add the rows of the part to an exception of the block."""
    try:
        yield
    except Exception as error:
        add_note(error, f"in rows {part.start} to {part.stop - 1} of the batch")
        raise


_NOTE = re.compile(r"in rows \d+ to \d+ of the batch")


def add_note(error: Exception, note: str) -> None:
    """Add a note that the exception's traceback shows; the exception stays what it is.

    In place of such a note of before: an object that is raised again is where it is raised last.
    """
    if sys.version_info >= (3, 11):
        if notes := getattr(error, "__notes__", None):
            notes[:] = [other for other in notes if not _NOTE.fullmatch(other)]
        error.add_note(note)
    else:
        add_cause(error, note)


def add_cause(error: BaseException, note: str) -> None:
    """Add the note where Python 3.10 shows one: as the cause of what caused the exception first."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        if isinstance(cause, RowsOfBatch):
            break
        seen.add(id(cause))
        error = cause
    error.__cause__ = RowsOfBatch(note)
