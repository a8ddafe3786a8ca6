r"""Host bytes -> a device, by threads that fill page-locked slots. Knows torch, not Ray.

Note [The way to a CUDA device]

One allocation on the device, the arena, takes all storages of a model. Threads fill page-locked slots, and one
stream drains them; an event says when a slot may be filled again::

    host bytes   |=== storage ===|= storage =|s|s|s|====== storage ======|   store pages, or a file's
                    \  read by thread 1   \  thread 2   \  thread 3
    slots             [ 4 MiB ]             [ 4 MiB ]     [ 4 MiB ]          page-locked, kept between loads
                    \  copied by one stream, in any order
    arena        |=== storage ===| |= storage =| |s|s|s| |====== storage ======|

The weights of an RNN lie beside it, in a block of their own for which cuDNN has the order.

Bytes are read from the file behind the store's pages where it can be opened: a mapping that is touched for the first
time costs a page fault for every 64 KiB, which takes about as long as the copy.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..errors import ZeroCopyError
from .page_lock import PADDING, PageLock, memory_at, split_by_lock
from .placement import Span
from .ring import Ring, Slot

__all__ = ["Source", "Upload", "divide"]


# So many elements torch converts in the thread that asks. Of more it gives parts to as many threads as it may have,
# and each thread of a load would have these anew.
CONVERTED_AT_ONCE = 32_000


class Source(NamedTuple):
    """A host buffer: memory and where in it the buffer begins; and, if a file has it, a descriptor and offset."""

    memory: Any
    offset: int = 0
    file: int | None = None
    file_offset: int = 0


class _Piece(NamedTuple):
    """Part of a span that goes into one slot: place in the slot, bytes there, bytes of the span before it."""

    at: int
    nbytes: int
    done: int
    span: Span


def _chunks(spans: Sequence[Span], slot_bytes: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Cut spans, in the order of their places, into what one slot takes: its place and bytes, and its pieces.

    A slot begins at a multiple of 16, though the first piece may not: elements are aligned in it, and none is cut.
    """
    pieces: list[_Piece] = []
    base = begin = end = 0
    for span in spans:
        done = 0
        while done < span.nbytes:
            place = span.place + done
            if pieces and (place - base >= slot_bytes or place - end >= PADDING):
                yield begin, end - begin, pieces
                pieces = []
            if not pieces:
                begin, base = place, place - place % 16
            nbytes = min(span.nbytes - done, base + slot_bytes - place)
            pieces.append(_Piece(place - base, nbytes, done, span))
            done += nbytes
            end = place + nbytes
    if pieces:
        yield begin, end - begin, pieces


