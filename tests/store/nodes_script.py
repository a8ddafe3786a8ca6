"""Run by test_nodes.py in a separate process: three nodes on one machine, of which one has a small store."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import warnings
from typing import Any

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster
from torch import nn

from ray_zerocopy import ModelRef, ModelTimeoutError, load_model_in_actor, memory, prefetch, prepare_model_for_actors
from ray_zerocopy._store import put, waits
from ray_zerocopy.actor import load

put.OBJECT_BYTES = 4 << 20  # several objects in a small model


class Model(nn.Module):
    """Six storages of 2 MiB: three objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 1024) for _ in range(6))


class Keeper:
    """Loads a model, or prepares one, on the node where it was started."""

    def load(self, model_ref: ModelRef) -> float:
        self.model = load_model_in_actor(model_ref, require_isolation=True)
        return float(sum(layer.weight.double().sum() for layer in self.model.layers))

    def prepare(self) -> tuple[ModelRef, int]:
        return prepare_model_for_actors(Model()), os.getpid()

    def warnings_of_load(self, nested: list[list[Any]], model_ref: ModelRef) -> list[str]:
        """Hold other objects of the store, load, and return the warnings."""
        self.held = [ray.get(ref) for ref in nested[0]]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.model = load_model_in_actor(model_ref, require_isolation=True)
        return [str(warning.message) for warning in caught]

    def wait(self, model_ref: ModelRef, log_after: float, timeout: float | None) -> tuple[str, list[str]]:
        """Load, and return the error and what was logged."""
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ray_zerocopy").addHandler(handler)
        waits.LOG_AFTER_SECONDS = log_after
        try:
            load(model_ref, "cpu", timeout=timeout)
        except ModelTimeoutError as error:
            return f"{isinstance(error, TimeoutError)} {error}", lines
        finally:
            logging.getLogger("ray_zerocopy").removeHandler(handler)
        return "loaded", lines


def message(function: Any, *args: Any, **options: Any) -> str:
    """Return type and message of the error that a call raises."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    """Print what the test looks at, as JSON."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "object_store_memory": 200_000_000, "include_dashboard": False},
    )
    common = {"num_cpus": 4, "object_store_memory": 200_000_000}
    cluster.add_node(**common, resources={"second": 1}, labels={"zone": "b"})
    third = cluster.add_node(**common, resources={"third": 1}, labels={"zone": "c"})
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    ids = {key: n["NodeID"] for n in ray.nodes() for key in ("second", "third") if key in n["Resources"]}
    ids["head"] = ray.get_runtime_context().get_node_id()
    found: dict[str, Any] = {"ids": ids}

    model_ref = prepare_model_for_actors(Model())
    found["objects"], found["nbytes"] = len(model_ref.refs), model_ref.nbytes
    found["before"] = list(model_ref.locations().nodes)
    chosen = {
        "zone b": prefetch(model_ref, label_selector={"zone": "b"}),
        "again": prefetch(model_ref, ids["second"]),
        "third": prefetch(model_ref, resources={"third": 1}),
        "all": prefetch(model_ref, timeout=60),
    }
    found["prefetched"] = {
        key: [(n.node, n.nbytes, list(n.sources), n.error) for n in result.nodes] for key, result in chosen.items()
    }
    found["table"] = str(chosen["third"])
    after = model_ref.locations()
    found["complete"], found["partial"] = sorted(after.complete), list(after.partial)

    actor = ray.remote(num_cpus=0.1)(Keeper)
    keepers = {node: actor.options(resources={node: 0.01}).remote() for node in ("second", "third")}
    found["sums"] = ray.get([keeper.load.remote(model_ref) for keeper in keepers.values()])
    found["sum"] = float(sum(layer.weight.double().sum() for layer in load_model_in_actor(model_ref).layers))

    found["errors"] = {
        "unknown": message(prefetch, model_ref, ["f" * 56]),
        "negative": message(prefetch, model_ref, timeout=-1),
        "not a number": message(prefetch, model_ref, timeout="soon"),
        "no match": message(prefetch, model_ref, resources={"TPU": 1}),
        "not a handle": message(prefetch, model_ref.refs[0]),
        "bad nodes": message(prefetch, model_ref, 3),
    }

    theirs, owner = ray.get(keepers["second"].prepare.remote())
    os.kill(owner, signal.SIGSTOP)  # the owner is frozen
    found["timeout"] = ray.get(keepers["third"].wait.remote(theirs, 1.0, 4.0))
    found["at once"] = ray.get(keepers["third"].wait.remote(theirs, 30.0, 0.0))
    waiting = keepers["third"].wait.remote(theirs, 1.0, None)
    time.sleep(5)
    os.kill(owner, signal.SIGCONT)
    found["thawed"] = ray.get(waiting)

    cluster.remove_node(third)
    found["after death"] = message(prefetch, model_ref, ids["third"])
    begin = time.monotonic()
    pool = memory.pool_memory(model_ref)
    found["pool"] = [sorted(p.node for p in pool.processes), list(pool.unanswered), time.monotonic() - begin]
    found["alive"] = [(n.node, n.error) for n in prefetch(model_ref).nodes]

    small = cluster.add_node(num_cpus=1, object_store_memory=80_000_000, resources={"small": 1})
    large = prepare_model_for_actors([nn.Linear(2560, 1024) for _ in range(9)])  # 94 MB
    ids["small"] = small.node_id
    found["too small"] = [(n.node, n.error) for n in prefetch(large).nodes if n.error]
    arrays = [ray.put(np.ones(30 << 20, np.uint8)) for _ in range(2)]
    keeper = actor.options(resources={"small": 0.01}).remote()
    medium = prepare_model_for_actors(nn.Linear(2560, 4096))  # 42 MB
    found["on disk"] = ray.get(keeper.warnings_of_load.remote([arrays], medium))
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    main()
