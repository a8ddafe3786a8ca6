"""Workers in which a private view is not possible: no /proc, another pid namespace, another user."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from models import Counter
from no_proc import can_mount, hide_proc
from torch import nn

from ray_zerocopy import (
    ZeroCopyError,
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
)
from ray_zerocopy._pages import store_file
from ray_zerocopy._pages.markers import Mark, StoredObject, marks_of_this_process, parse_mark
from ray_zerocopy._pages.regions import Location, regions
from ray_zerocopy._store import host
from ray_zerocopy.arrow import column_to_tensor
from ray_zerocopy.invoke import call_model
from ray_zerocopy.memory import pool_memory


class WithoutProc:
    """An actor whose thread sees no /proc file system."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        hide_proc()
        self.kept: dict[str, Any] = {}

    def load(self, ref: Any, required: bool = False) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.kept["model"] = load_model_in_actor(ref, require_isolation=required)
        return [str(warning.message) for warning in caught]

    def total(self) -> float:
        return float(self.kept["model"].weight.double().sum())

    def drop(self) -> None:
        self.kept.clear()

    def run(self, function: Any, *args: Any) -> Any:
        return function(*args)


@pytest.fixture(scope="module")
def blind(ray_session: None) -> Iterator[Any]:
    if not can_mount():
        pytest.skip("needs the right to mount file systems")
    actor = ray.remote(num_cpus=0.1)(WithoutProc).remote()
    yield actor
    ray.kill(actor)


def test_pool_memory_counts_a_worker_without_isolation(blind: Any, two_actors: list[Any]) -> None:
    """`pool_memory` finds a worker without /proc, by handle and by actor, and says that it is not isolated."""
    source = nn.Linear(512, 512)
    ref = prepare_model_for_actors(source)
    isolated = two_actors[0]
    before = pool_memory([isolated]).stored  # models of other tests
    said = ray.get(blind.load.remote(ref))
    assert len(said) == 1
    assert "this process has no /proc file system" in said[0]
    assert ray.get(blind.total.remote()) == pytest.approx(source.weight.double().sum().item())
    ray.get(isolated.run_kept.remote(lambda kept, ref: kept.update(model=load_model_in_actor(ref)), ref))
    by_handle = pool_memory(ref)
    assert sorted(process.isolated for process in by_handle.processes) == [False, True]
    assert by_handle.stored - before < 1.01 * ref.nbytes + 8192
    assert by_handle.copies >= 2 * ref.nbytes - 8192
    marked = next(process for process in by_handle.processes if not process.isolated)
    assert ref.nbytes - 8192 <= marked.mapped <= ref.nbytes + 8192
    assert f"NOT isolated: a write to a weight in process {marked.pid}" in str(by_handle)
    by_actor = pool_memory([blind])
    assert [(p.pid, p.mapped, p.pss, p.isolated) for p in by_actor.processes] == [
        (marked.pid, marked.mapped, None, False)
    ]
    assert "unknown" in str(by_actor)
    ray.get([blind.drop.remote(), isolated.run_kept.remote(lambda kept: kept.clear())])
    assert pool_memory(ref).processes == ()
    assert pool_memory([blind]).processes[0].isolated


def test_require_isolation_refuses_without_proc(blind: Any) -> None:
    """With require_isolation a load without /proc is a ZeroCopyError with the reason."""
    with pytest.raises(ZeroCopyError, match=r"no /proc file system.*drop require_isolation"):
        ray.get(blind.load.remote(prepare_model_for_actors(nn.Linear(64, 64)), True))


def test_location_and_model_memory_say_that_they_cannot_know(blind: Any) -> None:
    """Without /proc, `location` and `model_memory` raise instead of calling shared memory private."""

    def ask(name: str) -> Any:
        model = nn.Linear(2, 2)
        return memory.location(model.weight) if name == "location" else memory.model_memory(model)

    for name in ("location", "model_memory"):
        with pytest.raises(ZeroCopyError, match="has no /proc file system"):
            ray.get(blind.run.remote(ask, name))


def test_columns_stay_without_proc(blind: Any) -> None:
    """A column's tensor is a copy where no view is possible: writing to it does not change the stored block."""
    import pyarrow as pa

    stored = ray.put(pa.table({"x": pa.array(torch.arange(100_000).tolist())}))

    def write(holder: list[Any]) -> float:
        table = ray.get(holder[0])
        column_to_tensor(table, "x").add_(1)
        return float(column_to_tensor(table, "x").double().sum())

    expected = float(torch.arange(100_000).double().sum())
    assert ray.get(blind.run.remote(write, [stored])) == expected
    assert float(column_to_tensor(ray.get(stored), "x").double().sum()) == expected


