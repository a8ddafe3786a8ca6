"""Private views of a store object's pages. Linux only; imports neither torch nor Ray.

Note [Private views]

Ray's worker maps the node's object store shared and writable. numpy marks its arrays read-only, but torch does not
respect that: a write through a torch view appears in every process on the node. A private view is a second,
copy-on-write mapping of the same file pages::

    store file   | page 0 | page 1 | page 2 | page 3 |      one copy on the node
                     |        |        |        |
    Ray's mapping  shared   shared   shared   shared        what ray.get points into
    private view   shared   shared   PRIVATE  shared        page 2 was written here: one 4 KiB copy

`store_file.py` opens the file. If it cannot, the model uses the store's memory without isolation, or a copy.

The store reuses an object's pages once no process holds the object. So a view holds a `Pin`, with the arrays
that `ray.get` returned, for as long as anything points into the view.

Note [Forks]

A forked child inherits the parent's connection to the store, but the store counts parent and child as one client.
If the child dropped the last array of an object, Ray would release the object for the parent too, and the store would
reuse pages that the parent still reads. So every `Pin` that lives at a fork lives in the child until the child
exits::

    parent   Pin ---- arrays ---- connection ----+
                                                 +---- store: "one client holds the object"
    child    Pin ---- arrays ---- connection ----+
             ^ one more reference, which is never dropped, not even when the interpreter shuts down
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ZeroCopyError
from .limits import raise_if_exhausted
from .live import LiveObjects, keep_in_children
from .regions import PAGE, region_at, written_ranges
from .store_file import OpenFiles, Unmappable

__all__ = [
    "Pin",
    "PrivateView",
    "detach_views",
    "own_memory",
    "pin",
    "populate",
    "private_view",
    "restore",
    "shared_view",
    "view_hooks",
]

# Python 3.13 has this constant. The number is the same on every architecture that Ray supports.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14


class Pin:
    """Keeps an object in the store: holds the arrays that `ray.get` returned. See Note [Forks]."""

    __slots__ = ("__weakref__", "arrays")

    def __init__(self, arrays: object) -> None:
        self.arrays = arrays
        keep_in_children(self)


class PrivateView:
    """A copy-on-write mapping, and the store arrays that protect its pages from reuse.

    `buffer` returns the writable memory. The memory, and everything made over it, keeps the view alive. The view is
    unmapped when it is deleted. `mmap.mmap` cannot be used: before Python 3.13 it always keeps a descriptor open.
    """

    def __init__(self, fd: int, offset: int, nbytes: int, keep_alive: object) -> None:
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_NORESERVE
        address = _libc.mmap(None, nbytes, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._munmap = _libc.munmap  # at exit, modules may be deleted before views
        self.address, self.nbytes = address, nbytes
        self.pin: Pin | None = Pin(keep_alive)
        _views.add(self)
        for hook in view_hooks:
            hook()

    def buffer(self) -> Any:
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        memory.view = self  # type: ignore[attr-defined]
        return memory

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._munmap(self.address, self.nbytes)


_views: LiveObjects[PrivateView] = LiveObjects()
# Functions to call when a view is made. `session.py` adds one; this file does not import Ray.
view_hooks: list[Callable[[], None]] = []

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


def private_view(address: int, nbytes: int, keep_alive: object, files: OpenFiles | None = None) -> tuple[Any, int]:
    """Map the pages under `[address, address + nbytes)` a second time, copy-on-write.

    Args:
        address: Where the bytes begin.
        nbytes: How many bytes.
        keep_alive: What keeps the pages from reuse.
        files: Open files of the store, for views of many objects.

    Returns:
        The view's memory as a writable buffer, and the offset in it of the byte at `address`. The mapping and
        `keep_alive` live as long as the buffer and everything made over it.

    Raises:
        Unmappable: This process cannot reach the file behind the pages; the message is the reason.
        ZeroCopyError: The process or the machine has reached a limit of descriptors, mappings or memory.
    """
    if files is None:
        with OpenFiles() as opened:
            return private_view(address, nbytes, keep_alive, opened)
    fd, offset = files.open(address, nbytes)
    try:
        begin = offset - offset % PAGE
        view = PrivateView(fd, begin, offset - begin + nbytes, keep_alive)
    except OSError as error:
        raise_if_exhausted(error, nbytes)
        raise Unmappable(f"mmap of the store's file failed: {error}") from error
    return view.buffer(), offset - begin


def own_memory(address: int, nbytes: int, keep_alive: object) -> Any:
    """Return a writable buffer with the bytes of a range. A write to it changes nothing but the buffer.

    The buffer is a private view if the range is in the object store, and otherwise a copy: Arrow arrays in this
    process's memory have other users too. It keeps `keep_alive` alive.
    """
    region = region_at(address)
    try:
        if region is None or not region.shared:
            raise Unmappable("the bytes are not in the object store")
        memory, begin = private_view(address, nbytes, keep_alive)
    except (Unmappable, ZeroCopyError):
        return bytearray(shared_view(address, nbytes, keep_alive))  # copy: a write would reach other users
    return memoryview(memory)[begin : begin + nbytes]


def shared_view(address: int, nbytes: int, keep_alive: object) -> Any:
    """Return a writable buffer over the bytes of a range. A write to it reaches every process on the node."""
    view = (ctypes.c_uint8 * nbytes).from_address(address)
    view.pin = Pin(keep_alive)  # type: ignore[attr-defined]
    return view


def pin(memory: Any, keep_alive: object) -> object:
    """Replace the arrays that protect a view's pages from reuse (None: no arrays), and return the previous ones."""
    view: PrivateView = memory.view
    before, view.pin = view.pin, None if keep_alive is None else Pin(keep_alive)
    return before.arrays if before is not None else None


def restore(memory: Any) -> bool:
    """Drop the pages of a view that were written to, so that the view shows the file again.

    Returns False if the kernel cannot tell which pages these are. Nothing may write to the memory during the call.
    """
    begin = ctypes.addressof(memory)
    try:
        written = written_ranges(begin, begin + -(-len(memory) // PAGE) * PAGE)
    except OSError:
        return False
    return all(_libc.madvise(first, last - first, mmap.MADV_DONTNEED) == 0 for first, last in written)


def populate(memory: Any) -> None:
    """Touch every page of a view for reading, if the kernel can do so. Other threads run during the call."""
    _libc.madvise(ctypes.addressof(memory), len(memory), _MADV_POPULATE_READ)


def detach_views() -> int:
    """Copy the pages of every pinned view, so that the views stay valid when the store reuses the pages.

    Returns the number of bytes that could not be copied because the machine has too little memory available.
    """
    failed = 0
    for view in _views:
        if view.pin is None:
            continue
        copied = view.nbytes <= _available_memory() and _copy_pages(view.address, view.nbytes)
        if copied:
            view.pin = None
        else:
            failed += view.nbytes
    return failed


def _copy_pages(address: int, nbytes: int) -> bool:
    """Make every page of a range private to this process, without a change to its bytes."""
    if _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) == 0:
        return True
    if ctypes.get_errno() != errno.EINVAL:  # EINVAL: a kernel before 5.14
        return False
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    pages = np.frombuffer(memory, dtype=np.uint8)[::PAGE]
    pages |= 0
    return True


def _available_memory() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
