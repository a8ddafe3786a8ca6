"""Page-locking the source itself, so that a device reads the bytes from where they lie."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import ZeroCopyError
from .placement import Span

__all__ = ["DirectCopy", "PageLock", "memory_at", "page_lock_of", "split_by_lock"]


# Between two spans in one slot at most so many bytes of the arena are overwritten with zeros: the padding that aligns
# storages, and never a byte that is copied some other way.
PADDING = 512
_locks: weakref.WeakKeyDictionary[Any, PageLock] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


def page_lock_of(
    key: object, device: torch.device, ranges: Sequence[tuple[int, int]], keep_alive: object
) -> PageLock:
    """Return the page lock that goes with `key`; it is made at the first call and closed when `key` goes."""
    with _locking:
        lock = _locks.get(key)
        if lock is None:
            lock = _locks[key] = PageLock(device, ranges, keep_alive)
        return lock


class DirectCopy(NamedTuple):
    """Bytes that the device reads from where they are: place in the arena, how many, and a tensor over them."""

    place: int
    nbytes: int
    memory: torch.Tensor


class PageLock:
    """Page-locks the whole pages of host buffers until `close()`, so that the device reads them without a slot.

    That costs more than one upload gains; it pays for a worker that uploads the same bytes again and again.
    """

    def __init__(self, device: torch.device, ranges: Sequence[tuple[int, int]], keep_alive: object) -> None:
        self.ranges: list[tuple[int, int]] = []
        # Also runs when this goes, and at exit; what keeps the bytes there goes after it.
        self.close = weakref.finalize(self, _unregister, self.ranges, keep_alive)
        page = os.sysconf("SC_PAGE_SIZE")
        with torch.cuda.device(device):
            torch.cuda.init()  # type: ignore[no-untyped-call]
            try:
                for begin, end in ranges:
                    begin, end = -(-begin // page) * page, end // page * page
                    if end > begin:
                        _register(begin, end - begin, device)
                        self.ranges.append((begin, end))
            except BaseException:
                self.close()
                raise


def split_by_lock(
    spans: Sequence[Span], addresses: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> tuple[list[Span], list[DirectCopy]]:
    """Return what must go through slots, and what the device can read where it is: in page-locked ranges."""
    through: list[Span] = []
    direct: list[DirectCopy] = []
    for span in spans:
        begin = addresses[span.buffer] + span.offset
        end = begin + span.nbytes
        low, high = next(((max(begin, a), min(end, b)) for a, b in ranges if a < end and begin < b), (begin, begin))
        if span.cast is not None or high - low < PADDING:
            through.append(span)
            continue
        for first, last in ((begin, low), (high, end)):
            if last > first:
                skip = first - begin
                through.append(span._replace(place=span.place + skip, offset=span.offset + skip, nbytes=last - first))
        there = torch.frombuffer(memory_at(low, high - low), dtype=torch.uint8)
        direct.append(DirectCopy(span.place + low - begin, high - low, there))
    return through, direct


def _unregister(ranges: list[tuple[int, int]], _: object) -> None:
    while ranges:
        torch.cuda.cudart().cudaHostUnregister(ranges.pop()[0])  # type: ignore[no-untyped-call]


_PORTABLE, _READ_ONLY = 1, 8  # flags of cudaHostRegister


def _register(address: int, nbytes: int, device: torch.device) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for flags in (_PORTABLE | _READ_ONLY, _PORTABLE):
        error = runtime.cudaHostRegister(address, nbytes, flags)
        if int(error) == 0:
            return
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next launch reports the failed call, and clears it
    raise ZeroCopyError(
        f"{nbytes} bytes of the object store cannot be page-locked (cudaHostRegister: "
        f"{runtime.cudaGetErrorString(error)}). Load with page_lock=False, or raise the limit of locked memory "
        f"(ulimit -l)."
    )


def memory_at(address: int, nbytes: int) -> Any:
    return (ctypes.c_uint8 * nbytes).from_address(address)
