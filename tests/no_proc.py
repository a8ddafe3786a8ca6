"""Threads that see another file system: without /proc, or with another file in a place."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x00020000, 4096, 16384, 1 << 18


def can_mount() -> bool:
    """Tell whether this user may hide /proc from one thread, by trying it in a subprocess."""
    code = "from no_proc import hide_proc; hide_proc(); import os; assert not os.path.exists('/proc/self')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode
        == 0
    )


def hide_proc() -> None:
    """Give the calling thread a mount namespace without /proc."""
    _mount(b"none", b"/proc", b"tmpfs", 0)


def mount_over(place: str, path: str) -> None:
    """Let the calling thread see the file `path` at `place`."""
    _mount(path.encode(), place.encode(), None, MS_BIND)


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(source, target, kind, flags, None),
    ):
        if done != 0:
            raise OSError(ctypes.get_errno(), f"cannot mount at {target.decode()}")
