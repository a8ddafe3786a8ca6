"""Objects of the store -> this process's memory, as a private view where one is possible.

See Note [Private views] in `_pages/views.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._device.upload import Source
from .._pages import views
from .._pages.markers import Mark, StoredObject
from .._pages.regions import Location, locate
from .._pages.store_file import OpenFiles, Unmappable, open_file
from ..errors import ZeroCopyError, warn
from .fetch import fetch_local
from .ref import ModelRef, WithoutIsolation
from .store_place import warn_if_on_disk

__all__ = ["HostMemory", "address_range", "object_locations"]


_log = logging.getLogger(__name__)


class HostMemory:
    """The buffers of a model's objects in this process's memory.

    Attributes:
        objects: The buffers of each object that has any, as `ray.get` returned them. They pin the object.
        ranges: The addresses at which each object begins and ends.
        shared: Bytes of the private view that are the store's pages.
        copied: Bytes that had to be copied.
        isolated: Whether a write to the private buffers stays in this process.

    Args:
        objects: The buffers of each object that `fetch` returned.
        without_isolation: What to do where no private view is possible.
        object_ids: The ids of the objects, in hexadecimal digits.
        name: The class of the model, for warnings.
    """

    def __init__(
        self,
        objects: Sequence[Sequence[Any]],
        without_isolation: WithoutIsolation = WithoutIsolation.SHARE,
        object_ids: Sequence[str] = (),
        name: str = "the model",
    ) -> None:
        ids = object_ids or [""] * len(objects)
        pairs = [(stored, object_id) for stored, object_id in zip(objects, ids, strict=True) if stored]
        self.objects: list[Sequence[Any]] = [stored for stored, _ in pairs]
        self._object_ids = [object_id for _, object_id in pairs]
        self._name = name
        self.shared = self.copied = 0
        self.isolated = True
        self._without_isolation = without_isolation
        self._private: list[tuple[Any, int]] | None = None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        spans = [address_range(stored) for stored in self.objects]
        return [(begin, begin + nbytes) for begin, nbytes, _ in spans]

    def private_buffers(self) -> list[tuple[Any, int]]:
        """Return writable memory for each buffer, and the offset in it at which the buffer begins.

        The memory is a private view, which is made once. Where no private view is possible, `without_isolation`
        decides, and `isolated` may become False.
        """
        if self._private is None:
            pairs = zip(self.objects, self._object_ids, strict=True)
            with OpenFiles() as files:
                self._private = [buffer for pair in pairs for buffer in self._private_view(files, *pair)]
        return self._private

    def shared_buffers(self) -> list[tuple[Any, int]]:
        """Return the store's memory for each buffer. A write to it would reach every process on the node."""
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
                memory = views.shared_view(begin, nbytes, stored)
                try:
                    file, base = open_file(begin, nbytes)
                except Unmappable:
                    sources += [Source(memory, offset) for offset in offsets]
                else:
                    stack.callback(os.close, file)
                    sources += [Source(memory, offset, file, base + offset) for offset in offsets]
            yield sources

    def _private_view(self, files: OpenFiles, stored: Sequence[Any], object_id: str) -> list[tuple[Any, int]]:
        begin, nbytes, offsets = address_range(stored)
        region = files.region_at(begin)
        if region is not None:
            if not region.shared:
                return self._copy(stored)  # copy: Ray returned read-only memory (Ray Client, local mode)
            warn_if_on_disk(self._name, region, nbytes)
        try:
            view, base = views.private_view(begin, nbytes, stored, files)
        except Unmappable as reason:
            if self._without_isolation is WithoutIsolation.COPY:
                _log.info("the weights are copied for each call, because %s", reason)
                return self._copy(stored)  # copy: each call starts from the weights that were shared
            _warn_not_isolated(str(reason), required=self._without_isolation is WithoutIsolation.RAISE)
            self.shared += nbytes
            self.isolated = False
            buffers = _shared_buffers(stored)
            place = locate(begin) or Location(0, 0, 0)
            buffers[0][0].mark = Mark(StoredObject(object_id, place, nbytes))
            return buffers
        self.shared += nbytes
        return [(view, base + offset) for offset in offsets]

    def _copy(self, stored: Sequence[Any]) -> list[tuple[Any, int]]:
        copies = [(bytearray(buffer), 0) for buffer in stored]
        self.copied += sum(len(memory) for memory, _ in copies)
        return copies


def _shared_buffers(stored: Sequence[Any]) -> list[tuple[Any, int]]:
    begin, nbytes, offsets = address_range(stored)
    memory = views.shared_view(begin, nbytes, stored)
    return [(memory, offset) for offset in offsets]


def address_range(buffers: Sequence[Any]) -> tuple[int, int, list[int]]:
    """Return address and length of the range from the first buffer to the last, and the offset of each buffer."""
    views = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
    addresses: list[int] = [view.__array_interface__["data"][0] for view in views]
    begin = min(addresses)
    end = max(address + view.size for address, view in zip(addresses, views, strict=True))
    return begin, end - begin, [address - begin for address in addresses]


def object_locations(model_ref: ModelRef) -> list[StoredObject]:
    """Return where the buffers of a model's objects on this node are, and how many bytes they span."""
    found = []
    fetched = fetch_local(model_ref)
    for object_id, body in zip(fetched.object_ids, fetched.bodies, strict=True):
        if body["buffers"]:
            begin, nbytes, _ = address_range(body["buffers"])
            place = locate(begin)  # while `body` lives: Ray may unmap an object that no process holds
            if place is not None:
                found.append(StoredObject(object_id, place, nbytes))
    return found


_warned_reasons: set[str] = set()


def _warn_not_isolated(reason: str, required: bool) -> None:
    message = (
        f"this worker cannot have a private view of the model: {reason}. A write to a weight here (train mode, "
        f"load_state_dict, in-place operations) would reach every worker on this node."
    )
    if required:
        raise ZeroCopyError(
            f"{message} A task would copy the weights for each call. Run where /proc shows the raylet, or drop "
            f"require_isolation=True."
        )
    if reason not in _warned_reasons:
        _warned_reasons.add(reason)
        warn(f"{message} Treat the model as read-only, or pass require_isolation=True to make this an error.")
