"""The files of a compiled program: unpacked once per node, into a directory that only this user can write.

Note [Packages]

    <temporary directory>/ray_zerocopy-<uid>/<sha256 of the files>/          complete: made by one rename
    <temporary directory>/ray_zerocopy-<uid>/.<sha256>-<random>/             being written by one process

Processes that unpack at the same time each write a directory with a random name, and the first rename wins. They
rename under a lock, so that nobody takes a good directory for a damaged one. A process that is killed leaves
a directory with a random name, which a later unpacking removes. torch opens the complete directory in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ..errors import ZeroCopyError

__all__ = ["cpu_features", "features_of", "hash_files", "machine", "unpack_files"]

# Seconds after which a directory with a random name belongs to a process that was killed.
_ABANDONED_AFTER = 600.0


def hash_files(files: Mapping[str, Any]) -> str:
    """Return the key of a package: a hash of the names and the bytes of its files."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{memoryview(data).nbytes}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def unpack_files(key: str, files: Mapping[str, Any]) -> str:
    """Return the directory of a package on this node. Write the files if no process has done so.

    Raises:
        ZeroCopyError: The temporary directory is full, read-only or not private.
    """
    try:
        root = _private_root()
        complete = os.path.join(root, key)
        if _is_complete(complete, files):
            return complete
        _remove_abandoned(root)
        partial = tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=root)
        try:
            for name, data in files.items():
                path = os.path.join(partial, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(data)
            _put_in_place(partial, complete, files)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return complete
    except OSError as error:
        nbytes = sum(memoryview(data).nbytes for data in files.values())
        raise ZeroCopyError(
            f"the compiled program ({nbytes} bytes of files) cannot be unpacked in the temporary directory of this "
            f"node: {error}. torch opens the program from there. Name another directory that exists: in workers "
            f"ray.init(runtime_env={{'env_vars': {{'TMPDIR': '/path'}}}}), in a driver `export TMPDIR=...` "
            f"first."
        ) from error


def _private_root() -> str:
    root = os.path.join(tempfile.gettempdir(), f"ray_zerocopy-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"other users can write to {root}. Remove it, or make it private: chmod 700 {root}")
    return root


def _is_complete(directory: str, files: Mapping[str, Any]) -> bool:
    """Tell whether all files are there with their sizes: a cleaner of temporary files may have removed some."""
    try:
        sizes = {name: os.path.getsize(os.path.join(directory, name)) for name in files}
    except OSError:
        return False
    return all(sizes[name] == memoryview(data).nbytes for name, data in files.items())


def _put_in_place(partial: str, complete: str, files: Mapping[str, Any]) -> None:
    """Rename a new directory to its final name, unless another process has done so. Replace a damaged one."""
    root = os.open(os.path.dirname(complete), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(root, fcntl.LOCK_EX)  # until it is closed
        if _is_complete(complete, files):
            return
        if os.path.isdir(complete):
            os.rename(complete, f"{partial}-damaged")
            shutil.rmtree(f"{partial}-damaged", ignore_errors=True)
        os.rename(partial, complete)
    finally:
        os.close(root)


def _remove_abandoned(root: str) -> None:
    for entry in os.scandir(root):
        with contextlib.suppress(OSError):
            if entry.name.startswith(".") and time.time() - entry.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(entry.path, ignore_errors=True)


# ---------------------------------------------------------------- the CPU

_INSTRUCTION_SETS = re.compile(
    r"sse|ssse|avx|fma|f16c|bmi|aes|vaes|sha|gfni|pclmul|vpclmul|popcnt|abm|movbe|adx|amx|xop|tbm"
)
# The flags that a C++ compiler may use for a level of `-march`, beyond those that every x86-64 has.
_LEVEL_2 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt"})
_LEVEL_3 = _LEVEL_2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_LEVELS = {
    "x86-64-v2": _LEVEL_2,
    "x86-64-v3": _LEVEL_3,
    "x86-64-v4": _LEVEL_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
# What inductor calls a vector instruction set, and the flags of Linux for it.
_FLAGS = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma", "f16c"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile",),
}


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return the instruction sets of this CPU, as Linux names them. Empty where /proc/cpuinfo does not list them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            name, _, flags = line.partition(":")
            if name.strip() == "flags":
                return frozenset(flag for flag in flags.split() if _INSTRUCTION_SETS.match(flag))
            if name.strip() == "Features":  # of ARM: all are instruction sets
                return frozenset(flags.split())
    return frozenset()


def features_of(march: str, vector_set: str) -> frozenset[str]:
    """Return the flags of Linux that code may use which was compiled for another CPU than this one.

    Args:
        march: The option `-march`. For other values than the levels of x86-64, all flags of this CPU.
        vector_set: The vector instruction sets that inductor reports, as `AVX512 AVX512_VNNI`.
    """
    if march not in _LEVELS:
        return cpu_features()
    vectors = {flag for name in vector_set.split() for flag in _FLAGS.get(name, ())}
    return (_LEVELS[march] | vectors) & cpu_features()


def machine() -> str:
    return f"{platform.system()} {platform.machine()}"
