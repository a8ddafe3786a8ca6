"""The file behind the node's object store, opened through a process that keeps it open. Linux.

The store's file has been unlinked, and Ray closes its descriptor in the worker. The raylet keeps a descriptor. Every
process that may inspect the raylet can open the same file by `/proc/<raylet>/fd/<n>`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .limits import raise_if_exhausted
from .regions import PAGE, Region, region_at

__all__ = ["OpenFiles", "Unmappable", "open_file", "raylet_pids"]


class Unmappable(Exception):
    """A private view is not possible here; the message is the reason."""


def open_file(address: int, nbytes: int) -> tuple[int, int]:
    """Open the file of the store that has the bytes `[address, address + nbytes)`, for reading.

    Returns:
        A descriptor, which the caller must close, and the offset in the file of the byte at `address`.

    Raises:
        Unmappable: The file cannot be opened; the message is the reason.
        ZeroCopyError: The process has reached a limit of descriptors or memory.
    """
    region = _check_region(region_at(address), address + nbytes)
    return _open_store(_File(region.device, region.inode)), region.offset + address - region.start


def _check_region(region: Region | None, end: int) -> Region:
    """Return a region of the store that has bytes up to `end`; raise `Unmappable` for anything else."""
    if region is None:
        if not os.path.exists("/proc/self/maps"):
            raise Unmappable(f"this process has no /proc file system (platform {sys.platform})")
        raise Unmappable("/proc/self/maps does not show the object store's memory")
    if end > region.end:
        raise Unmappable("the object's bytes are in more than one mapping of the store")
    if not region.shared:
        raise Unmappable("only this process has the memory of these bytes")
    return region


class OpenFiles:
    """The store's files that are open during a `with` block: each is looked up and opened once for many objects."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._descriptors: dict[_File, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._descriptors.values():
            os.close(fd)

    def region_at(self, address: int) -> Region | None:
        """Return the region of this process that has `address`; see `regions.region_at`."""
        for region in self._regions:
            if region.start <= address < region.end:
                return region
        found = region_at(address)
        if found is not None:
            self._regions.append(found)
        return found

    def open(self, address: int, nbytes: int) -> tuple[int, int]:
        """Open a file as `open_file` does. The descriptor is closed at the end of the `with` block."""
        region = _check_region(self.region_at(address), address + nbytes)
        file = _File(region.device, region.inode)
        if file not in self._descriptors:
            self._descriptors[file] = _open_store(file)
        return self._descriptors[file], region.offset + address - region.start


class _File(NamedTuple):
    """A file as `/proc/self/maps` names it. On btrfs and overlay, `stat` gives another device."""

    device: int
    inode: int


_known_paths: dict[_File, str] = {}


def _open_store(file: _File) -> int:
    """Open the store's file read-only through a process that keeps it open, and return the descriptor.

    The path is cached. The descriptor is not, because an open descriptor would keep the memory of a dead store.
    """
    known = _known_paths.get(file)
    if known is not None:
        with contextlib.suppress(PermissionError):
            fd = _open_if_same(known, file)
            if fd is not None:
                return fd
    searched: list[str] = []
    denied: list[str] = []
    for pid in raylet_pids():
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{number}"
                fd = _open_if_same(path, file)
                if fd is not None:
                    _known_paths[file] = path
                    return fd
            searched.append(_describe(pid))
        except PermissionError:
            denied.append(_describe(pid))
        except OSError as error:  # the process ended
            raise_if_exhausted(error)
    raise Unmappable(
        f"the file behind Ray's object store cannot be opened through /proc: {_reason(searched, denied)}"
    )


def _reason(searched: list[str], denied: list[str]) -> str:
    """Say why no process gave the store's file, given the searched processes and those with permission denied."""
    raylets = [name for name in denied if name.endswith(_RAYLET)]
    if raylets:
        return (
            f"permission denied on the descriptors of {', '.join(raylets)}. The raylet runs as another user, or this "
            f"process lacks the capability CAP_SYS_PTRACE"
        )
    raylets = [name for name in searched if name.endswith(_RAYLET)]
    if raylets:
        return f"{', '.join(raylets)} has no descriptor of this file, so it is not the raylet of this node's store"
    return (
        "no raylet is visible. This process is in another pid namespace than the raylet, or /proc hides processes of "
        "other users (hidepid)"
    )


def _open_if_same(path: str, file: _File) -> int | None:
    """Open `path` if it is `file`. Raises PermissionError if this process may not inspect `path`."""
    try:
        if os.stat(path).st_ino != file.inode:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # it was closed, or the process ended
        return None
    except PermissionError:
        raise
    except OSError as error:
        raise_if_exhausted(error)
        return None
    status = os.fstat(fd)
    if status.st_ino == file.inode and (file.device == status.st_dev or file.device == _device_in_maps(fd)):
        return fd
    os.close(fd)
    return None


def _device_in_maps(fd: int) -> int | None:
    """Return the device that `/proc/self/maps` shows for an open file, by mapping one page of it."""
    try:
        with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            region = region_at(np.frombuffer(page, dtype=np.uint8).__array_interface__["data"][0])
    except (OSError, ValueError):  # the file is empty or cannot be mapped
        return None
    return None if region is None else region.device


_RAYLET = "(raylet)"


def _describe(pid: int) -> str:
    return f"process {pid} ({_command(pid) or '?'})"


def _command(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return None


def raylet_pids() -> Iterator[int]:
    """Yield the processes that may be the raylet of this node: the parent first, then every raylet."""
    parent = os.getppid()
    if parent:  # 0: the parent is in another pid namespace
        yield parent
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return
    yield from (pid for pid in pids if pid != parent and _command(pid) == "raylet")
