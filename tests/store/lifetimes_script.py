"""Run by test_lifetimes_cluster.py: a small head node, and two large nodes, of which one dies."""

from __future__ import annotations

import functools
import json
import os
import time
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from ray_zerocopy import (
    ModelLostError,
    ModelRef,
    ZeroCopyError,
    load_model_in_actor,
    prepare_model_for_actors,
    prepare_model_from,
)
from ray_zerocopy._store.capacity import stores

HEAD_BYTES, NODE_BYTES = 80_000_000, 400_000_000
# So that Ray notices a dead node within a few seconds.
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}


def filled(value: float, layers: int = 4) -> nn.Module:
    """Return a module of `value`, 1 MB a layer."""
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(layers)])
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


class Keeper:
    """Loads models on the node where it was started, and keeps the first one."""

    def __init__(self) -> None:
        self.model: Any = None

    def load(self, model_ref: ModelRef) -> float | str:
        try:
            model = load_model_in_actor(model_ref)
        except ModelLostError as error:
            return str(error)
        self.model = model if self.model is None else self.model
        return model[0].weight.min().item()

    def kept(self) -> float:
        return self.model[0].weight.max().item()


def size_error(model: nn.Module) -> str:
    try:
        prepare_model_for_actors(model)
    except ZeroCopyError as error:
        return str(error)
    return ""


def main() -> None:
    """Print what the test looks at, as JSON."""
    head = {"num_cpus": 1, "object_store_memory": HEAD_BYTES, "_system_config": QUICK, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(num_cpus=2, object_store_memory=NODE_BYTES, resources={name: 1}) for name in ("one", "two")
    ]
    ray.init(address=cluster.address, logging_level="error")
    keepers = [ray.remote(num_cpus=0.1, resources={name: 0.01})(Keeper).remote() for name in ("one", "two")]
    found: dict[str, Any] = {}

    # A model of 115 MB, from a driver whose store holds 80 MB.
    large = filled(1.0, 110)
    found["too large"] = size_error(large)
    named = prepare_model_for_actors(large, name="large", lifetime="detached")
    found["large"] = ray.get([keeper.load.remote(named) for keeper in keepers])
    time.sleep(1)
    found["head free"] = next(s.free for s in stores() if s.node == ray.get_runtime_context().get_node_id())

    # The node of every owner and of every object dies.
    healed = prepare_model_from(functools.partial(filled, 3.0), name="healed", lifetime="detached")
    owner = ray.get_actor("healed", namespace="ray_zerocopy")
    victim = ray.get(owner.describe_model.remote())["version"]["node"]
    dying, other = sorted(nodes, key=lambda node: node.node_id != victim)
    options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(victim, soft=True)}
    unnamed = prepare_model_from(functools.partial(filled, 2.0), **options)
    lost = prepare_model_for_actors(filled(4.0), name="lost", lifetime="detached", **options)
    theirs = ray.get(ray.remote(num_cpus=0)(Preparer).options(memory=1, **options).remote().prepare.remote())
    found["owner on a dying node"] = dying.node_id == victim
    cluster.remove_node(dying, allow_graceful=False)
    # An actor on the other node, where only the first model is.
    stays = ("one", "two")[nodes.index(other)]
    fresh = ray.remote(num_cpus=0.1, resources={stays: 0.01})(Keeper).remote()
    found["after"] = ray.get([fresh.load.remote(ref) for ref in (unnamed, healed)])
    found["lost"] = ray.get([fresh.load.remote(ref) for ref in (lost, theirs)])
    found["kept"] = ray.get(keepers[nodes.index(other)].kept.remote())
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


class Preparer:
    def prepare(self) -> ModelRef:
        return prepare_model_for_actors(filled(5.0))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    main()
