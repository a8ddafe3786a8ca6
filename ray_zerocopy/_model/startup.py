"""How long this process took until it had imported this package. Imported before torch."""

from __future__ import annotations

import contextlib
import os
import time

__all__ = ["import_seconds", "note_imports_done", "process_age", "process_seconds"]


def process_age() -> float:
    """Return the seconds since this process started; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    return 0.0


_begin = time.perf_counter()
_seconds = {"process": process_age(), "imports": 0.0}


def note_imports_done() -> None:
    _seconds["imports"] = time.perf_counter() - _begin


def process_seconds() -> float:
    """Return the age of the process when it began to import this package."""
    return _seconds["process"]


def import_seconds() -> float:
    """Return the seconds that the import of this package took, with torch if nothing had imported it before."""
    return _seconds["imports"]
