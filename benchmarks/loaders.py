"""Measure `prepare_model_from` beside loading in the driver: seconds, and the memory of each process.

    python benchmarks/loaders.py                 # about two minutes on two busy cores
    python benchmarks/loaders.py --hidden 2048   # a larger model

A checkpoint of BERT with random weights, in several safetensors files, is loaded through transformers: in the driver,
which then prepares the model; by a worker, without a name and with one; and by a worker that only loads it. The rows
take turns. A separate process samples the anonymous memory of each process. Needs Linux and transformers.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import ray
import torch
import transformers
from results import add_json_option, write_json

import ray_zerocopy as rz

MIB = 1 << 20
DRIVER, UNNAMED, NAMED, ALONE = "in the driver", "prepare_model_from", "the same, by name", "the loader alone"
SAMPLER = """
import os, select, sys
pids, most, first = sys.argv[1:], {}, {}
while not select.select([sys.stdin], [], [], 0.002)[0]:
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            anonymous = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        first.setdefault(pid, anonymous)
        most[pid] = max(most.get(pid, 0), anonymous)
print(" ".join(str(most[pid] - first[pid]) for pid in pids))
"""


class Sampler:
    """Samples the growth of the anonymous memory of processes, from another process."""

    def __init__(self, *pids):
        command = [sys.executable, "-c", SAMPLER, *map(str, pids)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(0.3)

    def stop(self):
        answer, _ = self.process.communicate("stop")
        return [int(kib) * 1024 for kib in answer.split()]


def write_checkpoint(folder, hidden):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64
    )
    transformers.BertModel(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))


def load(folder, done=None):
    """Load the model. With `done`, write the growth of this process's anonymous memory there."""
    sampler = None if done is None else Sampler(os.getpid())
    model = transformers.BertModel.from_pretrained(folder).eval()
    if sampler is not None:
        with open(done, "w") as file:
            file.write(str(sampler.stop()[0]))
    return model


@ray.remote(num_cpus=0)
def load_alone(folder, done):
    load(folder, done)


def checksum(model_ref):
    model = rz.load_model_in_actor(model_ref)
    return sum(parameter.sum().item() for parameter in model.parameters())


def turn(row, folder, done):
    """Do one row once. Return seconds, the growth of driver, loader's worker and owner, and a handle."""
    pids = [os.getpid()]
    options = {}
    if row == NAMED:
        first = rz.prepare_model_for_actors(torch.nn.Linear(2, 2), name="bert", lifetime="detached", replace=True)
        owner = ray.get_actor(first.name, namespace=first.namespace)
        pids.append(ray.get(owner.describe_model.remote())["version"]["pid"])
        options = {"name": "bert", "lifetime": "detached", "replace": True}
    sampler = Sampler(*pids)
    begin = time.perf_counter()
    model_ref = None
    if row == DRIVER:
        model_ref = rz.prepare_model_for_actors(load(folder))
    elif row == ALONE:
        ray.get(load_alone.remote(folder, done))
    else:
        model_ref = rz.prepare_model_from(functools.partial(load, folder, done), **options)
    seconds = time.perf_counter() - begin
    growth = sampler.stop()
    worker = None
    if row != DRIVER:
        with open(done) as file:
            worker = int(file.read())
    return seconds, growth[0], worker, growth[1] if len(growth) > 1 else None, model_ref


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1344)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=5 << 30, logging_level="error")
    results = {row: [] for row in (DRIVER, UNNAMED, NAMED, ALONE)}
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(os.path.join(folder, "model"), options.hidden)
        print(f"a checkpoint of {size / MIB:.0f} MiB in {len(os.listdir(os.path.join(folder, 'model'))) - 2} files")
        sums = set()
        for number in range(options.rounds + 1):
            for row in results:
                *figures, model_ref = turn(row, os.path.join(folder, "model"), os.path.join(folder, "done"))
                if model_ref is not None:
                    sums.add(checksum(model_ref))
                    figures.append(model_ref.nbytes)
                del model_ref
                if number:  # the first round warms up the page cache, and starts workers
                    results[row].append(figures)
        if len(sums) != 1:
            sys.exit(f"the ways give different weights: {sums}")
    print(f"{'':22}{'seconds':>9}{'driver MiB':>12}{'loader MiB':>12}{'owner MiB':>11}{'store MiB':>11}")
    found = {"checkpoint_mib": size / MIB}
    for row, turns in results.items():
        cells = []
        found[row] = {"seconds": statistics.median(figures[0] for figures in turns)}
        found[row]["driver_mib"] = max(figures[1] for figures in turns) / MIB
        for number, width in ((1, 12), (2, 12), (3, 11), (4, 11)):
            known = [figures[number] for figures in turns if len(figures) > number and figures[number] is not None]
            cells.append(f"{max(known) / MIB:.1f}".rjust(width) if known else " " * width)
        print(f"{row:22}{statistics.median(figures[0] for figures in turns):9.2f}{''.join(cells)}")
    print("MiB: the largest growth of the process's anonymous memory; a loader's is that of from_pretrained alone.")
    summary = [
        f"{row}: {values['seconds']:.2f} s, the driver grows by {values['driver_mib']:.1f} MiB"
        for row, values in found.items()
        if row != "checkpoint_mib"
    ]
    write_json(options.json, found, summary)
    rz.remove_model("bert")
    ray.shutdown()


if __name__ == "__main__":
    main()
