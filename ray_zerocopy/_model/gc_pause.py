"""The garbage collector, put off while objects are made that stay: a load makes thousands, an import 100,000s."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator

__all__ = ["gc_paused", "gc_paused_to_import"]

_lock = threading.RLock()  # a finalizer may run within it, and load a model
_blocks: dict[object, int] = {}  # the blocks that have begun and not ended, each with its thread
_threshold = 0  # how many new objects make the collector run, to be set again after the last of them
# CPython 3.12 freezes some hundreds of its own objects when it starts; gc.freeze() takes thousands at the least.
_FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Let the collector wait, in all threads, until the last of these blocks ends.

    By its threshold, so that code which a block runs, or another thread, may turn it off or on for its own reasons.
    """
    global _threshold
    block = object()
    try:
        with _lock:
            first = not _blocks
            _blocks[block] = threading.get_ident()
            if first:
                _threshold = _threshold or gc.get_threshold()[0]
                gc.set_threshold(0)
        yield
    finally:
        with _lock:
            _blocks.pop(block, None)
            _settle()


def _settle() -> None:
    global _threshold
    if _threshold and not _blocks:
        if gc.get_threshold()[0] == 0:
            gc.set_threshold(_threshold)
        _threshold = 0


def _after_fork() -> None:
    """End the blocks of the parent's other threads, which the child does not have, nor what they held."""
    global _lock
    _lock = threading.RLock()
    for block in [block for block, thread in _blocks.items() if thread != threading.get_ident()]:
        del _blocks[block]
    _settle()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def gc_paused_to_import(module: str) -> Iterator[None]:
    """Let the collector wait while a module is imported that may not be yet.

    An import of torch or transformers makes objects by the 100,000 that stay as long as the process: going over
    them again and again as young ones is a quarter of the time such an import takes. Afterwards they count as old
    (CPython's own gc.freeze and gc.unfreeze do this), so that they are not gone over at once.
    """
    if module in sys.modules:
        yield
        return
    with gc_paused():
        try:
            yield
        finally:
            if gc.get_freeze_count() < _FROZEN_BY_PYTHON:  # else unfreeze() would undo what someone wanted
                gc.freeze()
                gc.unfreeze()
