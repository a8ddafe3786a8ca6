"""Pause the garbage collector during loads and imports: they make many objects that stay, and hardly any garbage."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator

__all__ = ["pause_gc", "pause_gc_to_import"]

_lock = threading.RLock()  # reentrant: a finalizer may run while the lock is held, and load a model
_blocks: dict[object, int] = {}  # the `pause_gc` blocks that are running, each with its thread
_threshold = 0  # the collector's threshold before the first block, or 0 if no block is running
# CPython 3.12 freezes some hundreds of objects when it starts. A call of gc.freeze() freezes thousands.
_FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def pause_gc() -> Iterator[None]:
    """Pause the collector in all threads until the last of these blocks ends.

    Sets the collector's threshold to 0, and leaves `gc.enable` and `gc.disable` to other code.
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
            _restore_threshold()


def _restore_threshold() -> None:
    global _threshold
    if _threshold and not _blocks:
        if gc.get_threshold()[0] == 0:
            gc.set_threshold(_threshold)
        _threshold = 0


def _after_fork() -> None:
    """End the blocks of the parent's other threads, which do not exist in the child. Replace their lock."""
    global _lock
    _lock = threading.RLock()
    for block in [block for block, thread in _blocks.items() if thread != threading.get_ident()]:
        del _blocks[block]
    _restore_threshold()


os.register_at_fork(after_in_child=_after_fork)


_NOTHING = contextlib.nullcontext()


def pause_gc_to_import(module: str) -> contextlib.AbstractContextManager[None]:
    """Pause the collector during the first import of a module. Do nothing if the module is already imported.

    An import of torch or transformers makes hundreds of thousands of objects that stay. Collecting the young
    generations again and again takes a quarter of the import's time. After the import, `gc.freeze` and `gc.unfreeze`
    move the objects to the oldest generation, so that the next collection of young objects skips them.
    """
    return _NOTHING if module in sys.modules else _pause_and_settle()


@contextlib.contextmanager
def _pause_and_settle() -> Iterator[None]:
    with pause_gc():
        try:
            yield
        finally:
            # unfreeze() would also unfreeze the objects that a user has frozen.
            if gc.get_freeze_count() < _FROZEN_BY_PYTHON:
                gc.freeze()
                gc.unfreeze()
