"""The checks of the doctor. `check_node` runs on each node; it never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import ray
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from .._pages import views
from .._pages.regions import regions
from .._pages.store_file import Unmappable
from .._store.host import address_range
from .._store.ref import format_bytes
from .._store.store_place import store_place
from ..errors import ZeroCopyError

__all__ = ["OK", "PROBLEM", "WARNING", "Check", "check_node"]

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_PACKAGES = ("ray", "torch", "pyarrow", "numpy")
# Below these numbers, a process with a few models is likely to meet the limit.
_FEW_FILES, _FEW_MAPPINGS = 4096, 30_000


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        name: What was checked.
        status: "ok", "warning" (works, but not as well as it could) or "problem" (a promise does not hold).
        finding: What was found, with numbers.
        remedy: What to do; empty if nothing.
    """

    name: str
    status: str
    finding: str
    remedy: str = ""


def check_node() -> list[Check]:
    """Check the node of this process, which is connected to Ray."""
    return [
        _run(check) for check in (_platform, _store, _isolation, _files, _mappings, _memory, _huge_pages, _gpus)
    ] + [*_versions()]


def _run(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a doctor that fails says where
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, WARNING, f"not checked: {type(error).__name__}: {error}")


def _platform() -> Check:
    kernel = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    if sys.platform != "linux":
        return Check("platform", PROBLEM, kernel, "Writes to weights are isolated on Linux only. Use Linux.")
    if not os.path.exists("/proc/self/maps"):
        return Check("platform", PROBLEM, f"{kernel}, without /proc", "Mount /proc in the container.")
    return Check("platform", OK, kernel)


def _store() -> Check:
    place = store_place()
    if place is None:
        return Check(
            "object store",
            WARNING,
            "no raylet of this node is visible, so the place of the store is not known",
            "Run in the pid namespace of the raylet, as its user.",
        )
    where = f"{format_bytes(place.capacity)} in {place.directory} ({place.file_system or 'unknown file system'})"
    if not place.is_in_memory:
        return Check(
            "object store",
            PROBLEM,
            f"on a disk: {where}. Loads are as slow as that disk",
            "Mount a /dev/shm that is larger than object_store_memory (docker run --shm-size=...), or lower "
            "object_store_memory.",
        )
    return Check("object store", OK, where)


def _isolation() -> Check:
    stored = ray.get(ray.put(np.zeros(1 << 18, dtype=np.uint8)))
    begin, nbytes, _ = address_range([stored])
    try:
        views.private_view(begin, nbytes, stored)
    except Unmappable as reason:
        return Check(
            "isolation",
            PROBLEM,
            f"not possible: {reason}. A write to a weight would reach every worker of the node",
            "Run workers as the user of the raylet, in its pid namespace, with /proc; or treat models as read-only.",
        )
    except ZeroCopyError as error:
        return Check("isolation", PROBLEM, str(error), "Raise the limit.")
    return Check("isolation", OK, "a private, copy-on-write view of the store is possible")


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    finding = f"{used} of {soft} open files in use by this process"
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return Check("open files", WARNING, finding, f"Raise the limit: ulimit -n {min(max(hard, soft), 65_536)}.")
    return Check("open files", OK, finding)


def _mappings() -> Check:
    limit = int(_read("/proc/sys/vm/max_map_count"))
    finding = f"{sum(1 for _ in regions())} of {limit} mappings in use by this process"
    if limit < _FEW_MAPPINGS:
        return Check("mappings", WARNING, finding, "Raise the limit: sysctl -w vm.max_map_count=262144.")
    return Check("mappings", OK, finding)


def _memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    place = store_place()
    capacity = place.capacity if place is not None else 0
    if soft != resource.RLIM_INFINITY and soft < 2 * capacity + (8 << 30):
        return Check(
            "address space",
            WARNING,
            f"limited to {format_bytes(soft)}, and the object store takes {format_bytes(capacity)} of it in each "
            f"worker, models again as much",
            "Remove the limit: ulimit -v unlimited.",
        )
    if _read("/proc/sys/vm/overcommit_memory") == "2":
        return Check(
            "address space",
            WARNING,
            "strict overcommit (vm.overcommit_memory=2) counts each private view as if it were written to",
            "Set sysctl -w vm.overcommit_memory=0, or raise vm.overcommit_ratio.",
        )
    return Check("address space", OK, "not limited")


def _huge_pages() -> Check:
    modes = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = re.search(r"\[(\w+)\]", modes)
    return Check("huge pages", OK, f"shmem_enabled is {chosen.group(1) if chosen else modes}")


def _gpus() -> Check:
    node = ray.get_runtime_context().get_node_id()
    about = next(found for found in ray.nodes() if found["NodeID"] == node)
    count = int(about["Resources"].get("GPU", 0))
    if count and torch.version.cuda is None and torch.version.hip is None:
        return Check(
            "GPUs",
            PROBLEM,
            f"Ray has {count} GPUs on this node, and torch {torch.__version__} has no support for them",
            "Install a torch with CUDA or ROCm.",
        )
    return Check("GPUs", OK, f"Ray has {count} on this node")


def _versions() -> Iterator[Check]:
    """Compare installed versions with the floors and the tested versions, which the package's metadata has."""
    try:
        required = [Requirement(text) for text in importlib.metadata.requires("ray-zerocopy") or []]
    except importlib.metadata.PackageNotFoundError:
        required = []
    for package in _PACKAGES:
        installed = importlib.metadata.version(package)
        floors = [r.specifier for r in required if r.name == package and r.marker is None]
        tested = {
            spec.version
            for r in required
            if r.name == package and r.marker
            for spec in r.specifier
            if spec.operator == "=="
        }
        if any(Version(installed) not in floor for floor in floors):
            yield Check(
                package, PROBLEM, f"{installed} is installed, {floors[0]} is required", f"pip install -U {package}"
            )
        elif tested and not any(
            Version(installed).base_version == Version(version).base_version for version in tested
        ):
            listed = ", ".join(sorted(tested))
            yield Check(
                package, WARNING, f"{installed} is installed, {listed} was tested", f"pip install {package}=={listed}"
            )
        else:
            yield Check(package, OK, installed)


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()
