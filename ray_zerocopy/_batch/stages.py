"""The stages of a predictor: host work and the model, one after the other or overlapped.

Note [The threads of a predictor]

Without micro-batches all stages run in the calling thread. With micro-batches the model has a thread, and works on
one part while the calling thread finishes the part before and prepares the part after::

    calling thread    before 1 | before 2 | after 1 | before 3 | after 2 | ...
    model thread               | model 1 ---- | model 2 ---- | model 3 ---- | ...

`before` is `preprocess`, and `after` is `postprocess`; they take turns.

`preprocess` and `postprocess` are methods of one object, which often has state that two threads must not use at once
(a tokenizer with its truncation, a connection to a database). So the host stages of all calling threads hold one
lock, and the model holds another. With `concurrent` the host stages need no lock, and each calling thread gets a
second thread, in which `after` runs.

Each stage takes its parts in order, so results come in order. At most `DEPTH` parts are begun and not yet returned. A
call that fails begins no further part and waits for the model. If nobody takes the results, the call begins no
further part and does not wait, because Python may collect it in one of these threads. The threads end with the
predictor, and those of a calling thread end with that thread.

torch keeps inference mode and the number of threads for each thread. Every stage enters inference mode, or leaves it.
The model's thread copies the number of threads of the calling thread whenever that number changes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar, cast

import torch

from .._model.gradients import inference_context

__all__ = ["DEPTH", "Stages", "annotate_errors", "stage_context"]

DEPTH = 3
MOST_NAMED = 16  # how many rows of a sorted batch a note names
Result = TypeVar("Result")
_GRADIENTS = (
    "The methods of a ZeroCopyPredictor run under torch.inference_mode(). To compute gradients, set the class "
    "attribute inference_mode = False, or the option: using(model_ref, inference_mode=False)."
)


class Stages:
    """The locks and threads of one predictor.

    Args:
        concurrent: Whether host stages may run at the same time as each other.
        inference_mode: Whether the stages run under `torch.inference_mode()`.
    """

    def __init__(self, *, concurrent: bool = False, inference_mode: bool = True) -> None:
        self._concurrent = concurrent
        self._context = functools.partial(stage_context, inference_mode)
        self._host_lock: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if concurrent else threading.RLock()
        )
        self._model_lock = threading.Lock()
        self._model_thread = ThreadPoolExecutor(1, "ray_zerocopy-model")
        self._number_of_threads: int | None = None  # that the model's thread uses
        self._callers = threading.local()

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Run the block as a host stage, not at the same time as another."""
        with self._host_lock, self._context():
            yield

    def one_by_one(
        self,
        parts: Iterable[range],
        before: Callable[[range], Any],
        model: Callable[[Any], Any],
        after: Callable[[Any], Result],
        *,
        total: int | None = None,
        order: Sequence[int] | None = None,
    ) -> Iterator[tuple[range, Result]]:
        """Yield each part with `after(model(before(part)))`, all in the calling thread.

        An error says which rows it comes from, unless the part has all of the `total` rows. If the batch was sorted,
        `order` has the number of each row in the batch.
        """
        for part in parts:
            with annotate_errors(part, total, order):
                with self.host():
                    inputs = before(part)
                with self._model_lock, self._context():
                    outputs = model(inputs)
                with self.host():
                    result = after(outputs)
            yield part, result

    def overlap(
        self,
        parts: Iterable[range],
        before: Callable[[range], Any],
        model: Callable[[Any], Any],
        after: Callable[[Any], Result],
        *,
        total: int | None = None,
        order: Sequence[int] | None = None,
        depth: int = DEPTH,
    ) -> Iterator[tuple[range, Result]]:
        """Yield each part with `after(model(before(part)))`, in order.

        The first part that failed raises the exception of its stage; later parts then have no effect. If the caller
        closes or drops the iterator, no further part begins. Errors are annotated as in `one_by_one`. At most
        `depth` parts are in progress: with 1, a part is finished before the next begins.
        """
        failed: list[int] = []  # the first row of each part that failed; later parts stop

        def run(part: range, context: contextlib.AbstractContextManager[Any], function: Any, *args: Any) -> Any:
            if any(part.start > start for start in failed):
                raise CancelledError
            try:
                with context:
                    return function(*args)
            except BaseException:
                failed.append(part.start)
                raise

        def begin(part: range) -> Future[Any]:
            try:
                inputs = run(part, self.host(), before, part)
            except Exception as error:  # it is raised in its turn, after the earlier parts
                return _failed_future(error)
            context = self._in_model_thread(torch.get_num_threads())
            return self._model_thread.submit(run, part, context, model, inputs)

        def finish(part: range, future: Future[Any]) -> Result:
            return cast("Result", run(part, self.host(), after, future.result()))

        pending: deque[tuple[range, Callable[[], Result]]] = deque()
        futures: deque[Future[Any]] = deque(maxlen=2 * DEPTH)
        try:
            for part in parts:
                future = begin(part)
                futures.append(future)
                pending.append((part, self._finishing(finish, part, future, futures)))
                if failed:
                    break
                if len(pending) == depth:
                    yield _take(*pending.popleft(), total, order)
            while pending:
                yield _take(*pending.popleft(), total, order)
        except GeneratorExit:
            failed.append(-1)
            raise
        except BaseException:
            failed.append(-1)
            wait(futures)
            raise

    def call_model(self, function: Callable[..., Result], *args: Any, in_thread: bool) -> Result:
        """Return `function(*args)`, called as the model is: alone, and in the model's thread if `in_thread`.

        A host stage may call this, because the model never waits for a host stage.
        """
        if not in_thread:
            with self._model_lock, self._context():
                return function(*args)

        def call(context: contextlib.AbstractContextManager[None]) -> Result:
            with context:
                return function(*args)

        return self._model_thread.submit(call, self._in_model_thread(torch.get_num_threads())).result()

    @contextlib.contextmanager
    def _in_model_thread(self, number_of_threads: int) -> Iterator[None]:
        with self._model_lock, self._context():
            if number_of_threads != self._number_of_threads:
                torch.set_num_threads(number_of_threads)
                self._number_of_threads = number_of_threads
            yield

    def _finishing(
        self,
        finish: Callable[[range, Future[Any]], Result],
        part: range,
        future: Future[Any],
        futures: deque[Future[Any]],
    ) -> Callable[[], Result]:
        """Return a function that returns the result of a part: it finishes the part, or waits for another thread."""
        if not self._concurrent:
            return lambda: finish(part, future)
        try:
            thread: ThreadPoolExecutor = self._callers.thread
        except AttributeError:
            thread = self._callers.thread = ThreadPoolExecutor(1, "ray_zerocopy-after")
        finished = thread.submit(finish, part, future)
        futures.append(finished)
        return finished.result


