"""Measure how long `memory.pool_memory` takes for many processes that have a model.

    python benchmarks/pool_memory.py                  # 64 actors: about four minutes on two cores, 15 GiB of memory
    python benchmarks/pool_memory.py --actors 8

Each actor loads a transformer of the size of BERT-base (random weights) and calls it once, so that all its pages are
mapped. It is built of torch's own layers, because 64 processes that import transformers need more than 24 GiB.
"""

from __future__ import annotations

import argparse
import statistics
import time

import ray
import torch
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
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    model_ref = prepare_model_for_actors(torch.nn.Sequential(torch.nn.Embedding(30522, 768), encoder).eval())
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
