"""How many actors and threads suit a machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["describe_pool", "usable_cores"]


def usable_cores() -> int:
    """Return how many cores this process may use: those of the machine, its affinity, and its container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_container_limits()]))


def _container_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    try:  # version 2: "200000 100000", or "max 100000"
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1; a quota of -1 is no limit
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return []
    if not quota.isdigit() or not int(period):
        return []
    return [-(-int(quota) // int(period))]


def describe_pool(threads: int, cores: int) -> str:
    """Return the number of actors that suits a machine, for actors that compute with `threads` threads on the CPU."""
    actors = max(1, cores // threads)
    computes = f"computes with {threads} thread{'s' * (threads > 1)}"
    uses = (
        f"{actors} such actor{'s use' if actors > 1 else ' uses'} the {cores} core{'s' * (cores > 1)} of this machine"
    )
    better = f"; {cores} actors with num_cpus=1 are usually faster" if 1 < threads <= cores else ""
    return f"{computes}; {uses}{better}"
