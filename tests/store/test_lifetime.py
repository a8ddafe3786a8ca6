"""How long a model's bytes live: views outlast every reference, and memory comes back when the model goes."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import numpy as np
import pytest
import ray
import torch
from known_objects import known_objects
from torch import nn

from ray_zerocopy import load_model_in_actor, prepare_model_for_actors
from ray_zerocopy._pages import regions
from ray_zerocopy._store import spans


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])


def load_and_drop_ref(kept: dict[str, Any], refs: list[Any]) -> None:
    kept["model"] = load_model_in_actor(refs.pop())


def total(kept: dict[str, Any]) -> float:
    return sum(p.double().sum().item() for p in kept["model"].parameters())


def fill_store(nbytes: int) -> None:
    """Put and drop until more bytes than the store has went through it."""
    for number in range(nbytes // 50_000_000 + 1):
        ray.put(np.full(50_000_000, number % 251, dtype=np.uint8))


def test_views_outlast_every_reference(two_actors: list[Any]) -> None:
    """A loaded model keeps its values after all references went and the store was filled twice over."""
    source = make()
    expected = total({"model": source})
    ref = prepare_model_for_actors(source)
    ray.get([actor.run_kept.remote(load_and_drop_ref, [ref]) for actor in two_actors])
    in_driver = {"model": load_model_in_actor(ref)}
    del ref, source
    gc.collect()
    fill_store(2 << 30)
    assert total(in_driver) == expected
    assert ray.get([actor.run_kept.remote(total) for actor in two_actors]) == [expected, expected]


def test_one_tensor_keeps_the_pages(ray_session: None) -> None:
    """The pages stay for as long as one tensor of the model does."""
    source = make()
    expected = source[3].weight.detach().clone()
    weight = load_model_in_actor(prepare_model_for_actors(source))[3].weight
    gc.collect()
    fill_store(2 << 30)
    assert torch.equal(weight, expected)


def views_mapped() -> int:
    """Return the bytes of the store that this process has mapped privately."""
    return sum(end - begin for *_, begin, end in spans.model_spans(regions.regions(), {})[0])


def test_memory_comes_back(ray_session: None) -> None:
    """When the model goes its mapping goes; when the handle goes too, the store gets its bytes back."""
    before = views_mapped()
    ref = prepare_model_for_actors(make())
    loaded = load_model_in_actor(ref)
    assert views_mapped() - before >= ref.nbytes
    del loaded
    gc.collect()
    assert views_mapped() == before
    first = ref.refs[0].hex()
    assert first in known_objects()
    del ref
    gc.collect()
    deadline = time.monotonic() + 10
    while first in known_objects() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first not in known_objects()


@pytest.mark.parametrize("times", [30])
def test_loading_again_and_again_leaves_nothing(times: int, ray_session: None) -> None:
    """Thirty loads leave no open file and no mapping behind."""
    ref = prepare_model_for_actors(make())
    load_model_in_actor(ref)
    files, mapped = len(os.listdir("/proc/self/fd")), views_mapped()
    for _ in range(times):
        load_model_in_actor(ref)
    assert len(os.listdir("/proc/self/fd")) == files
    assert views_mapped() == mapped


class Loader:
    def __init__(self, ref: Any) -> None:
        self.model = load_model_in_actor(ref)

    def pid(self) -> int:
        return os.getpid()

    def total(self) -> float:
        return total({"model": self.model})


def test_a_killed_actor_loads_again(ray_session: None) -> None:
    """An actor that Ray restarts after its process died has the same model."""
    source = make()
    ref = prepare_model_for_actors(source)
    actor = ray.remote(num_cpus=0.1, max_restarts=1, max_task_retries=1)(Loader).remote(ref)
    first = ray.get(actor.pid.remote())
    expected = ray.get(actor.total.remote())
    ray.kill(actor, no_restart=False)
    assert ray.get(actor.total.remote(), timeout=120) == expected
    assert ray.get(actor.pid.remote()) != first


def test_the_source_can_go(ray_session: None) -> None:
    """The handle needs nothing of the driver's model."""
    source = make()
    expected = source[0].weight.detach().clone()
    ref = prepare_model_for_actors(source)
    with torch.no_grad():
        source[0].weight.zero_()
    del source
    gc.collect()
    assert torch.equal(load_model_in_actor(ref)[0].weight, expected)
