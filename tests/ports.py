"""Ports of this machine, for servers that tests start."""

from __future__ import annotations

import random
import socket


def is_open(port: int) -> bool:
    """Say whether somebody answers at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nobody answers at, and that the system gives to nobody by itself, as it does to workers."""
    return next(port for port in random.sample(range(20_000, 30_000), 100) if not is_open(port))
