"""A store object's pages in this process <-> a private view of them. Linux; no torch, no Ray.

Note [Private views]

Ray's worker maps the node's object store shared and writable. Only numpy's flag says read-only, so a torch
view of it can be written, and the write appears in every process on the node. A private view is a second
mapping of the same file pages, copy-on-write::

    store file   | page 0 | page 1 | page 2 | page 3 |      one copy on the node
                     |        |        |        |
    Ray's mapping  shared   shared   shared   shared        what ray.get points into
    private view   shared   shared   PRIVATE  shared        page 2 was written here: one 4 KiB copy

The store's file has no name any more, and Ray closes its descriptor in the worker. But the raylet keeps one,
and on Linux `/proc/<raylet>/fd/<n>` opens the same file for whoever may look at the raylet: its own user.

The store reuses an object's pages once no process holds the object. So a view holds `keep_alive`, the arrays
that `ray.get` returned, for as long as anything points into the view.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..errors import ZeroCopyError

__all__ = [
    "Location",
    "PrivateView",
    "Region",
    "Unmappable",
    "locate",
    "open_file",
    "parse_region",
    "pin",
    "populate",
    "private_view",
    "region_at",
    "regions",
    "restore",
    "shared_view",
    "written_bytes",
]

PAGE = mmap.PAGESIZE
# Python's mmap module names it from 3.13 on; this is the number on every architecture Ray ships for.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Location(NamedTuple):
    """Where a byte lies on this node: equal in two processes exactly if they see the same memory."""

    device: int
    inode: int
    offset: int


class Region(NamedTuple):
    """One line of `/proc/<pid>/maps`: the addresses `[start, end)` and what lies behind them."""

    start: int
    end: int
    offset: int
    device: int
    inode: int
    shared: bool
    name: str


class Unmappable(Exception):
    """Carry the reason why a private view cannot be had; whoever asked decides what that means."""


class PrivateView:
    """A copy-on-write mapping, unmapped when this goes, and the store arrays that keep its pages from reuse.

    `buffer` is the writable memory; it holds on to the view, and so does all that is made over it. Not a
    `mmap.mmap`, which keeps a descriptor open for as long as it lives (before Python 3.13: always).
    """

    def __init__(self, fd: int, offset: int, nbytes: int, keep_alive: object) -> None:
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_NORESERVE
        address = _libc.mmap(None, nbytes, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._munmap = _libc.munmap  # modules may be gone when a view goes at exit
        self.address, self.nbytes = address, nbytes
        self.keep_alive = keep_alive

    def buffer(self) -> Any:
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        memory.view = self  # type: ignore[attr-defined]
        return memory

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._munmap(self.address, self.nbytes)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


# ---------------------------------------------------------------- which region an address lies in

# PROCMAP_QUERY, Linux 6.11: one region by address in about 1 us, where reading all of /proc/self/maps in a
# worker with torch takes 700. Field order as in the kernel's uapi/linux/fs.h, struct procmap_query.
_QUERY = struct.Struct("=9Q4I2Q")
_QUERY_REQUEST = (3 << 30) | (_QUERY.size << 16) | (ord("f") << 8) | 17
_VMA_SHARED = 8
_query_works = True


def region_at(address: int) -> Region | None:
    """Return the region of this process that holds `address`, or None where there is none or no /proc."""
    global _query_works
    if _query_works:
        try:
            return _query_region(address)
        except OSError as error:
            _raise_if_exhausted(error)
            _query_works = False
    try:
        return next((r for r in regions() if r.start <= address < r.end), None)
    except OSError as error:
        _raise_if_exhausted(error)
        return None


def _query_region(address: int) -> Region | None:
    buffer = bytearray(_QUERY.pack(_QUERY.size, 0, address, *[0] * 12))
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _QUERY_REQUEST, buffer)
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)
    _, _, _, start, end, flags, _, offset, inode, major, minor, *_ = _QUERY.unpack(buffer)
    return Region(start, end, offset, os.makedev(major, minor), inode, bool(flags & _VMA_SHARED), "")


def regions(pid: int | str = "self") -> Iterator[Region]:
    """Yield every region of process `pid`; raises OSError where /proc does not show it."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            region = parse_region(line)
            if region is not None:
                yield region


