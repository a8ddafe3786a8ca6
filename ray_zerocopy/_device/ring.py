"""Page-locked slots for copies from the host to a CUDA device. A process keeps them for all its loads."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from .cuda import CudaEngine, Engine

__all__ = ["Ring", "Slot", "ring_of"]


# Not measured on a GPU yet; benchmarks/device.py tries other sizes. torch rounds page-locked memory up to a power of
# two. At 50 GB/s a slot of 4 MiB drains in 80 us, so a few in flight hide the wait for the next. With smaller slots,
# threads that fill slots compete more often for Python's lock with the thread that makes tensors.
SLOT_BYTES = 4 << 20
SLOTS_IN_FLIGHT = 4
MOST_THREADS = 12


class Slot:
    """Page-locked bytes, and the event of the last copy from them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self.bytes = memory.numpy().data
        self.copied: Any = None


class Ring:
    """The slots of one device, for all loads of a process.

    At most `depth` slots are made, each when it is needed first, and kept. `threads` threads fill slots in one load.
    """

    def __init__(
        self, engine: Engine, slot_bytes: int = SLOT_BYTES, threads: int | None = None, depth: int | None = None
    ) -> None:
        self.engine = engine
        self.slot_bytes = slot_bytes
        self.threads = threads or min(MOST_THREADS, len(engine.cpus))
        self.depth = depth or self.threads + SLOTS_IN_FLIGHT
        self.made = 0
        self._free: deque[Slot] = deque()
        self._change = threading.Condition()

    def acquire(self) -> Slot:
        """Return a slot that no copy reads any more. Wait while other loads have all slots."""
        with self._change:
            while not self._free and self.made >= self.depth:
                self._change.wait()
            # Reuse the slot that was released first, if its copy is done. Otherwise make one, up to `depth`.
            reuse = self._free and (self.made >= self.depth or self.engine.is_done(self._free[0].copied))
            slot = self._free.popleft() if reuse else None
            self.made += slot is None
        if slot is None:
            try:
                return Slot(self.engine.page_locked(self.slot_bytes))
            except BaseException:
                self.discard()
                raise
        try:
            self.engine.wait(slot.copied)
        except BaseException:
            self.discard()
            raise
        return slot

    def release(self, slot: Slot, copied: Any) -> None:
        """Return a slot to the ring; `copied` is the event of the last copy from it."""
        slot.copied = copied
        with self._change:
            self._free.append(slot)
            self._change.notify()

    def discard(self) -> None:
        """Count one slot less, after an error in a state that is not known."""
        with self._change:
            self.made -= 1
            self._change.notify()


_rings: dict[torch.device, Ring] = {}
_rings_lock = threading.Lock()


def ring_of(device: torch.device) -> Ring:
    """Return the ring of this process for a CUDA device."""
    with _rings_lock:
        if device not in _rings:
            _rings[device] = Ring(CudaEngine(device))
        return _rings[device]