class Upload:
    """A copy of host bytes to a device, under way while a `with` block runs.

    The first `nbytes` places go to one allocation, `arena`; what `blocks` has, places and allocations, to those. All
    can be divided into tensors at once; `wait` returns when the bytes are in them. Leaving the `with` block early, by
    any exception, stops the copy; no thread and no copy is left when it has been left.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        nbytes: int,
        sources: Sequence[Source],
        ring: Ring,
        *,
        blocks: Sequence[tuple[int, torch.Tensor]] = (),
        locked: PageLock | None = None,
    ) -> None:
        self.arena = ring.engine.allocate(nbytes)
        self._allocations = [(0, self.arena), *blocks]
        self._ring = ring
        self._locked = locked  # until the last copy is done
        self._sources = sources
        self._addresses = [_address(source) for source in sources]
        through, self._direct = split_by_lock(spans, self._addresses, locked.ranges) if locked else (spans, [])
        self._chunks = _chunks(through, ring.slot_bytes)
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        chunks = sum(span.nbytes for span in through) // ring.slot_bytes + 1
        self._running = min(ring.threads, chunks)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._feed, name="ray_zerocopy-upload", daemon=True) for _ in range(self._running)
        ]

    def __enter__(self) -> Upload:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def wait(self) -> None:
        """Return when every byte is on the device; raises what went wrong on the way."""
        self._ended.wait()  # not Thread.join, which Ctrl-C does not end on every version of Python
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        self._stop = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _feed(self) -> None:
        """Fill slots until there is nothing left to copy; the work of each thread."""
        event: Any = None
        engine = self._ring.engine
        try:
            with engine.current():
                try:
                    while not self._stop:
                        with self._lock:
                            direct = self._direct.pop() if self._direct else None
                            chunk = next(self._chunks, None) if direct is None else None
                        if direct is not None:
                            event = engine.copy(
                                slice_at(self._allocations, direct.place, direct.nbytes), direct.memory
                            )
                        elif chunk is not None:
                            event = self._send(*chunk)
                        else:
                            break
                finally:
                    # Here, so that the arena and the host bytes outlive every copy, whatever becomes of the load.
                    if event is not None:
                        engine.wait(event)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self._ended.set()

    def _send(self, place: int, nbytes: int, pieces: list[_Piece]) -> Any:
        slot = self._ring.take()
        try:
            begin = end = pieces[0].at
            for piece in pieces:
                if piece.at > end:  # padding, of cuDNN's in a block: nothing that an earlier load left in the slot
                    slot.bytes[end : piece.at] = bytes(piece.at - end)
                self._fill(slot, piece)
                end = piece.at + piece.nbytes
            there = slice_at(self._allocations, place, nbytes)
            event = self._ring.engine.copy(there, slot.memory[begin : begin + nbytes])
        except BaseException:
            self._ring.forget()
            raise
        self._ring.give(slot, event)
        return event

    def _fill(self, slot: Slot, piece: _Piece) -> None:
        """Bring a piece into a slot; each of the three ways lets other threads run meanwhile."""
        at, nbytes, done, span = piece
        source = self._sources[span.buffer]
        if span.cast is not None:
            before, after = span.cast
            size = nbytes // after.itemsize
            begin = self._addresses[span.buffer] + span.offset + done // after.itemsize * before.itemsize
            given = torch.frombuffer(memory_at(begin, size * before.itemsize), dtype=before)
            into = slot.memory[at : at + nbytes].view(after)
            step = CONVERTED_AT_ONCE if torch.get_num_threads() > 1 else size
            for first in range(0, size, step):
                into[first : first + step].copy_(given[first : first + step])
        elif source.file is not None:
            _read(source.file, source.file_offset + span.offset + done, slot.bytes[at : at + nbytes])
        else:
            ctypes.memmove(slot.address + at, self._addresses[span.buffer] + span.offset + done, nbytes)


def _read(file: int, offset: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into], offset)
        if count == 0:
            raise ZeroCopyError(f"the file of the object store ends {len(into)} bytes early. Load the model again.")
        into, offset = into[count:], offset + count


def _address(source: Source) -> int:
    raw = np.frombuffer(source.memory, dtype=np.uint8)
    return int(raw.__array_interface__["data"][0]) + source.offset


def divide(
    arena: torch.Tensor,
    places: Sequence[tuple[int, int]],
    kinds: Mapping[int, torch.dtype],
    blocks: Sequence[tuple[int, torch.Tensor]] = (),
) -> list[torch.Tensor]:
    """Return a flat tensor for each place and length in the arena, with a storage of its own.

    Each has the dtype that `kinds` gives for its number, else or where it is not aligned uint8, and keeps the whole
    arena alive. By DLPack's capsules, which hold on to the tensor that they came from and, used directly, wait for no
    stream. For a place in one of the `blocks`, which are as in `Upload`, it is a view of that, of uint8.
    """
    pieces = [arena] * len(places)
    numbers: dict[torch.dtype, list[int]] = {}
    for number in sorted(range(len(places)), key=places.__getitem__):
        place, nbytes = places[number]
        if nbytes == 0:
            pieces[number] = torch.empty(0, dtype=torch.uint8, device=arena.device)
            continue
        if place >= len(arena):
            pieces[number] = slice_at(blocks, place, nbytes)
            continue
        kind = kinds.get(number, torch.uint8)
        numbers.setdefault(torch.uint8 if place % kind.itemsize else kind, []).append(number)
    for kind, members in numbers.items():
        size = kind.itemsize
        typed = arena[: len(arena) // size * size].view(kind)
        # All in one call: one slice at a time takes three times as long.
        apart: list[int] = []
        lengths, end = [], 0
        for number in members:
            begin, nbytes = places[number]
            if begin >= end:
                apart.append(number)
                lengths += [(begin - end) // size, nbytes // size]
                end = begin + nbytes
            else:  # these two share bytes
                pieces[number] = typed[begin // size : (begin + nbytes) // size]
        cut = typed.split_with_sizes([*lengths, len(typed) - end // size])[1::2]
        for number, piece in zip(apart, cut, strict=True):
            pieces[number] = piece
        for number in members:
            pieces[number] = from_dlpack(to_dlpack(pieces[number]))
    return pieces


def slice_at(allocations: Sequence[tuple[int, torch.Tensor]], place: int, nbytes: int) -> torch.Tensor:
    """Return bytes of the allocation that a place is in; each is given after the place at which it begins."""
    begin, allocation = allocations[bisect.bisect_right(allocations, place, key=lambda each: each[0]) - 1]
    return allocation[place - begin : place - begin + nbytes]
