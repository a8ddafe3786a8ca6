"""Look up the memory behind an address: its region in `/proc/self/maps`, and pages that were written to. Linux."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .limits import raise_if_exhausted

__all__ = [
    "PAGE",
    "Location",
    "Region",
    "locate",
    "parse_region",
    "region_at",
    "regions",
    "written_bytes",
    "written_ranges",
]

PAGE = mmap.PAGESIZE


class Location(NamedTuple):
    """The place of a byte on this node. It is equal in two processes if and only if they see the same memory."""

    device: int
    inode: int
    offset: int


class Region(NamedTuple):
    """One line of `/proc/<pid>/maps`: the addresses `[start, end)`, and the file behind them."""

    start: int
    end: int
    offset: int
    device: int
    inode: int
    shared: bool
    name: str


# ---------------------------------------------------------------- regions

# PROCMAP_QUERY (Linux 6.11) looks up one region in about 1 us. Reading all of /proc/self/maps takes about 700 us in a
# worker with torch. The fields are those of struct procmap_query in the kernel's uapi/linux/fs.h.
_QUERY = struct.Struct("=9Q4I2Q")
_QUERY_REQUEST = (3 << 30) | (_QUERY.size << 16) | (ord("f") << 8) | 17
_VMA_SHARED = 8
_NAME_BYTES = 4096  # the most that the kernel takes
_Name = ctypes.c_char * _NAME_BYTES
_query_works = True


def region_at(address: int) -> Region | None:
    """Return the region of this process that has `address`. None if there is no such region, or no /proc."""
    global _query_works
    if _query_works:
        try:
            return _query_region(address)
        except OSError as error:
            raise_if_exhausted(error)
            _query_works = False
    try:
        return next((r for r in regions() if r.start <= address < r.end), None)
    except OSError as error:
        raise_if_exhausted(error)
        return None


def _query_region(address: int) -> Region | None:
    name = _Name()
    buffer = bytearray(_QUERY.pack(_QUERY.size, 0, address, *[0] * 8, _NAME_BYTES, 0, ctypes.addressof(name), 0))
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _QUERY_REQUEST, buffer)
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)
    _, _, _, start, end, flags, _, offset, inode, major, minor, *_ = _QUERY.unpack(buffer)
    device, is_shared = os.makedev(major, minor), bool(flags & _VMA_SHARED)
    return Region(start, end, offset, device, inode, is_shared, os.fsdecode(name.value))


def regions(pid: int | str = "self") -> Iterator[Region]:
    """Yield every region of process `pid`. Raises OSError if /proc does not show that process."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            region = parse_region(line)
            if region is not None:
                yield region


def parse_region(line: str) -> Region | None:
    """Return the region of a line of `maps`, or of a first line of an entry in `smaps`; None for any other line."""
    fields = line.rstrip("\n").split(maxsplit=5)
    if len(fields) < 5 or "-" not in fields[0] or fields[0].endswith(":"):
        return None
    addresses, permissions, offset, device, inode = fields[:5]
    start, end = (int(a, 16) for a in addresses.split("-"))
    major, minor = (int(d, 16) for d in device.split(":"))
    name = fields[5] if len(fields) > 5 else ""
    return Region(start, end, int(offset, 16), os.makedev(major, minor), int(inode), permissions[3] == "s", name)


def locate(address: int) -> Location | None:
    """Return the place of the byte at `address`, or None if only this process has that memory.

    A page of a private view that was written to is such memory: it no longer shows the file.
    """
    region = region_at(address)
    if region is None or region.inode == 0:
        return None
    if not region.shared and written_bytes(address, 1):
        return None
    return Location(region.device, region.inode, region.offset + address - region.start)


def written_bytes(address: int, nbytes: int) -> int:
    """Return how many bytes of a range are in pages that this process has copied by writing to them."""
    if nbytes <= 0:
        return 0
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    pages = np.flatnonzero(_are_private(first, last + 1)).astype(np.int64) + first
    begins = np.maximum(pages * PAGE, address)
    ends = np.minimum((pages + 1) * PAGE, address + nbytes)
    return int((ends - begins).sum())


def _are_private(first: int, last: int, pid: int | str = "self") -> np.ndarray[Any, Any]:
    """Tell for each of the pages `[first, last)` of a process whether it is a private copy.

    Reads `/proc/self/pagemap` (kernel: admin-guide/mm/pagemap): bit 63 present, 62 swapped, 61 file or shared.
    """
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        entries = np.frombuffer(os.pread(pagemap.fileno(), (last - first) * 8, first * 8), dtype=np.uint64)
    exists = (entries >> np.uint64(62)) != 0
    own: np.ndarray[Any, Any] = exists & ((entries >> np.uint64(61)) & np.uint64(1) == 0)
    return own


# PAGEMAP_SCAN, Linux 6.7: kernel, admin-guide/mm/pagemap; field order as in uapi/linux/fs.h, struct pm_scan_arg.
_SCAN = struct.Struct("=12Q")
_SCAN_REQUEST = (3 << 30) | (_SCAN.size << 16) | (ord("f") << 8) | 16
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_SCAN_RANGES = 4096
_SCAN_BYTES = 16 << 20  # a call; during a call no other thread can map or unmap memory, which malloc does
_scan_works = True


def written_ranges(begin: int, end: int, pid: int | str = "self") -> list[tuple[int, int]]:
    """Return the address ranges of the pages in a range that are private copies of a process."""
    global _scan_works
    if _scan_works:
        try:
            return _scan_written(begin, end, pid)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            _scan_works = False
    ranges: list[tuple[int, int]] = []
    step = 1 << 30
    for first in range(begin, end, step):
        last = min(first + step, end)
        own = _are_private(first // PAGE, last // PAGE, pid)
        if len(own) != (last - first) // PAGE:
            raise OSError("pagemap is cut short")
        ranges += [(first + page * PAGE, first + (page + 1) * PAGE) for page in np.flatnonzero(own).tolist()]
    return ranges


def _scan_written(begin: int, end: int, pid: int | str) -> list[tuple[int, int]]:
    found = (ctypes.c_uint64 * (3 * _SCAN_RANGES))()
    here = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED
    ranges: list[tuple[int, int]] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
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
