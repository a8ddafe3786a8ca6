"""Nodes die and join during `prefetch` and during a `map_batches` over four nodes.

To be run by hand, here with three changes of each kind, about a minute on two cores:

    python tests/store/churn_script.py 3
"""

from __future__ import annotations

import collections
import json
import sys
import threading
import time
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from ray_zerocopy import ZeroCopyPredictor, load_model_in_actor, prefetch, prepare_model_for_actors
from ray_zerocopy._store import put

put.OBJECT_BYTES = 16 << 20  # several objects in a model of 128 MiB
ROWS = 240
NODE = {"num_cpus": 2, "object_store_memory": 500_000_000}
# Ray notices a dead node within a few seconds instead of half a minute.
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}


class Slow(ZeroCopyPredictor):
    """Adds the first weight to each number, slowly."""

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        time.sleep(0.5)
        return torch.tensor(batch["id"].to_pylist(), dtype=torch.float64)

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + float(self.model[0].weight[0, 0])

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        node = ray.get_runtime_context().get_node_id()
        return batch.append_column("y", pa.array(outputs.numpy())).append_column(
            "node", pa.array([node] * len(batch))
        )


def make_model() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))
    nn.init.constant_(model[0].weight, 0.5)
    return model


@ray.remote(num_cpus=0)
def load_on_node(model_ref: Any) -> float:
    return float(load_model_in_actor(model_ref)[0].weight[0, 0])


def on(node: str) -> Any:
    return load_on_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def churn_prefetch(cluster: Cluster, nodes: list[Any], changes: int) -> list[dict[str, Any]]:
    """Kill a node while a prefetch runs; a new node is brought the model by the next prefetch."""
    found = []
    for _ in range(changes):
        model_ref = prepare_model_for_actors(make_model())
        results: list[Any] = []
        thread = threading.Thread(target=lambda ref=model_ref, into=results: into.append(prefetch(ref, timeout=120)))
        thread.start()
        time.sleep(0.3)
        victim = nodes.pop(0)
        cluster.remove_node(victim, allow_graceful=False)
        nodes.append(cluster.add_node(**NODE))
        thread.join()
        again = prefetch(model_ref, timeout=120)
        (first,) = results
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        found.append(
            {
                "failed": sorted({n.node == victim.node_id for n in first.failed}),
                "others": all(n.error is None for n in first.nodes if n.node != victim.node_id),
                "again": not again.failed and set(model_ref.locations().complete) == alive,
                "new": ray.get(on(nodes[-1].node_id).remote(model_ref)),
            }
        )
        del model_ref, again
    return found


def churn_job(cluster: Cluster, nodes: list[Any], changes: int) -> dict[str, Any]:
    """Kill a node and add one, again and again, while a pool of actors over all nodes works."""
    model_ref = prepare_model_for_actors(make_model())
    ray.data.DataContext.get_current().enable_progress_bars = False
    ds = ray.data.range(ROWS, override_num_blocks=ROWS // 2).map_batches(
        Slow.using(model_ref),
        batch_format="pyarrow",
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=6),
        num_cpus=1,
        scheduling_strategy="SPREAD",
    )
    rows: list[Any] = []
    new = []
    for batch in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        rows += batch.to_pylist()
        if len(new) < changes and len(rows) > ROWS * (len(new) + 1) // (changes + 2):
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(cluster.add_node(**NODE))
            new.append(ray.get(on(nodes[-1].node_id).remote(model_ref)))
    counts = collections.Counter(row["id"] for row in rows)
    return {
        "once": counts == collections.Counter(range(ROWS)),
        "right": all(row["y"] == row["id"] + 0.5 for row in rows),
        "nodes": len({row["node"] for row in rows}),
        "new": new,
    }


def main() -> None:
    changes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK},
    )
    nodes = [cluster.add_node(**NODE) for _ in range(3)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    begin = time.monotonic()
    found = {"prefetch": churn_prefetch(cluster, nodes, changes), "job": churn_job(cluster, nodes, changes)}
    print(json.dumps(found | {"seconds": round(time.monotonic() - begin)}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
