"""Page-lock host buffers, so that a device can copy from them directly, without a slot."""

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


# Two spans go into one slot only if at most this many bytes are between them. These bytes are padding between
# storages, and the slot has zeros for them.
PADDING = 512
_locks: weakref.WeakKeyDictionary[Any, PageLock] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


def page_lock_of(
    key: object, device: torch.device, ranges: Sequence[tuple[int, int]], keep_alive: object
) -> PageLock:
    """Return the page lock for `key`. The first call makes it, and it is closed when `key` is deleted."""
    with _locking:
        lock = _locks.get(key)
        if lock is None:
            lock = _locks[key] = PageLock(device, ranges, keep_alive)
        return lock


class DirectCopy(NamedTuple):
    """Bytes that the device copies without a slot: place in the arena, length, and a tensor over the host bytes."""

    place: int
    nbytes: int
    memory: torch.Tensor


class PageLock:
    """Page-locks the whole pages of host buffers until `close()`.

    Page-locking takes longer than one upload saves. It pays for a worker that uploads the same bytes many times.
    """

    def __init__(self, device: torch.device, ranges: Sequence[tuple[int, int]], keep_alive: object) -> None:
        self.ranges: list[tuple[int, int]] = []
        # Also runs when this object is deleted, and at exit. `keep_alive` is released after the pages are unlocked.
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
    """Divide spans into those that need a slot, and the parts in page-locked `ranges`, which the device reads."""
    by_slot: list[Span] = []
    direct: list[DirectCopy] = []
    for span in spans:
        begin = addresses[span.buffer] + span.offset
        end = begin + span.nbytes
        low, high = next(((max(begin, a), min(end, b)) for a, b in ranges if a < end and begin < b), (begin, begin))
        if span.cast is not None or high - low < PADDING:
            by_slot.append(span)
            continue
        for first, last in ((begin, low), (high, end)):
            if last > first:
                skip = first - begin
                by_slot.append(span._replace(place=span.place + skip, offset=span.offset + skip, nbytes=last - first))
        memory = torch.frombuffer(memory_at(low, high - low), dtype=torch.uint8)
        direct.append(DirectCopy(span.place + low - begin, high - low, memory))
    return by_slot, direct


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
            torch.zeros(1, device=device)  # CUDA reports the failed call at the next launch, and clears it
    raise ZeroCopyError(
        f"{nbytes} bytes of the object store cannot be page-locked (cudaHostRegister: "
        f"{runtime.cudaGetErrorString(error)}). Load with page_lock=False, or raise the limit of locked memory "
        f"(ulimit -l)."
    )


def memory_at(address: int, nbytes: int) -> Any:
    return (ctypes.c_uint8 * nbytes).from_address(address)
