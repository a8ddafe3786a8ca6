"""Run code that recurses deeper than Python allows, such as the pickling of 400 nested modules."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["DEEPEST", "is_deep_thread", "is_too_deep", "run_deep"]

T = TypeVar("T")

# The recursion limit in the thread, and the size of the thread's stack. The kernel provides pages that are touched.
DEEPEST = 100_000
_STACK_BYTES = 512 << 20
_lock = threading.Lock()
_running: threading.Thread | None = None


def is_too_deep(error: BaseException) -> bool:
    """Tell whether an error says that the recursion limit was met."""
    return isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)


def is_deep_thread() -> bool:
    """Tell whether the calling thread is one that `run_deep` started."""
    return threading.current_thread() is _running


def run_deep(function: Callable[[], T]) -> T:
    """Call a function in a thread with a large stack, and return its result. The recursion limit is higher meanwhile.

    Raises:
        RuntimeError: The thread cannot be started, for want of memory.
    """
    global _running
    outcome: list[Any] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.append((context.run(function), None))
        except BaseException as error:
            outcome.append((None, error))

    with _lock:
        limit, size = sys.getrecursionlimit(), threading.stack_size(_STACK_BYTES)
        try:
            thread = _running = threading.Thread(target=run, name="ray_zerocopy-deep", daemon=True)
            sys.setrecursionlimit(max(limit, DEEPEST))
            thread.start()
            threading.stack_size(size)
            thread.join()
        finally:
            threading.stack_size(size)
            sys.setrecursionlimit(limit)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
