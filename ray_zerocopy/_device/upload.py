r"""Copy host bytes to a device, by threads that fill page-locked slots. Imports torch, not Ray.

Note [The way to a CUDA device]

One allocation on the device, the arena, holds all storages of a model. Threads fill page-locked slots, and one stream
copies each slot to the arena. An event tells when the slot is free again::

    host bytes   |=== storage ===|= storage =|s|s|s|====== storage ======|   store pages, or a file's
                    \  read by thread 1   \  thread 2   \  thread 3
    slots             [ 4 MiB ]             [ 4 MiB ]     [ 4 MiB ]          page-locked, kept between loads
                    \  copied by one stream, in any order
    arena        |=== storage ===| |= storage =| |s|s|s| |====== storage ======|

The weights of an RNN have a separate allocation, a block, in the order that cuDNN needs.

The threads read the file behind the store's pages if it can be opened. Reading a new mapping costs a page fault for
every 64 KiB, which takes about as long as the copy.
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


# torch converts up to this many elements in the calling thread. For more it starts worker threads, and each thread of
# an upload would start its own set of them.
CONVERTED_AT_ONCE = 32_000


class Source(NamedTuple):
    """A host buffer: its memory and offset, and if a file has it, the descriptor and offset of that."""

    memory: Any
    offset: int = 0
    file: int | None = None
    file_offset: int = 0


class _Piece(NamedTuple):
    """Part of a span in one slot: offset in the slot, length there, and the bytes of the span before this part."""

    at: int
    nbytes: int
    done: int
    span: Span


def _chunks(spans: Sequence[Span], slot_bytes: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Cut ordered spans into chunks of one slot, and yield place, length and pieces of each chunk.

    A slot stands for places from a multiple of 16 on, so elements are aligned in the slot and no element is cut.
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
    """A copy of host bytes to a device, which runs during a `with` block.

    The first `nbytes` places are in one allocation, `arena`. `blocks` has the other allocations, each with its first
    place. Tensors over the allocations can be made at once; `wait` returns when all bytes have arrived. An exception
    in the `with` block stops the copy. No thread and no copy is left after the block.
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
        self._locked = locked  # lives until the last copy is done
        self._sources = sources
        self._addresses = [_address(source) for source in sources]
        by_slot, self._direct = split_by_lock(spans, self._addresses, locked.ranges) if locked else (spans, [])
        self._chunks = _chunks(by_slot, ring.slot_bytes)
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        chunks = sum(span.nbytes for span in by_slot) // ring.slot_bytes + 1
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
        """Wait until all bytes are on the device, and raise the error of the copy if there was one."""
        self._ended.wait()  # Ctrl-C does not end Thread.join on every version of Python
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        self._stop = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _feed(self) -> None:
        """Fill slots until nothing is left to copy. Each thread runs this."""
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
                    # The arena and the host bytes must outlive every copy, also if the load fails.
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
        slot = self._ring.acquire()
        try:
            begin = end = pieces[0].at
            for piece in pieces:
                if piece.at > end:  # padding: overwrite what an earlier load left in the slot
                    slot.bytes[end : piece.at] = bytes(piece.at - end)
                self._fill(slot, piece)
                end = piece.at + piece.nbytes
            destination = slice_at(self._allocations, place, nbytes)
            event = self._ring.engine.copy(destination, slot.memory[begin : begin + nbytes])
        except BaseException:
            self._ring.discard()
            raise
        self._ring.release(slot, event)
        return event

    def _fill(self, slot: Slot, piece: _Piece) -> None:
        """Copy a piece into a slot. Each of the three ways releases Python's lock."""
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
    """Return a flat tensor for each place and length.

    In the arena, each tensor has its own torch storage and keeps the arena alive. Its dtype is the
    one that `kinds` has for its number, or uint8 where the place is not aligned for that. DLPack makes the separate
    storages: its capsules keep the source alive, and used directly they wait for no stream.

    In one of the `blocks` (as in `Upload`), the tensor is a uint8 view of the block.
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
        # One call for all slices takes a third of the time of a call for each.
        separate: list[int] = []
        lengths, end = [], 0
        for number in members:
            begin, nbytes = places[number]
            if begin >= end:
                separate.append(number)
                lengths += [(begin - end) // size, nbytes // size]
                end = begin + nbytes
            else:  # shares bytes with the one before
                pieces[number] = typed[begin // size : (begin + nbytes) // size]
        cut = typed.split_with_sizes([*lengths, len(typed) - end // size])[1::2]
        for number, piece in zip(separate, cut, strict=True):
            pieces[number] = piece
        for number in members:
            pieces[number] = from_dlpack(to_dlpack(pieces[number]))
    return pieces


def slice_at(allocations: Sequence[tuple[int, torch.Tensor]], place: int, nbytes: int) -> torch.Tensor:
    """Return `nbytes` bytes from a place on. `allocations` has the first place of each allocation, in order."""
    begin, allocation = allocations[bisect.bisect_right(allocations, place, key=lambda each: each[0]) - 1]
    return allocation[place - begin : place - begin + nbytes]
