"""Wrappers of a training job are refused where the model is prepared, and what the error says to share works."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn

from ray_zerocopy import load_model_in_actor, prepare_model_for_actors, rewrite_pipeline_for_actors
from ray_zerocopy.invoke import rewrite_pipeline

X = torch.ones(2, 4)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(plain())


def fsdp() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(plain(), mesh=mesh())


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(plain(), mesh(), {"0": ColwiseParallel()})


def mixed_precision() -> nn.Module:
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(plain())


def deepspeed_engine() -> nn.Module:
    """Return a module of DeepSpeed's class by name: the package does not install here."""
    name = "deepspeed.runtime.engine"
    module = sys.modules.setdefault(name, types.ModuleType(name))
    kind = type("DeepSpeedEngine", (nn.Module,), {"__module__": name})
    module.DeepSpeedEngine = kind  # type: ignore[attr-defined]
    engine = kind()
    engine.module = plain()
    return engine


def share(model: nn.Module) -> Any:
    return prepare_model_for_actors(model)


def share_in_a_list(model: nn.Module) -> Any:
    return prepare_model_for_actors([plain(), {"inner": model}])


def share_pipeline(model: nn.Module) -> Any:
    return rewrite_pipeline_for_actors(types.SimpleNamespace(encoder=model))


def share_for_tasks(model: nn.Module) -> Any:
    return rewrite_pipeline(types.SimpleNamespace(encoder=model))


WRAPPERS = [
    (ddp, "DistributedDataParallel", "process group", ".module"),
    (fsdp, "FullyShardedDataParallel", "shards", "full_state_dict=True"),
    (sharded, "FSDPSequential", "shards", "full_state_dict=True"),
    (tensor_parallel, "DTensor", "device mesh", "full_tensor()"),
    (mixed_precision, "ConvertOutputsToFp32", "mixed precision", "keep_fp32_wrapper=False"),
    (deepspeed_engine, "DeepSpeedEngine", "engine", ".module"),
]


@pytest.mark.parametrize("way", [share, share_in_a_list, share_pipeline, share_for_tasks])
@pytest.mark.parametrize(("make", "kind", "reason", "remedy"), WRAPPERS)
def test_refused_where_it_is_prepared(
    make: Callable[[], nn.Module],
    kind: str,
    reason: str,
    remedy: str,
    way: Callable[[nn.Module], Any],
    process_group: None,
    ray_session: None,
) -> None:
    """Each wrapper is a TypeError with its class, the reason and what to share, in each way of sharing."""
    model = make()
    with pytest.raises(TypeError) as error:
        way(model)
    said = str(error.value)
    assert kind in said
    assert reason in said
    assert remedy in said
    if way is share_in_a_list and kind != "DTensor":
        assert "[1]['inner']" in said


def load_and_call(ref: Any) -> torch.Tensor:
    with torch.inference_mode():
        return load_model_in_actor(ref)(X)


def full_state(model: nn.Module) -> nn.Module:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    unsharded = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    unsharded.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return unsharded


@pytest.mark.parametrize(
    ("make", "unwrap"),
    [
        (ddp, lambda model: model.module),
        (fsdp, full_state),
        (sharded, full_state),
        (tensor_parallel, full_state),
        (mixed_precision, lambda model: Accelerator().unwrap_model(model, keep_fp32_wrapper=False)),
        (deepspeed_engine, lambda model: model.module),
        (nn.DataParallel, lambda model: model),
    ],
)
def test_what_the_error_names_works(
    make: Callable[..., nn.Module],
    unwrap: Callable[[nn.Module], nn.Module],
    process_group: None,
    two_actors: list[Any],
) -> None:
    """What each error says to share computes in a worker what the plain model does; DataParallel is not refused."""
    model = unwrap(make(plain()) if make is nn.DataParallel else make())
    found = ray.get(two_actors[0].run.remote(load_and_call, prepare_model_for_actors(model)))
    with torch.inference_mode():
        assert torch.allclose(found, plain()(X), atol=1e-6)


class DistributedDataParallel(nn.Module):
    """A class of a user that has the name of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = plain()


def test_a_class_of_the_same_name_is_not_refused(ray_session: None) -> None:
    """Only the classes of the packages that define the wrappers are refused."""
    assert prepare_model_for_actors(DistributedDataParallel()).tensors == 4