@contextlib.contextmanager
def stage_context(inference_mode: bool = True) -> Iterator[None]:
    """Run a block in inference mode, or with gradients.

    A StopIteration becomes a RuntimeError. Otherwise it would silently end the generators that yield the parts.
    """
    with inference_context(inference_mode, _GRADIENTS):
        try:
            yield
        except StopIteration as error:
            raise RuntimeError("a method of the predictor raised StopIteration outside of a generator") from error


def _failed_future(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _take(
    part: range, result: Callable[[], Result], total: int | None, order: Sequence[int] | None
) -> tuple[range, Result]:
    with annotate_errors(part, total, order):
        return part, result()


# ---------------------------------------------------------------- where an exception came from


class RowsOfBatch(Exception):
    """The rows of a batch that an exception came from, as the last cause of that exception (Python 3.10)."""


@contextlib.contextmanager
def annotate_errors(part: range, total: int | None = None, order: Sequence[int] | None = None) -> Iterator[None]:
    """Add the rows of the part to an exception of the block, unless they are all of `total` rows."""
    try:
        yield
    except Exception as error:
        if len(part) == total:
            raise
        add_note(error, f"in {_name_rows(part, order)} of the batch")
        raise


def _name_rows(part: range, order: Sequence[int] | None) -> str:
    if order is None:
        return f"rows {part.start} to {part.stop - 1}"
    rows = sorted(int(order[row]) for row in part[:MOST_NAMED])
    more = f" and {len(part) - MOST_NAMED} more" if len(part) > MOST_NAMED else ""
    return f"rows {', '.join(map(str, rows))}{more}"


_NOTE = re.compile(r"in rows [^:]* of the batch")


def add_note(error: Exception, note: str) -> None:
    """Add a note that the exception's traceback shows.

    It replaces an earlier note of this kind: an exception object that is raised again belongs to the later rows.
    """
    if sys.version_info >= (3, 11):
        if notes := getattr(error, "__notes__", None):
            notes[:] = [other for other in notes if not _NOTE.fullmatch(other)]
        error.add_note(note)
    else:
        add_cause(error, note)


def add_cause(error: BaseException, note: str) -> None:
    """Add the note for Python 3.10: as the cause of the first exception in the chain of causes."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        if isinstance(cause, RowsOfBatch):
            break
        seen.add(id(cause))
        error = cause
    error.__cause__ = RowsOfBatch(note)
