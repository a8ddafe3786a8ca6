"""A device made up for the tests, in host memory: what an upload asks of one, and nothing in time."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from contextlib import nullcontext
from typing import Any

import torch


class Event:
    def __init__(self) -> None:
        self.done = False


class Late:
    """A device whose stream copies as late as it may: in order, when somebody waits, or once in a while by itself.

    With `orders`, it wants an RNN's weights in an order of its own.
    """

    def __init__(self, *, waits: bool = True, fails_at: int | None = None, orders: bool = False) -> None:
        self.cpus = {0, 1, 2}
        self.queue: deque[tuple[torch.Tensor, torch.Tensor, Event]] = deque()
        self.lock = threading.Lock()
        self.waits = waits
        self.fails_at = fails_at
        self.orders = orders
        self.copies = 0
        self.page_locked_bytes = 0
        self.random = random.Random(0)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def recurrent(self, shapes: Any, dtype: torch.dtype, settings: Any) -> tuple[torch.Tensor, list[int]] | None:
        """Order an RNN's weights from the last to the first, with padding before each."""
        if not self.orders:
            return None
        places = []
        end = 0
        for shape in reversed(shapes):
            places.append(end + 3 * dtype.itemsize)
            end = places[-1] + math.prod(shape) * dtype.itemsize
        return torch.full((end + 64,), 0xCC, dtype=torch.uint8), places[::-1]

    def page_locked(self, nbytes: int) -> torch.Tensor:
        self.page_locked_bytes += nbytes
        return torch.full((nbytes,), 0xBB, dtype=torch.uint8)

    def current(self) -> Any:
        return nullcontext()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Event:
        with self.lock:
            self.copies += 1
            if self.copies == self.fails_at:
                raise RuntimeError("the bus caught fire")
            event = Event()
            self.queue.append((to, source, event))
            return event

    def _advance(self) -> None:
        to, source, event = self.queue.popleft()
        to.copy_(source)
        event.done = True

    def is_done(self, event: Event) -> bool:
        with self.lock:
            if self.queue and self.random.random() < 0.5:
                self._advance()
            return event.done

    def wait(self, event: Event) -> None:
        time.sleep(0)
        with self.lock:
            while self.waits and not event.done:
                self._advance()
