"""A model keeps its numbers when children of its process exit, and when the Ray session of its process ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

from ray_zerocopy import ModelLostError, ModelRef, ZeroCopyError, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy.actor import load_pipeline_in_actor, rewrite_pipeline_for_actors
from ray_zerocopy.invoke import call_model

NBYTES = 40_000_000


def ones() -> nn.Module:
    """Return a module of 40 MB of ones."""
    module = nn.Linear(1000, 10_000, bias=False)
    nn.init.ones_(module.weight)
    return module


def fill_store(nbytes: int) -> None:
    """Put and drop until more bytes than the store has went through it."""
    for number in range(nbytes // NBYTES + 1):
        ray.put(np.full(NBYTES, number % 250 + 2, dtype=np.uint8))


# ---------------------------------------------------------------- forks


def model(ref: ModelRef) -> Any:
    return load_model_in_actor(ref)


def pipeline(ref: ModelRef) -> Any:
    return load_pipeline_in_actor(*rewrite_pipeline_for_actors({"model": ones()}))["model"]


def result(ref: ModelRef) -> Any:
    holder = nn.Module()
    holder.weight = ray.get(call_model.remote(ref, (torch.eye(1000),))).T  # type: ignore[assignment]
    return holder


def cast(kept: dict[str, Any]) -> None:
    kept["model"].bfloat16()


def assign(kept: dict[str, Any]) -> None:
    weights = {name: value.clone() for name, value in kept["model"].state_dict().items()}
    kept["model"].load_state_dict(weights, assign=True)


def drop(kept: dict[str, Any]) -> None:
    kept.clear()


def fork_and_read(
    kept: dict[str, Any], load: Callable[[ModelRef], Any], ref: list[ModelRef], act: Any
) -> list[float]:
    """Load, let a forked child act and exit, fill the store, and return the least and largest weight."""
    kept["model"] = load(ref.pop())
    gc.collect()
    pid = os.fork()
    if pid == 0:
        try:
            act(kept)
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    fill_store(2 << 30)
    weight = kept.pop("model").weight
    return [float(weight.min()), float(weight.max())]


@pytest.mark.parametrize("act", [cast, assign, drop])
@pytest.mark.parametrize("load", [model, pipeline, result])
def test_a_childs_exit_releases_nothing(load: Any, act: Any, two_actors: list[Any]) -> None:
    """The parent reads ones, whatever a forked child did with the model before it exited."""
    if load is result and act is not drop:
        pytest.skip("a result is a tensor")
    ref = prepare_model_for_actors(ones())
    assert ray.get(two_actors[0].run_kept.remote(fork_and_read, load, [ref], act)) == [1.0, 1.0]


def use_pool(kept: dict[str, Any], ref: list[ModelRef]) -> list[float]:
    kept["model"] = load_model_in_actor(ref.pop())
    pool = multiprocessing.get_context("fork").Pool(2)
    pool.map(int, range(10))
    pool.close()  # not terminate(): a child can miss the signal just before it waits, and terminate() then hangs
    pool.join()
    fill_store(2 << 30)
    weight = kept.pop("model").weight
    return [float(weight.min()), float(weight.max())]


def test_a_pool_of_processes(two_actors: list[Any]) -> None:
    """A multiprocessing pool with the start method "fork" leaves the parent's model as it is."""
    assert ray.get(two_actors[0].run_kept.remote(use_pool, [prepare_model_for_actors(ones())])) == [1.0, 1.0]


# ---------------------------------------------------------------- the end of a session

SESSIONS = """
import gc, sys
import numpy as np, pyarrow as pa, ray, torch
from ray.cluster_utils import Cluster
from ray_zerocopy.arrow import column_to_tensor
from ray_zerocopy import load_model_in_actor, prepare_model_for_actors
from ray_zerocopy.invoke import call_model

def fill():
    kept = []
    for number in range(12):
        kept.append(ray.put(np.full(40_000_000, number + 2, dtype=np.uint8)))
        if len(kept) > 2:
            kept.pop(0)

head = {"num_cpus": 4, "object_store_memory": 300 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
ray.init(address=cluster.address, logging_level="error")
column = column_to_tensor(ray.get(ray.put(pa.table({"x": np.ones(4_000_000)}))), "x")  # before any model
ray.shutdown()
ray.init(address=cluster.address, logging_level="error")
fill()
assert column.min() == column.max() == 1.0, "column"
source = torch.nn.Linear(1000, 10_000, bias=False)
torch.nn.init.ones_(source.weight)
ref = prepare_model_for_actors(source)
model = load_model_in_actor(ref)
with torch.no_grad():
    model.weight[7, 3] = 5.0
result = ray.get(call_model.remote(ref, (torch.eye(1000),)))
ray.shutdown()
ray.init(address=cluster.address, logging_level="error", namespace="another")
fill()
assert model.weight[7, 3] == 5.0
model.weight.data[7, 3] = 1.0
assert model.weight.min() == model.weight.max() == 1.0, "model"
assert result.min() == result.max() == 1.0, "result"
again = load_model_in_actor(prepare_model_for_actors(source))
assert again.weight.min() == again.weight.max() == 1.0
ray.shutdown()
cluster.shutdown()
print("DONE")
"""