def parse_region(line: str) -> Region | None:
    """Return the region that a line of `maps`, or a headline of `smaps`, describes; None for any other line."""
    fields = line.rstrip("\n").split(maxsplit=5)
    if len(fields) < 5 or "-" not in fields[0] or fields[0].endswith(":"):
        return None
    addresses, permissions, offset, device, inode = fields[:5]
    start, end = (int(a, 16) for a in addresses.split("-"))
    major, minor = (int(d, 16) for d in device.split(":"))
    name = fields[5] if len(fields) > 5 else ""
    return Region(start, end, int(offset, 16), os.makedev(major, minor), int(inode), permissions[3] == "s", name)


def locate(address: int) -> Location | None:
    """Return where the byte at `address` lies, or None if it is in memory that belongs to this process alone.

    A byte in a page of a private view that has been written to is such memory: it no longer shows the file.
    """
    region = region_at(address)
    if region is None or region.inode == 0:
        return None
    if not region.shared and written_bytes(address, 1):
        return None
    return Location(region.device, region.inode, region.offset + address - region.start)


def written_bytes(address: int, nbytes: int) -> int:
    """Return how many of the bytes lie in pages that this process has copied for itself by writing to them."""
    if nbytes <= 0:
        return 0
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    pages = np.flatnonzero(_are_own(first, last + 1)).astype(np.int64) + first
    begins = np.maximum(pages * PAGE, address)
    ends = np.minimum((pages + 1) * PAGE, address + nbytes)
    return int((ends - begins).sum())


def _are_own(first: int, last: int) -> np.ndarray[Any, Any]:
    """Tell for each of the pages `[first, last)` whether this process has copied it for itself.

    Reads `/proc/self/pagemap` (kernel: admin-guide/mm/pagemap): bit 63 present, 62 swapped, 61 file or shared.
    """
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = np.frombuffer(os.pread(pagemap.fileno(), (last - first) * 8, first * 8), dtype=np.uint64)
    here = (entries >> np.uint64(62)) != 0
    own: np.ndarray[Any, Any] = here & ((entries >> np.uint64(61)) & np.uint64(1) == 0)
    return own


# ---------------------------------------------------------------- the view

_store_paths: dict[tuple[int, int], str] = {}


def private_view(address: int, nbytes: int, keep_alive: object) -> tuple[Any, int]:
    """Map the pages under `[address, address + nbytes)` a second time, copy-on-write.

    Returns the view's memory, a writable buffer, and the offset in it of the byte at `address`. The mapping, and
    `keep_alive`, last as long as the buffer or anything made over it.
    Raises `Unmappable` with the reason where this process cannot reach the file behind the pages, and
    ZeroCopyError where the process or the machine has run out of descriptors, mappings or memory.
    """
    fd, offset = open_file(address, nbytes)
    try:
        begin = offset - offset % PAGE
        view = PrivateView(fd, begin, offset - begin + nbytes, keep_alive)
    except OSError as error:
        _raise_if_exhausted(error)
        raise Unmappable(f"mmap of the store's file failed: {error}") from error
    finally:
        os.close(fd)
    return view.buffer(), offset - begin


def open_file(address: int, nbytes: int) -> tuple[int, int]:
    """Open the store's file, in which `[address, address + nbytes)` lies, for reading.

    Returns a descriptor, which is the caller's to close, and the offset in the file of the byte at `address`.
    Raises as `private_view` does.
    """
    region = region_at(address)
    if region is None:
        raise Unmappable(f"/proc/self/maps does not show the object store's memory (platform {sys.platform})")
    if address + nbytes > region.end:
        raise Unmappable("the object's bytes do not lie in one mapping of the store")
    if not region.shared:
        raise Unmappable("the bytes are this process's own")
    return _open_store(region.device, region.inode), region.offset + address - region.start


_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def _raise_if_exhausted(error: OSError) -> None:
    """Turn having run out of something into an error: it says nothing of whether a view could be had."""
    if error.errno in _EXHAUSTED:
        raise ZeroCopyError(
            f"this process cannot map the model: {error.strerror}. Drop models that are loaded and not used, or "
            f"raise the limit (ulimit -n for files, sysctl vm.max_map_count for mappings)."
        ) from error


# PAGEMAP_SCAN, Linux 6.7: kernel, admin-guide/mm/pagemap; field order as in uapi/linux/fs.h, struct pm_scan_arg.
_SCAN = struct.Struct("=12Q")
_SCAN_REQUEST = (3 << 30) | (_SCAN.size << 16) | (ord("f") << 8) | 16
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_SCAN_RANGES = 4096
_SCAN_BYTES = 16 << 20  # at a time: meanwhile no other thread can map or unmap memory, as malloc does
_scan_works = True
_MADV_POPULATE_READ = 22  # Linux 5.14


