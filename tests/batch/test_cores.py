"""How many actors and threads suit a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_zerocopy._batch.cores import _container_limits, describe_pool, usable_cores


@pytest.mark.parametrize(
    ("threads", "cores", "facts"),
    [
        (1, 1, ["1 thread;", "1 such actor uses the 1 core "]),
        (1, 8, ["1 thread;", "8 such actors use the 8 cores"]),
        (2, 8, ["2 threads;", "4 such actors use the 8 cores", "8 actors with num_cpus=1"]),
        (16, 8, ["16 threads;", "1 such actor uses the 8 cores"]),
    ],
)
def test_the_pool_for_a_machine(threads: int, cores: int, facts: list[str]) -> None:
    """The line says how many such actors use all cores."""
    assert [fact for fact in facts if fact not in describe_pool(threads, cores)] == []


@pytest.mark.parametrize(
    ("file", "text", "limits"),
    [
        ("cpu.max", "250000 100000\n", [3]),
        ("cpu.max", "max 100000\n", []),
        ("cpu/cpu.cfs_quota_us", "200000\n", [2]),
        ("cpu/cpu.cfs_quota_us", "-1\n", []),
        ("none", "", []),
    ],
)
def test_the_limit_of_a_container(file: str, text: str, limits: list[int], tmp_path: Path) -> None:
    """The limit is read from both versions of control groups, and rounded up."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / file).write_text(text)
    assert _container_limits(tmp_path) == limits


def test_this_machine_has_a_core() -> None:
    """There is at least one core."""
    assert usable_cores() >= 1
