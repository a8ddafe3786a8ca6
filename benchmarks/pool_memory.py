"""Measure how long `memory.pool_memory` takes for many processes that have a model.

    python benchmarks/pool_memory.py                  # 64 actors: about two minutes on two cores, 15 GiB of memory
    python benchmarks/pool_memory.py --actors 8

Each actor loads BERT-base (random weights, 417.6 MiB) and calls it once, so that all its pages are mapped.
"""

from __future__ import annotations

import argparse
import statistics
import time

import ray
import torch
import transformers
from results import add_json_option, write_json

from ray_zerocopy import load_model_in_actor, memory, prepare_model_for_actors


class Actor:
    def __init__(self, model_ref):
        torch.set_num_threads(1)
        self.model = load_model_in_actor(model_ref)
        with torch.inference_mode():
            self.model(torch.arange(8)[None])

    def ready(self):
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=64)
    add_json_option(parser)
    options = parser.parse_args()
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    model_ref = prepare_model_for_actors(transformers.BertModel(transformers.BertConfig()).eval())
    actors = [ray.remote(num_cpus=0)(Actor).remote(model_ref) for _ in range(options.actors)]
    ray.get([actor.ready.remote() for actor in actors])
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        found = memory.pool_memory(model_ref)
        seconds.append(time.perf_counter() - begin)
    assert len(found.processes) >= options.actors, len(found.processes)
    verdict = "yes" if statistics.median(seconds) <= 2 else "NO"
    summary = (
        f"pool_memory of {len(found.processes)} processes: {statistics.median(seconds):.2f} s  goal: 2 s  {verdict}"
    )
    print(summary)
    write_json(options.json, {"processes": len(found.processes), "seconds": seconds}, [summary])
    ray.shutdown()


if __name__ == "__main__":
    main()
