"""Objects of the store -> this process's memory, as a private view where that can be had.

See Note [Private views] in `pages.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.exceptions

from .._device.upload import Source
from ..errors import ModelLostError, ZeroCopyError, warn
from . import pages
from .ref import ModelRef, check

__all__ = ["HostMemory", "address_range", "fetch", "object_locations"]


def fetch(model_ref: ModelRef) -> list[dict[str, Any]]:
    """Return the objects behind a checked handle; the store keeps them while the returned values live."""
    try:
        return ray.get(list(model_ref.refs))  # type: ignore[no-any-return]
    except (ray.exceptions.ObjectLostError, ray.exceptions.ReferenceCountingAssertionError) as error:
        raise ModelLostError(
            f"{model_ref!r} is no longer in the object store: {type(error).__name__}. A model lives as long as the "
            f"process that prepared it and as a reference to it: prepare it in the driver, and keep model_ref."
        ) from error


class HostMemory:
    """The buffers of a model's objects in this process's memory.

    Attributes:
        objects: The buffers of each object that has any, as `ray.get` returned them. They pin the object.
        ranges: The addresses at which each object begins and ends.
        shared: Bytes of the private view that are the store's own pages.
        copied: Bytes that had to be copied.
        isolated: Whether a write to the private buffers stays in this process.
    """

    def __init__(self, objects: Sequence[Sequence[Any]], require_isolation: bool = False) -> None:
        self.objects: list[Sequence[Any]] = [stored for stored in objects if stored]
        self.shared = self.copied = 0
        self.isolated = True
        self._require_isolation = require_isolation
        self._private: list[tuple[Any, int]] | None = None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        spans = [address_range(stored) for stored in self.objects]
        return [(begin, begin + nbytes) for begin, nbytes, _ in spans]

    def private_buffers(self) -> list[tuple[Any, int]]:
        """Return writable memory for each buffer, and the offset in it at which the buffer begins.

        The memory is a private view where the platform has it; `isolated` is False where it does not. The view is
        made once.
        """
        if self._private is None:
            self._private = [buffer for stored in self.objects for buffer in self._private_view(stored)]
        return self._private

    def shared_buffers(self) -> list[tuple[Any, int]]:
        """Return the store's own memory for each buffer: a write to it would reach every process on the node."""
        return [buffer for stored in self.objects for buffer in _shared_buffers(stored)]

    @contextlib.contextmanager
    def open_sources(self) -> Iterator[list[Source]]:
        """Open the store's file for the length of a `with` block, and return where each buffer lies in it.

        A buffer has no file where the file cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            sources: list[Source] = []
            for stored in self.objects:
                begin, nbytes, offsets = address_range(stored)
                memory = pages.shared_view(begin, nbytes, stored)
                try:
                    file, base = pages.open_file(begin, nbytes)
                except pages.Unmappable:
                    sources += [Source(memory, offset) for offset in offsets]
                else:
                    stack.callback(os.close, file)
                    sources += [Source(memory, offset, file, base + offset) for offset in offsets]
            yield sources

    def _private_view(self, stored: Sequence[Any]) -> list[tuple[Any, int]]:
        begin, nbytes, offsets = address_range(stored)
        region = pages.region_at(begin)
        if region is not None and not region.shared:
            # copy: Ray returned this process's own memory (Ray Client, local mode), which is read-only
            copies = [(bytearray(buffer), 0) for buffer in stored]
            self.copied += sum(len(memory) for memory, _ in copies)
            return copies
        self.shared += nbytes
        try:
            view, base = pages.private_view(begin, nbytes, stored)
        except pages.Unmappable as reason:
            _warn_not_isolated(str(reason), self._require_isolation)
            self.isolated = False
            return _shared_buffers(stored)
        return [(view, base + offset) for offset in offsets]


def _shared_buffers(stored: Sequence[Any]) -> list[tuple[Any, int]]:
    begin, nbytes, offsets = address_range(stored)
    memory = pages.shared_view(begin, nbytes, stored)
    return [(memory, offset) for offset in offsets]


def address_range(buffers: Sequence[Any]) -> tuple[int, int, list[int]]:
    """Return the address and length of the bytes from the first buffer to the last, and where each begins."""
    views = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
    addresses: list[int] = [view.__array_interface__["data"][0] for view in views]
    begin = min(addresses)
    end = max(address + view.size for address, view in zip(addresses, views, strict=True))
    return begin, end - begin, [address - begin for address in addresses]


def object_locations(model_ref: ModelRef) -> list[tuple[pages.Location, int]]:
    """Return where the buffers of each of a model's objects lie on this node, and how many bytes they span."""
    found = []
    check(model_ref)
    for body in fetch(model_ref):
        if body["buffers"]:
            begin, nbytes, _ = address_range(body["buffers"])
            place = pages.locate(begin)  # now: Ray may unmap an object that nobody holds
            if place is not None:
                found.append((place, nbytes))
    return found


_warned_reasons: set[str] = set()


def _warn_not_isolated(reason: str, required: bool) -> None:
    message = (
        f"this worker cannot have a private view of the model: {reason}. A write to a weight here (train mode, "
        f"load_state_dict, in-place operations) would reach every worker on this node."
    )
    if required:
        raise ZeroCopyError(f"{message} Run where /proc shows the raylet, or drop require_isolation=True.")
    if reason not in _warned_reasons:
        _warned_reasons.add(reason)
        warn(f"{message} Treat the model as read-only, or pass require_isolation=True to make this an error.")
