"""Limits of the process and the machine: the error names the limit that was reached, with its numbers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from ray_zerocopy import ZeroCopyError, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy._pages import limits

MIB = 1 << 20


@contextlib.contextmanager
def soft_limit(name: str, value: int) -> Iterator[None]:
    """Set a soft limit of this process in a `with` block."""
    kind = getattr(resource, name)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def size_of(field: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def use_up_memory() -> list[bytearray]:
    """Take the memory that the allocator still has, until it has no 10,000 bytes in one piece."""
    taken = []
    for nbytes in (100_000, 10_000):
        with contextlib.suppress(MemoryError):
            while True:
                taken.append(bytearray(nbytes))
    return taken


def load_under(limit: str, model_ref: Any) -> str:
    """Load a model twice, the second time under a limit, and return the error."""
    kept = load_model_in_actor(model_ref)
    with contextlib.ExitStack() as stack:
        if limit == "mappings":
            most = int(open("/proc/sys/vm/max_map_count").read())
            kept_maps: list[mmap.mmap] = []
            stack.callback(lambda: [one.close() for one in kept_maps])
            with contextlib.suppress(OSError):
                for number in range(2 * most):  # neighbours of other rights do not merge
                    rights = mmap.PROT_READ | (mmap.PROT_WRITE if number % 2 else 0)
                    kept_maps.append(mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, rights))
        elif limit == "files":
            stack.enter_context(soft_limit("RLIMIT_NOFILE", len(os.listdir("/proc/self/fd")) + 2))
            files = [stack.enter_context(open(os.devnull)) for _ in range(1)]
            with contextlib.suppress(OSError):
                while True:
                    files.append(stack.enter_context(open(os.devnull)))
        else:
            name = limit.removesuffix(", no memory")
            field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[name]
            stack.enter_context(soft_limit(name, size_of(field) + 20 * MIB))
        taken = use_up_memory() if limit.endswith("no memory") else []
        for _ in range(50):
            try:
                load_model_in_actor(model_ref)
            except ZeroCopyError as error:
                taken.clear()
                return str(error)
            except MemoryError:  # too little is left even for the numbers of the error
                del taken[-2:]
    del kept
    return ""


@pytest.mark.parametrize(
    ("limit", "facts", "others"),
    [
        (
            "RLIMIT_AS",
            r"100\.\d MiB.*uses [\d,.]+ MiB of the [\d,.]+ MiB of address.*ulimit -v \d+",
            "max_map_count",
        ),
        (
            "RLIMIT_AS, no memory",
            r"100\.\d MiB.*uses [\d,.]+ MiB of the [\d,.]+ MiB of address.*ulimit -v \d+",
            "max_map_count",
        ),
        ("RLIMIT_DATA", r"of writable memory.*ulimit -d \d+", "max_map_count|ulimit -v"),
        ("mappings", r"has \d+ of \d+ mappings.*sysctl -w vm.max_map_count=\d+", "ulimit"),
        ("files", r"has \d+ of \d+ files open.*ulimit -n \d+", "max_map_count"),
    ],
)
def test_the_limit_is_named(limit: str, facts: str, others: str, ray_session: None) -> None:
    """A load under a limit of the process names that limit and its numbers, and no other."""
    ref = prepare_model_for_actors(torch.zeros(25 * MIB))
    said = ray.get(ray.remote(num_cpus=0.1)(load_under).remote(limit, ref))
    assert re.search(facts, said), said
    assert not re.search(others, said), said


def test_limits_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict overcommit and a full table of files are named with the machine's numbers."""
    contents = {
        "/proc/sys/vm/overcommit_memory": "2\n",
        "/proc/meminfo": "CommitLimit:    1048576 kB\nCommitted_AS:   1000000 kB\n",
        "/proc/sys/fs/file-nr": "9000\t0\t9000\n",
    }
    real = limits._read
    monkeypatch.setattr(limits, "_read", lambda path: contents.get(path) or real(path))
    with pytest.raises(ZeroCopyError, match=r"promised 976\.6 MiB of the 1,024\.0 MiB.*overcommit_memory=0"):
        limits.raise_if_exhausted(OSError(errno.ENOMEM, "Cannot allocate memory"), 100 * MIB)
    with pytest.raises(ZeroCopyError, match=r"9000 of 9000 files.*fs\.file-max=18000"):
        limits.raise_if_exhausted(OSError(errno.ENFILE, "Too many open files in system"))
    with pytest.raises(ZeroCopyError, match="No limit of the process"):
        limits.raise_if_exhausted(OSError(errno.ENOMEM, "Cannot allocate memory"), MIB)
    limits.raise_if_exhausted(OSError(errno.EPERM, "not permitted"))
