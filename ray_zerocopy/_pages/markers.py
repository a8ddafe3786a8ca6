"""Marks by which `pool_memory` finds processes that use a model without isolation.

A process with a private view has a mapping that `/proc/<pid>/maps` shows. A process without isolation has only Ray's
mapping of the whole store, as every worker does. So it also maps one page of an anonymous file, whose name has the
object's id. Other processes see this name in `/proc/<pid>/maps`, even if the process itself has no /proc.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import NamedTuple

from .live import LiveObjects
from .regions import Location

__all__ = ["Mark", "StoredObject", "marks_of_this_process", "parse_mark"]

_PREFIX = "ray_zerocopy:"


class StoredObject(NamedTuple):
    """An object of the store, and where its bytes are in memory.

    Attributes:
        object_id: The id of the object, in hexadecimal digits.
        location: Where its bytes begin on this node; zeros if the process could not tell.
        nbytes: How many bytes of weights it has.
    """

    object_id: str
    location: Location
    nbytes: int


class Mark:
    """An entry in `/proc/<pid>/maps` that says that this process uses an object, until the mark is deleted."""

    def __init__(self, stored: StoredObject) -> None:
        self.stored = stored
        where = ":".join(f"{number:x}" for number in (*stored.location, stored.nbytes))
        with contextlib.suppress(OSError, AttributeError, ValueError):  # out of files or mappings; not Linux
            fd = os.memfd_create(f"{_PREFIX}{stored.object_id}:{where}")
            try:
                os.ftruncate(fd, mmap.PAGESIZE)
                self._page = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                os.close(fd)
        _marks.add(self)


_marks: LiveObjects[Mark] = LiveObjects()


def marks_of_this_process() -> set[StoredObject]:
    return {mark.stored for mark in _marks}


def parse_mark(name: str) -> StoredObject | None:
    """Return the object of a mark, by its name in `/proc/<pid>/maps`; None if the name is not a mark."""
    _, found, text = name.removesuffix(" (deleted)").partition(_PREFIX)
    if not found or not name.startswith("/memfd:"):
        return None
    object_id, *numbers = text.split(":")
    device, inode, offset, nbytes = (int(number, 16) for number in numbers)
    return StoredObject(object_id, Location(device, inode, offset), nbytes)
