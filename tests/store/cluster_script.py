"""Run by test_cluster.py in a process of its own: two nodes on one machine, each with its own object store."""

from __future__ import annotations

import json
import os
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from torch import nn

from ray_zerocopy import ModelLostError, ModelRef, load_model_in_actor, memory, prepare_model_for_actors


class Keeper:
    """Loads a model, or prepares one, on the node where it was started."""

    def load(self, model_ref: ModelRef) -> tuple[str, Any, float]:
        self.model = load_model_in_actor(model_ref, require_isolation=True)
        node = ray.get_runtime_context().get_node_id()
        return node, memory.location(self.model.weight), self.model.weight.sum().item()

    def total(self) -> float:
        return self.model.weight.sum().item()

    def prepare(self) -> ModelRef:
        return prepare_model_for_actors(nn.Linear(512, 512))

    def lost(self, model_ref: ModelRef) -> str:
        try:
            load_model_in_actor(model_ref)
        except ModelLostError as error:
            return str(error)
        return "loaded"


def main() -> None:
    """Print what the test looks at, as JSON."""
    store = {"num_cpus": 4, "object_store_memory": 100_000_000}
    cluster = Cluster(
        initialize_head=True, head_node_args={**store, "resources": {"first": 1}, "include_dashboard": False}
    )
    cluster.add_node(**store, resources={"second": 1})
    ray.init(address=cluster.address, logging_level="error")
    actor = ray.remote(num_cpus=0.1)(Keeper)
    keepers = [actor.options(resources={node: 0.01}).remote() for node in ("first", "first", "second", "second")]

    source = nn.Linear(512, 512)
    model_ref = prepare_model_for_actors(source)
    loads = ray.get([keeper.load.remote(model_ref) for keeper in keepers])
    pool = memory.pool_memory(model_ref)
    found = {"loads": loads, "nbytes": model_ref.nbytes, "stored": pool.stored, "copies": pool.copies}
    found["nodes"] = sorted(process.node for process in pool.processes)

    theirs = ray.get(keepers[1].prepare.remote())
    before = ray.get(keepers[0].load.remote(theirs))[2]
    ray.kill(keepers[1])
    while any(a["State"] == "ALIVE" and a["ActorID"] == keepers[1]._actor_id.hex() for a in actors()):
        pass
    found["lost"] = ray.get(keepers[3].lost.remote(theirs))
    found["kept"] = [before, ray.get(keepers[0].total.remote())]
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


def actors() -> list[dict[str, Any]]:
    """Return what Ray's control store knows of the actors."""
    return list(ray._private.state.actors().values())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    main()
