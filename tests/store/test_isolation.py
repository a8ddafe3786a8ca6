"""No worker's write reaches another: every way to write, for an ordinary user, and without /proc."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import ray
import torch
from describe import describe
from models import Counter
from torch import nn

from ray_zerocopy import (
    ZeroCopyError,
    ZeroCopyWarning,
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
)
from ray_zerocopy._pages import store_file
from ray_zerocopy._store import host


class Writable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 512)
        self.counter = Counter()


def train_forward(model: Writable) -> None:
    model.train()
    model.norm(torch.randn(8, 64))


def count_calls(model: Writable) -> None:
    model.counter(torch.ones(4))


def add_in_place(model: Writable) -> None:
    with torch.no_grad():
        model.linear.weight.add_(1)


def fill_data(model: Writable) -> None:
    model.linear.weight.data.fill_(3)


def write_through_numpy(model: Writable) -> None:
    model.linear.weight.detach().numpy()[0, 0] = 99


def load_other_state(model: Writable) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})


def initialize(model: Writable) -> None:
    nn.init.normal_(model.linear.weight)


def optimizer_step(model: Writable) -> None:
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.linear(model.norm(torch.randn(8, 64))).sum().backward()
    optimizer.step()


def write_by_address(model: Writable) -> None:
    ctypes.memset(model.linear.weight.data_ptr(), 0x7F, 4096)


WRITES = [
    train_forward,
    count_calls,
    add_in_place,
    fill_data,
    write_through_numpy,
    load_other_state,
    initialize,
    optimizer_step,
    write_by_address,
]


def load_into(kept: dict[str, Any], ref: Any) -> None:
    kept["model"] = load_model_in_actor(ref)


def described(kept: dict[str, Any]) -> list[Any]:
    return describe(kept["model"], flags=False)


def write_and_describe(kept: dict[str, Any], write: Any) -> list[Any]:
    write(kept["model"])
    return describe(kept["model"], flags=False)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen_by_its_writer_alone(write: Any, two_actors: list[Any]) -> None:
    """The writing actor sees its write; the other actor, a later load and the driver's model see none of it."""
    source = Writable()
    before = describe(source, flags=False)
    ref = prepare_model_for_actors(source)
    writer, other = two_actors
    ray.get([actor.run_kept.remote(load_into, ref) for actor in two_actors])
    after = ray.get(writer.run_kept.remote(write_and_describe, write))
    assert after != before
    assert ray.get(other.run_kept.remote(described)) == before
    ray.get(other.run_kept.remote(load_into, ref))
    assert ray.get(other.run_kept.remote(described)) == before
    assert describe(source, flags=False) == before
    assert describe(load_model_in_actor(ref), flags=False) == before


def test_a_write_copies_its_page_alone(ray_session: None) -> None:
    """After a write of four bytes one page is private, and the report names the tensor it is in."""
    loaded = load_model_in_actor(prepare_model_for_actors(Writable()))
    assert memory.model_memory(loaded).private == 0
    weight = loaded.linear.weight
    weight.data[100, 0] = 1  # more than a page from the first byte
    found = memory.model_memory(loaded)
    assert 0 < found.private <= 4096
    assert [path for path, _ in found.largest_private] == ["Writable.linear.weight"]
    assert memory.location(weight) is not None
    assert memory.location(weight.data[100:]) is None


SCRIPT = """
import os, json, torch, ray
ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, logging_level="error")
from ray_zerocopy import prepare_model_for_actors, load_model_in_actor, memory
model = torch.nn.Linear(512, 512)
ref = prepare_model_for_actors(model)

@ray.remote(num_cpus=0.1)
class Actor:
    def __init__(self, ref):
        self.model = load_model_in_actor(ref, require_isolation=True)
    def write(self):
        self.model.weight.data.fill_(7)
    def look(self):
        status = open("/proc/self/status").read()
        caps = status.split("CapEff:")[1].split()[0]
        return memory.location(self.model.weight), float(self.model.weight.double().sum()), os.getuid(), int(caps, 16)

actors = [Actor.remote(ref) for _ in range(2)]
before = [ray.get(a.look.remote()) for a in actors]
ray.get(actors[0].write.remote())
after = [ray.get(a.look.remote()) for a in actors]
in_driver = load_model_in_actor(ref, require_isolation=True)
print(json.dumps([before, after, float(model.weight.double().sum()), float(in_driver.weight.double().sum())]))
ray.shutdown()
"""


def drop_capabilities() -> None:
    """Take every capability from the process about to start: a root without them is an ordinary user."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL


def test_works_for_an_ordinary_user() -> None:
    """Without any capability a worker and the driver have private views: shared to read, private to write."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=180,
        preexec_fn=drop_capabilities,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, source, in_driver = json.loads(done.stdout.splitlines()[-1])
    assert before[0][3] == 0, "the worker still has capabilities"
    assert before[0][0] == before[1][0] is not None
    assert after[0][1] == pytest.approx(7 * 512 * 512)
    assert after[0][0] is None
    assert after[1][:2] == before[1][:2]
    assert source == pytest.approx(before[0][1])
    assert in_driver == pytest.approx(before[0][1])


def load_where_proc_is_hidden(ref: Any, required: bool) -> tuple[str, str, float]:
    """Load in an actor in which no process can be looked at, and return what was said and the weight's sum."""
    import warnings

    real, known = os.listdir, dict(store_file._known_paths)

    def listdir(path: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise PermissionError(path)
        return real(path)

    os.listdir = listdir
    store_file._known_paths.clear()
    host._warned_reasons.clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model = load_model_in_actor(ref, require_isolation=required)
        return "; ".join(str(w.message) for w in caught), caught[0].category.__name__, model.weight.sum().item()
    finally:
        os.listdir = real
        store_file._known_paths.update(known)


def test_no_private_view_is_said_once(two_actors: list[Any]) -> None:
    """Where the raylet cannot be looked at, one warning says what is lost and why, and the model loads shared."""
    source = nn.Linear(512, 512)
    ref = prepare_model_for_actors(source)
    said, category, total = ray.get(two_actors[0].run.remote(load_where_proc_is_hidden, ref, False))
    assert category == ZeroCopyWarning.__name__
    assert said.count("cannot have a private view") == 1
    assert "would reach every worker" in said
    assert re.search(r"permission denied on the descriptors of process \d+ \(raylet\)", said)
    assert total == pytest.approx(source.weight.sum().item())


def test_required_isolation_is_an_error(two_actors: list[Any]) -> None:
    """With require_isolation the same is a ZeroCopyError that gives the reason and the remedy."""
    ref = prepare_model_for_actors(nn.Linear(512, 512))
    with pytest.raises(ZeroCopyError, match=r"permission denied.*drop require_isolation"):
        ray.get(two_actors[0].run.remote(load_where_proc_is_hidden, ref, True))


def test_two_loads_in_one_process_are_apart(ray_session: None) -> None:
    """Two loads in one process share pages, and not writes."""
    ref = prepare_model_for_actors(nn.Linear(512, 512))
    one, two = load_model_in_actor(ref), load_model_in_actor(ref)
    assert memory.location(one.weight) == memory.location(two.weight) is not None
    expected = copy.deepcopy(two.weight)
    one.weight.data.zero_()
    assert torch.equal(two.weight, expected)
