"""Errors of the operating system that mean that a limit was reached: which limit, with its numbers.

The kernel says only "out of memory" or "too many open files". This file compares the limits with what is in use.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import ZeroCopyError

__all__ = ["Limit", "raise_if_exhausted", "reached_limits"]

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
# Mappings and descriptors that the process may have freed between the error and the count.
_MAPPINGS_OF_OTHERS, _FILES_OF_OTHERS = 64, 8


class Limit(NamedTuple):
    """A limit that was reached: the fact with its numbers, and the command that raises the limit."""

    fact: str
    remedy: str


def raise_if_exhausted(error: OSError, nbytes: int = 0) -> None:
    """Raise ZeroCopyError if `error` says that a limit was reached; it names the limit.

    Such an error does not say whether a private view is possible here. `nbytes` is the size of the mapping that
    failed.
    """
    if error.errno not in _EXHAUSTED:
        return
    wanted = f" ({_mib(nbytes)})" if nbytes else ""
    limits = list(reached_limits(error.errno, nbytes))
    if not limits:
        raise ZeroCopyError(
            f"this process cannot map the model{wanted}: {error.strerror}. No limit of the process or the machine "
            f"that this package knows was reached. Drop models that are loaded and not used."
        ) from error
    facts = " ".join(f"{limit.fact[:1].upper()}{limit.fact[1:]}." for limit in limits)
    remedies = ", or ".join(limit.remedy for limit in limits)
    raise ZeroCopyError(
        f"this process cannot map the model{wanted}: {error.strerror}. {facts} Drop models that are loaded and not "
        f"used, or raise the limit: {remedies}."
    ) from error


def reached_limits(number: int | None, nbytes: int = 0) -> Iterator[Limit]:
    """Yield the limits that explain an error number, for a mapping of `nbytes`."""
    if number in (errno.EMFILE, errno.ENFILE):
        yield from _files(number)
    elif number == errno.ENOMEM:
        yield from _address_space(nbytes)
        yield from _mappings()
        yield from _commitment(nbytes)
    elif number == errno.EAGAIN:
        yield from _locked(nbytes)


def _files(number: int) -> Iterator[Limit]:
    if number == errno.ENFILE:
        used, _, most = (_read("/proc/sys/fs/file-nr") or "0 0 0").split()
        yield Limit(f"the machine has {used} of {most} files open", f"sysctl -w fs.file-max={2 * int(most)}")
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        used_here = len(os.listdir("/proc/self/fd"))
    except OSError:  # this too needs a descriptor
        used_here = limit
    if used_here + _FILES_OF_OTHERS >= limit:
        yield Limit(f"this process has {used_here} of {limit} files open", f"ulimit -n {max(2 * limit, 1024)}")


def _address_space(nbytes: int) -> Iterator[Limit]:
    used = _sizes("/proc/self/status")
    for name, option, field, what in (
        ("RLIMIT_AS", "-v", "VmSize", "of address space"),
        ("RLIMIT_DATA", "-d", "VmData", "of writable memory"),
    ):
        limit = resource.getrlimit(getattr(resource, name))[0]
        size = used.get(field, 0)
        if limit != resource.RLIM_INFINITY and size + max(nbytes, 1) > limit:
            yield Limit(
                f"this process uses {_mib(size)} of the {_mib(limit)} {what} that it may use (ulimit {option})",
                f"ulimit {option} {(size + 2 * nbytes) // 1024} before the start of Ray",
            )


def _mappings() -> Iterator[Limit]:
    text = _read("/proc/sys/vm/max_map_count")
    used = _count_lines("/proc/self/maps")
    if text is None or used is None:
        return
    limit = int(text)
    if used + _MAPPINGS_OF_OTHERS >= limit:
        yield Limit(
            f"this process has {used} of {limit} mappings (vm.max_map_count)",
            f"sysctl -w vm.max_map_count={max(4 * limit, 262144)}",
        )


def _commitment(nbytes: int) -> Iterator[Limit]:
    if (_read("/proc/sys/vm/overcommit_memory") or "").strip() != "2":
        return
    memory = _sizes("/proc/meminfo")
    used, limit = memory.get("Committed_AS", 0), memory.get("CommitLimit", 0)
    if used + nbytes > limit:
        yield Limit(
            f"the machine has promised {_mib(used)} of the {_mib(limit)} of memory that it may "
            f"promise (vm.overcommit_memory is 2), and a private view counts with its full size",
            "sysctl -w vm.overcommit_memory=0",
        )


def _locked(nbytes: int) -> Iterator[Limit]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    used = _sizes("/proc/self/status").get("VmLck", 0)
    if limit != resource.RLIM_INFINITY and used + nbytes > limit:
        yield Limit(f"this process has locked {_mib(used)} of {_mib(limit)} of memory", "ulimit -l unlimited")


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"


def _sizes(path: str) -> dict[str, int]:
    """Return the sizes in a file of /proc that has lines such as `VmSize:   123 kB`, in bytes."""
    lines = (line.split() for line in (_read(path) or "").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _count_lines(path: str) -> int | None:
    try:
        return sum(piece.count(b"\n") for piece in _pieces(path))
    except OSError:
        return None


def _read(path: str) -> str | None:
    try:
        return b"".join(_pieces(path)).decode(errors="replace")
    except OSError:
        return None


def _pieces(path: str) -> Iterator[bytes]:
    """Yield a file of /proc in small pieces: the process may have no memory for a buffer or for the whole text."""
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(2048):
            yield piece
