"""Page-locked slots through which host bytes go to a CUDA device, kept by a process for all its loads."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from .cuda import CudaEngine, Engine

__all__ = ["Ring", "Slot", "ring_of"]


# Not measured on a GPU yet: benchmarks/device.py tries others. A slot is a power of two, which page-locked memory
# is rounded up to. At 50 GB/s it drains in 80 us, so a few in flight hide the wait for the next; one of half the size
# has the threads that fill slots take turns with the one that makes tensors twice as often, which both wait for.
SLOT_BYTES = 4 << 20
SLOTS_IN_FLIGHT = 4
MOST_THREADS = 12


class Slot:
    """Page-locked bytes, and the event of the copy that last read them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self.bytes = memory.numpy().data
        self.read: Any = None


class Ring:
    """The slots of one device, for all loads of a process: at most `depth`, made when needed, kept afterwards.

    `threads` is how many fill them in one load.
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

    def take(self) -> Slot:
        """Return a slot that nothing reads any more; waits while other loads have them all."""
        with self._change:
            while not self._free and self.made >= self.depth:
                self._change.wait()
            # First the slot given back first. Rather make one than wait: a small load then page-locks little.
            reuse = self._free and (self.made >= self.depth or self.engine.has_come(self._free[0].read))
            slot = self._free.popleft() if reuse else None
            self.made += slot is None
        if slot is None:
            try:
                return Slot(self.engine.page_locked(self.slot_bytes))
            except BaseException:
                self.forget()
                raise
        try:
            self.engine.wait(slot.read)
        except BaseException:
            self.forget()
            raise
        return slot

    def give(self, slot: Slot, read: Any) -> None:
        """Give a slot back; `read` is the event of the copy from it."""
        slot.read = read
        with self._change:
            self._free.append(slot)
            self._change.notify()

    def forget(self) -> None:
        """Count one slot less: something failed while it was taken, and its state is not known."""
        with self._change:
            self.made -= 1
            self._change.notify()


_rings: dict[torch.device, Ring] = {}
_making = threading.Lock()


def ring_of(device: torch.device) -> Ring:
    """Return this process's ring for a CUDA device."""
    with _making:
        if device not in _rings:
            _rings[device] = Ring(CudaEngine(device))
        return _rings[device]
