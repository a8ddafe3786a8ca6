"""The garbage collector, put off while objects are made that stay: a load makes thousands, an import 100,000s."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

__all__ = ["put_off", "put_off_to_import"]

_lock = threading.Lock()
_blocks = 0  # in how many blocks the threads of this process are
_threshold = 0  # how many new objects make it run, before the first of them


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Let the collector wait, in all threads, until the last of these blocks ends.

    By its threshold, so that code which a block runs, or another thread, may turn it off or on for its own reasons.
    """
    global _blocks, _threshold
    with _lock:
        _blocks += 1
        if _blocks == 1:
            _threshold = gc.get_threshold()[0]
            gc.set_threshold(0)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and gc.get_threshold()[0] == 0:
                gc.set_threshold(_threshold)


@contextlib.contextmanager
def put_off_to_import(module: str) -> Iterator[None]:
    """Let the collector wait while a module is imported that may not be yet.

    An import of torch or transformers makes objects by the 100,000 that stay as long as the process: going over
    them again and again as young ones is a quarter of the time such an import takes. Afterwards they count as old
    (CPython's own gc.freeze and gc.unfreeze do this), so that they are not gone over at once.
    """
    if module in sys.modules:
        yield
        return
    with put_off():
        try:
            yield
        finally:
            if not gc.get_freeze_count():  # else unfreeze() would undo what someone wanted
                gc.freeze()
                gc.unfreeze()