def pin(memory: Any, keep_alive: object) -> object:
    """Replace what keeps the pages of a view from being reused, and return what did so; None: nothing does."""
    view: PrivateView = memory.view
    before, view.keep_alive = view.keep_alive, keep_alive
    return before


def restore(memory: Any) -> bool:
    """Drop the pages of a view's memory that were written to, so that it shows the file again.

    Returns False where the kernel does not tell which they are. Nothing may write to the memory meanwhile.
    """
    begin = ctypes.addressof(memory)
    try:
        written = _written_ranges(begin, begin + -(-len(memory) // PAGE) * PAGE)
    except OSError:
        return False
    return all(_libc.madvise(first, last - first, mmap.MADV_DONTNEED) == 0 for first, last in written)


def populate(memory: Any) -> None:
    """Touch every page of a view's memory for reading, where the kernel can; other threads run meanwhile."""
    _libc.madvise(ctypes.addressof(memory), len(memory), _MADV_POPULATE_READ)


def _written_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    """Return the addresses of the pages in a range that this process has copied for itself."""
    global _scan_works
    if _scan_works:
        try:
            return _scan_written(begin, end)
        except OSError:
            _scan_works = False
    ranges: list[tuple[int, int]] = []
    step = 1 << 30
    for first in range(begin, end, step):
        last = min(first + step, end)
        own = _are_own(first // PAGE, last // PAGE)
        if len(own) != (last - first) // PAGE:
            raise OSError("pagemap is cut short")
        ranges += [(first + page * PAGE, first + (page + 1) * PAGE) for page in np.flatnonzero(own).tolist()]
    return ranges


def _scan_written(begin: int, end: int) -> list[tuple[int, int]]:
    found = (ctypes.c_uint64 * (3 * _SCAN_RANGES))()
    here = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED
    ranges: list[tuple[int, int]] = []
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        while begin < end:
            asked = (_SCAN.size, 0, begin, min(begin + _SCAN_BYTES, end), 0, ctypes.addressof(found), _SCAN_RANGES, 0)
            argument = bytearray(_SCAN.pack(*asked, _PAGE_IS_FILE, _PAGE_IS_FILE, here, _PAGE_IS_FILE))
            count = fcntl.ioctl(fd, _SCAN_REQUEST, argument)
            ranges += [(found[3 * i], found[3 * i + 1]) for i in range(count)]
            begin = _SCAN.unpack(argument)[4]
    finally:
        os.close(fd)
    return ranges


def shared_view(address: int, nbytes: int, keep_alive: object) -> Any:
    """Return a writable buffer over the bytes themselves: a write to it reaches every process on the node."""
    view = (ctypes.c_uint8 * nbytes).from_address(address)
    view.keep_alive = keep_alive  # type: ignore[attr-defined]
    return view


def _open_store(device: int, inode: int) -> int:
    """Open the store's file read-only through a process that keeps it open, and return the descriptor.

    The path is kept between calls, the descriptor is not: an open one would hold a dead store's memory.
    """
    known = _store_paths.get((device, inode))
    if known is not None:
        fd = _open_if_same(known, device, inode)
        if fd is not None:
            return fd
    refused = 0
    for pid in _candidates():
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except PermissionError:
            refused += 1
            continue
        except OSError as error:
            _raise_if_exhausted(error)
            continue
        for number in descriptors:
            path = f"/proc/{pid}/fd/{number}"
            try:
                status = os.stat(path)
            except OSError:
                continue
            if (status.st_dev, status.st_ino) != (device, inode):
                continue
            fd = _open_if_same(path, device, inode)
            if fd is not None:
                _store_paths[device, inode] = path
                return fd
    why = (
        f"{refused} process(es) that may be the raylet refused to be looked at"
        if refused
        else "no raylet is visible from this process: it runs in another pid namespace or under another user"
    )
    raise Unmappable(f"the file behind Ray's object store could not be opened through /proc: {why}")


def _open_if_same(path: str, device: int, inode: int) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        _raise_if_exhausted(error)
        return None
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) == (device, inode):
        return fd
    os.close(fd)
    return None


def _candidates() -> Iterator[int]:
    """Yield the processes that may be this node's raylet: a worker's parent first, then any raylet."""
    parent = os.getppid()
    yield parent
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return
    for pid in pids:
        if pid == parent:
            continue
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().strip()
        except OSError:
            continue
        if name == "raylet":
            yield pid
