"""Where the object store of this node lies: in memory or on a disk, and objects in files beside the store.

Ray starts the raylet with two directories: one for the store, usually /dev/shm, and one for fallback files on a disk.
Ray puts an object into a fallback file when the store has no room for it, without a word.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import ray

from .._pages.regions import Region, region_at, regions
from .._pages.store_file import raylet_pids
from ..errors import warn
from .ref import format_bytes

__all__ = ["StorePlace", "is_in_memory", "store_place", "warn_if_on_disk"]

# Ray puts the store here, unless it is too small. Fallback files are in a directory of the session.
_SHARED_MEMORY = "/dev/shm"
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")


class StorePlace(NamedTuple):
    """Where a node's object store lies.

    Attributes:
        directory: The directory of the store.
        fallback_directory: The directory of fallback files.
        capacity: Bytes that the store holds.
        file_system: The type of the file system of `directory`, such as `tmpfs`; empty if unknown.
    """

    directory: str
    fallback_directory: str
    capacity: int
    file_system: str

    @property
    def is_in_memory(self) -> bool:
        """Whether the store is in memory. True if the file system is unknown."""
        return not self.file_system or self.file_system in _MEMORY_FILE_SYSTEMS


class _File(NamedTuple):
    """A file with objects of the store."""

    directory: str
    is_fallback: bool
    is_in_memory: bool


_places: dict[str, StorePlace | None] = {}  # by session and node; a node's store never moves
_files: dict[tuple[int, int], _File] = {}  # by device and inode


def store_place() -> StorePlace | None:
    """Return where the object store of this node lies, from the raylet's command line. None if it is not visible."""
    context = ray.get_runtime_context()
    key = f"{context.gcs_address} {context.get_node_id()}"
    if key not in _places:
        _places[key] = _find_place(context.get_node_id(), context.gcs_address)
    return _places[key]


def _find_place(node: str, gcs_address: str) -> StorePlace | None:
    for pid in raylet_pids():
        arguments = _arguments(pid)
        if "plasma_directory" not in arguments:
            continue
        named = arguments.get("node_id")
        if named == node if named else arguments.get("gcs-address", gcs_address) == gcs_address:
            directory = arguments["plasma_directory"]
            words = arguments.get("static_resource_list", "").split(",")
            resources = dict(zip(words[::2], words[1::2], strict=False))
            capacity = int(float(resources.get("object_store_memory", 0)))
            return StorePlace(directory, arguments.get("fallback_directory", ""), capacity, _file_system(directory))
    return None


def _arguments(pid: int) -> dict[str, str]:
    """Return the options `--name=value` of a process."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")
    except OSError:
        return {}
    pairs = (word[2:].partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def _file_system(directory: str) -> str:
    """Return the type of the file system of a directory, from /proc/self/mounts; empty if it is unknown."""
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        path = os.path.realpath(directory)
        for line in mounts:
            _, mounted, found, *_ = line.split(" ")
            mounted = mounted.encode().decode("unicode_escape")
            inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
            if inside and len(mounted) >= len(best):
                best, kind = mounted, found
    return kind


def is_in_memory(address: int) -> bool:
    """Tell whether the byte at an address is in the object store itself, and the store is in memory."""
    region = region_at(address)
    return region is not None and region.shared and _file_of(region).is_in_memory


def warn_if_on_disk(name: str, region: Region, nbytes: int) -> None:
    """Warn if bytes of a model in a region of the store are in a fallback file, or if the store is on a disk.

    The second warning is given once in a process.
    """
    file = _file_of(region)
    if file.is_in_memory:
        return
    place = store_place()
    if file.is_fallback:
        _warn_once(
            f"{name} {region.inode}",
            f"{name} ({format_bytes(nbytes)}) is in a file on disk in {file.directory}: the object store of this "
            f"node {_usage(place)}, so Ray wrote the model to disk. Workers share it all the same, but loads are "
            f"slower. Free objects before you prepare or load the model, or give ray.init a larger "
            f"object_store_memory.",
        )
    elif place is not None:
        _warn_once(
            place.directory,
            f"the object store of this node is not in memory: it is in {place.directory} ({place.file_system}), with "
            f"{format_bytes(place.capacity)}. Loads are as slow as that disk. Ray uses a disk if /dev/shm is smaller "
            f"than object_store_memory. Mount a larger /dev/shm (docker run --shm-size=...), or lower "
            f"object_store_memory.",
        )


_warned: set[str] = set()


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warn(message)


def _file_of(region: Region) -> _File:
    """Return the file of a region of the store. Each file is looked up once in a process."""
    key = region.device, region.inode
    if key not in _files:
        named = region if region.name else next((r for r in regions() if r.start == region.start), region)
        _files[key] = _classify(named)
    return _files[key]


def _classify(region: Region) -> _File:
    directory = os.path.dirname(region.name.removesuffix(" (deleted)"))
    if directory == _SHARED_MEMORY:  # as nearly always; finding the raylet takes as long as half a load
        return _File(directory, is_fallback=False, is_in_memory=True)
    place = store_place()
    if place is None:
        return _File(directory, is_fallback=True, is_in_memory=False)
    if os.path.realpath(place.directory) == os.path.realpath(place.fallback_directory):
        is_fallback = region.end - region.start < place.capacity  # a fallback file has one object
    else:
        is_fallback = os.path.realpath(directory) == os.path.realpath(place.fallback_directory)
    return _File(directory, is_fallback, place.is_in_memory and not is_fallback)


def _usage(place: StorePlace | None) -> str:
    """Say how full the store of this node is, from the raylet's statistics."""
    capacity = f" of {format_bytes(place.capacity)}" if place is not None and place.capacity else ""
    try:
        from ray._private.internal_api import node_stats

        node = ray.get_runtime_context().get_node_id()
        about = next(n for n in ray.nodes() if n["NodeID"] == node)
        stats = node_stats(about["NodeManagerAddress"], about["NodeManagerPort"], include_memory_info=False)
        used = stats.store_stats.object_store_bytes_used - stats.store_stats.object_store_bytes_fallback
        return f"has {format_bytes(used)}{capacity} in use"
    except Exception:  # an internal function of Ray, for the text of a warning
        return f"has no room left{capacity}"