STALE = """
import gc, pickle, sys
import ray, torch
from ray_zerocopy import ModelLostError, ZeroCopyPredictor, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy.invoke import call_model

options = dict(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, logging_level="error")
ray.init("local", **options)
old = prepare_model_for_actors(torch.nn.Linear(500, 500))
pickled = ray.cloudpickle.dumps(old)
ray.shutdown()
before = pickle.loads(pickled)
ray.init("local", **options)
stale = pickle.loads(pickled)

@ray.remote
def load(ref):
    return load_model_in_actor(ref)

@ray.remote
def works(ref):
    return float(load_model_in_actor(ref).weight.sum())

for handle in (old, before, stale):
    for use in (
        load_model_in_actor,
        lambda ref: ZeroCopyPredictor.using(ref, input_columns="x", output_column="y"),
        lambda ref: call_model.remote(ref, (torch.ones(1, 500),)),
        lambda ref: ray.get(load.remote(ref)),
        lambda ref: ray.get(load.remote(pickle.loads(ray.cloudpickle.dumps(ref)))),
    ):
        try:
            use(handle)
        except (ModelLostError, ray.exceptions.RayTaskError) as error:
            assert "another Ray session" in str(error) and "again" in str(error), error
        else:
            raise AssertionError(handle)
kept = [torch.nn.Linear(500, 500) for _ in range(5)]
handles = [prepare_model_for_actors(model) for model in kept]
del old, before, stale, handle
gc.collect()
for model, ref in zip(kept, handles):
    assert torch.equal(load_model_in_actor(ref).weight, model.weight)
    assert abs(ray.get(works.remote(ref)) - float(model.weight.sum())) < 1e-2
ray.shutdown()
print("DONE")
"""


@pytest.mark.parametrize("script", [SESSIONS, STALE], ids=["values-stay", "stale-handles"])
def test_sessions_end(script: str) -> None:
    """Models and results outlive `ray.shutdown()`; a handle of an earlier session is an error, and breaks nothing."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.endswith("DONE\n"), done.stderr[-3000:]


# ---------------------------------------------------------------- what a handle leads to


def handle_to(value: object, ref: ModelRef) -> ModelRef:
    return ModelRef("Linear", 1, 1, 1, (ray.put(value),), ref.session)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, r"builtins.int, which is not a model"),
        (nn.Linear(2, 2), r"Linear, which is not a model"),
        ({"buffers": [], "header": b""}, r"builtins.dict, which is not a model"),
        ({"ray_zerocopy": 0, "header": b"no"}, r"format 0, .* reads format \d"),
        ({"ray_zerocopy": 99}, r"format 99, .* reads format \d"),
    ],
)
def test_what_is_no_model(value: object, said: str, ray_session: None) -> None:
    """A handle to anything else, or to another format, is one error that says so, wherever it is loaded."""
    handle = handle_to(value, prepare_model_for_actors(nn.Linear(2, 2)))
    with pytest.raises(ZeroCopyError, match=said):
        load_model_in_actor(handle)
    with pytest.raises(ray.exceptions.RayTaskError, match=said):
        ray.get(call_model.remote(handle, (torch.ones(1, 2),)))


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_a_pickled_handle_of_another_format(ray_session: None) -> None:
    """A handle that another version of the package pickled names both formats."""
    rebuild, (_, *rest) = prepare_model_for_actors(nn.Linear(2, 2)).__reduce__()
    with pytest.raises(ZeroCopyError, match=r"format 0, .* reads format \d"):
        rebuild(0, *rest)


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_a_handle_pickles_and_compares(ray_session: None) -> None:
    """A copy of a handle is equal to it, has its hash, and loads the same model."""
    ref = prepare_model_for_actors(nn.Linear(2, 2))
    copy = pickle.loads(ray.cloudpickle.dumps(ref))
    assert copy == ref
    assert hash(copy) == hash(ref)
    assert torch.equal(load_model_in_actor(copy).weight, load_model_in_actor(ref).weight)
    with pytest.raises(ModelLostError):
        load_model_in_actor(ModelRef("Linear", 1, 1, 1, (), ref.session))