class Counts(nn.Module):
    """A model whose calls change its buffers and its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> tuple[int, float]:
        self.counter(x)
        calls = int(self.counter.calls.item())
        self.linear.weight.data.add_(1)
        return calls, float(self.linear.weight.double().mean())


def test_calls_start_from_what_was_shared_without_proc(ray_session: None) -> None:
    """Each task's call starts from the shared weights where no private view is possible, also in one process."""
    if not can_mount():
        pytest.skip("needs the right to mount file systems")
    ref = prepare_model_for_actors(Counts())

    def calls(ref: Any) -> list[Any]:
        from ray_zerocopy._task import call

        seen = []
        for _ in range(3):
            lent = call._warm_models.lend(ref)
            with torch.inference_mode():
                seen.append(lent.model(torch.ones(4)))
            call._warm_models.give_back(lent)
        return seen

    def blind_calls(ref: Any) -> list[Any]:
        hide_proc()
        return calls(ref)

    once = ray.remote(num_cpus=0.1, max_calls=1)
    expected = ray.get(once(calls).remote(ref))
    assert expected[0] == expected[1] == expected[2]
    assert ray.get(once(blind_calls).remote(ref)) == expected
    assert ray.get(call_model.remote(ref, (torch.ones(4),))) == expected[0]


# ---------------------------------------------------------------- the reasons


def reason_in_this_process() -> str:
    store_file._known_paths.clear()
    host._warned_reasons.clear()
    model = nn.Linear(256, 256)
    with pytest.raises(ZeroCopyError) as error:
        load_model_in_actor(prepare_model_for_actors(model), require_isolation=True)
    return str(error.value)


def test_permission_denied_on_stat(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that lists the raylet's descriptors and refuses to look at them is named with the raylet's pid."""
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    assert "permission denied on the descriptors of process" in (said := reason_in_this_process())
    assert "CAP_SYS_PTRACE" in said
    assert "another pid namespace" not in said


def test_no_raylet_in_sight(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc shows no raylet, the reason is the pid namespace or hidepid, not a permission."""
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: ["self"] if path == "/proc" else real(path))
    said = reason_in_this_process()
    assert "no raylet is visible" in said
    assert "another pid namespace" in said
    assert "permission" not in said


def test_a_raylet_of_another_node(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raylet that does not have this store's file is named as that."""
    monkeypatch.setattr(store_file, "_open_if_same", lambda path, file: None)
    assert "(raylet) has no descriptor of this file" in reason_in_this_process()


def test_device_numbers_that_differ(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `stat` gives another device than /proc/self/maps, as on btrfs and overlay, the file is found."""
    real = os.fstat

    def fstat(fd: int) -> Any:
        status = list(real(fd))
        status[2] += 1
        return os.stat_result(status)

    store_file._known_paths.clear()
    monkeypatch.setattr(store_file.os, "fstat", fstat)
    loaded = load_model_in_actor(prepare_model_for_actors(nn.Linear(256, 256)), require_isolation=True)
    assert memory.location(loaded.weight) is not None


def test_a_file_with_the_same_inode_number_is_not_the_store(tmp_path: Path) -> None:
    """An inode number alone does not make a file the store: its device in /proc/self/maps must be the same."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    status = path.stat()
    assert store_file._open_if_same(str(path), store_file._File(status.st_dev + 1, status.st_ino)) is None
    fd = store_file._open_if_same(str(path), store_file._File(status.st_dev, status.st_ino))
    assert fd is not None
    os.close(fd)


def test_marks_are_seen_until_they_are_deleted() -> None:
    """A mark shows in /proc/self/maps with its object, location and size, and goes when it is deleted."""
    stored = StoredObject("ab" * 28, Location(27, 4711, 4096), 123456)
    mark = Mark(stored)
    assert stored in {parse_mark(region.name) for region in regions()}
    assert stored in marks_of_this_process()
    del mark
    assert stored not in {parse_mark(region.name) for region in regions()}
    assert stored not in marks_of_this_process()
    assert parse_mark("/memfd:something (deleted)") is None
    assert parse_mark("/dev/shm/plasma (deleted)") is None
