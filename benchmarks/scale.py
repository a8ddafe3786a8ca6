"""Measure how a model reaches many nodes: real Ray clusters on one machine, plain Ray beside `prefetch`.

    python benchmarks/scale.py                          # 1, 2 and 4 nodes, 0.25 and 1 GiB: about ten minutes
    python benchmarks/scale.py --quick                  # 1, 2 and 4 nodes, 0.25 GiB
    python benchmarks/scale.py --gib 4 --nodes 1 2      # a larger model, where memory allows
    python benchmarks/scale.py --object-mib 256 512     # other sizes of objects
    python benchmarks/scale.py --plot scale.png         # seconds against nodes, one line for each way
    python benchmarks/scale.py --paper                  # only the estimate for up to 1,000 nodes

Each cluster (`ray.cluster_utils.Cluster`) has its own process. All nodes share the cores, the memory and the loopback
network of the machine, so only the columns of one row compare. "pushed by others" is the share of the bytes that
other nodes than the first sent, from the counters of Ray's object managers.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request

from results import add_json_option, write_json

LAYER_MIB = 32
HEADER = (
    "| GiB | nodes | objects of, MiB | plain, one node s | plain, all nodes s | prefetch, all s | pushed by others | "
    "first load, first node ms | first load, other nodes ms | most held per node, GiB |"
)


def measure(nodes: int, gib: float, object_mib: int, rounds: int) -> dict:
    """Measure one cluster; runs in a separate process."""
    import numpy as np
    import ray
    import torch
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ray_zerocopy import prefetch, prepare_model_for_actors
    from ray_zerocopy._store import put

    put.OBJECT_BYTES = object_mib << 20
    layers = max(1, int(gib * 1024) // LAYER_MIB)
    nbytes = layers * LAYER_MIB << 20
    store = {"num_cpus": 2, "object_store_memory": int(2.2 * nbytes) + (200 << 20)}
    cluster = Cluster(initialize_head=True, head_node_args={**store, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**store)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != here]

    @ray.remote(num_cpus=0)
    class Node:
        def pull(self, nested):
            """Bring one object here, and return the seconds."""
            begin = time.perf_counter()
            ray.wait(nested, fetch_local=True)
            return time.perf_counter() - begin

        def load(self, model_ref):
            import ray_zerocopy

            begin = time.perf_counter()
            self.model = ray_zerocopy.load_model_in_actor(model_ref)
            return time.perf_counter() - begin

        def free(self):
            self.model = None
            gc.collect()

    def on(node):
        return Node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()

    workers = {node: on(node) for node in [here, *others]}
    small = prepare_model_for_actors(torch.nn.Linear(8, 8))
    ray.get([worker.load.remote(small) for worker in workers.values()])  # imports
    arrays = [np.full(LAYER_MIB << 20, number % 251, np.uint8) for number in range(layers)]
    model = [torch.from_numpy(array) for array in arrays]
    ray.get(ray.put(arrays[:1]))
    found = {
        key: [] for key in ("plain_one", "plain_all", "prefetch", "relayed", "load_first", "load_others", "held")
    }
    for _ in range(rounds):
        for targets, key in ((others[:1], "plain_one"), (others, "plain_all")):
            ref = ray.put(arrays)
            begin = time.perf_counter()
            ray.get([workers[node].pull.remote([ref]) for node in targets])
            found[key].append(time.perf_counter() - begin)
            del ref
            time.sleep(1)  # for Ray to free the copies
        before = pushed()
        model_ref = prepare_model_for_actors(model)
        begin = time.perf_counter()
        result = prefetch(model_ref)
        found["prefetch"].append(time.perf_counter() - begin)
        assert not result.failed, result
        found["relayed"].append(relayed(before, here, nbytes * max(1, len(others))))
        found["load_first"].append(ray.get(workers[here].load.remote(model_ref)))
        loads = [ray.get(workers[node].load.remote(model_ref)) for node in others]
        found["load_others"].append(max(loads, default=0.0))
        found["held"].append(max(model_ref.locations().nodes.values()))
        ray.get([worker.free.remote() for worker in workers.values()])
        del model_ref
        gc.collect()
        time.sleep(1)
    ray.shutdown()
    cluster.shutdown()
    return {key: statistics.median(values) for key, values in found.items() if values}


def pushed() -> dict:
    """Return the bytes that the object manager of each node has sent so far, from Ray's metrics."""
    import ray

    sent = {}
    time.sleep(6)  # Ray exports its counters every few seconds
    for node in ray.nodes():
        try:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
        for labels, value in re.findall(r"^ray_object_manager_bytes\{(.*?)\} (\S+)$", text, re.MULTILINE):
            if "Pushed" in labels and "Push" in labels:
                sent[node["NodeID"]] = sent.get(node["NodeID"], 0.0) + float(value)
    return sent


def relayed(before: dict, first: str, expected: int) -> float:
    """Return which share of the bytes sent since `before` came from other nodes than the first."""
    after = pushed()
    sent = {node: after[node] - before.get(node, 0.0) for node in after}
    total = sum(sent.values())
    return 1 - sent.get(first, 0.0) / total if total else math.nan


def paper() -> None:
    """Print the estimate: a model of 16 GiB to up to 1,000 nodes, by four ways."""
    print(
        "\nOn paper: 16 GiB in pieces of 0.5 GiB, each node sends and receives at the full rate of its network, and "
        "nothing else uses it.\none source: N S / B. whole objects by a tree: ceil(log2(N + 1)) S / B. chain of "
        "pieces: (S + (N - 1) P) / B. pieces: (S + ceil(log2(N)) P) / B.\n"
    )
    print("| nodes | Gbit/s | one source s | tree s | chain of pieces s | pieces s |\n|---|---|---|---|---|---|")
    size, piece = 16.0, 0.5
    for gbit in (10, 100):
        rate = gbit / 8 * 1e9 / (1 << 30)  # GiB/s
        for count in (10, 100, 1000):
            ways = (
                count * size,
                math.ceil(math.log2(count + 1)) * size,
                size + (count - 1) * piece,
                size + math.ceil(math.log2(count)) * piece,
            )
            print(f"| {count} | {gbit} | " + " | ".join(f"{way / rate:.1f}" for way in ways) + " |")
    print("\nRay's release test brings one object of 1 GiB to 50 nodes in 16.9 s (published by Ray).")


def summarize(rows: list) -> list[str]:
    """Return a line for each cluster of several nodes: the times, and what the later nodes pay for a load."""
    return [
        f"{row['gib']:g} GiB, {row['nodes']} nodes: prefetch {row['prefetch']:.2f} s, plain Ray "
        f"{row['plain_all']:.2f} s (to one node {row['plain_one']:.2f} s); {row['relayed']:.0%} relayed; first load "
        f"{row['load_others'] / row['load_first']:.2f}x of the first node's"
        for row in rows
        if row["nodes"] > 1
    ]


def plot(rows: list, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["gib"] for row in rows)
    chosen = sorted((row for row in rows if row["gib"] == largest), key=lambda row: row["nodes"])
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key, label in (("plain_all", "plain Ray"), ("prefetch", "ray_zerocopy.prefetch")):
        axes.plot([row["nodes"] for row in chosen], [row[key] for row in chosen], marker="o", label=label)
    axes.set_xlabel("nodes")
    axes.set_ylabel(f"seconds until all nodes have {largest:g} GiB")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--gib", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--object-mib", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--plot")
    add_json_option(parser)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(**json.loads(given.measure))))
        return
    if given.paper:
        paper()
        return
    if given.quick:
        given.gib, given.rounds = [0.25], 1
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    rows = []
    for gib in given.gib:
        for nodes in given.nodes:
            for object_mib in given.object_mib:
                task = {"nodes": nodes, "gib": gib, "object_mib": object_mib, "rounds": given.rounds}
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(task)],
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                row = {**task, **json.loads(done.stdout.splitlines()[-1])}
                rows.append(row)
                print(
                    f"| {gib:g} | {nodes} | {object_mib} | {row['plain_one']:.2f} | {row['plain_all']:.2f} | "
                    f"{row['prefetch']:.2f} | {row['relayed']:.0%} | {row['load_first'] * 1e3:.2f} | "
                    f"{row['load_others'] * 1e3:.2f} | {row['held'] / (1 << 30):.2f} |",
                    flush=True,
                )
    paper()
    write_json(given.json, rows, summarize(rows))
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
