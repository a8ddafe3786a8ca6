"""Measure the first forward after a load against the second, and ways to make it shorter.

    python benchmarks/first_touch.py                     # about a minute on two idle cores
    mount -o remount,huge=always /dev/shm                # as root: the store then has pages of 2 MiB
    python benchmarks/first_touch.py                     # the same, with such pages

A forward that reads each weight for the first time maps each page of the weights into the process. Each round starts
an actor, which has imported all classes and has run a model of the same class, and goes one way:

- as is: load, then two forwards.
- populate, 1 thread: MADV_POPULATE_READ over the weights between the load and the first forward.
- populate, 2 threads: the same, in two halves at once.
- private copy: the model is copied after the load (`copy.deepcopy`), as a load without sharing would be.
- loaded before: the actor has loaded, called and dropped the model once.

The model is a stack of linear layers, called with one row, so nearly all of its time is reading the weights.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import threading
import time

import ray
import torch
from results import add_json_option, write_json

from ray_zerocopy import load_model_in_actor, prepare_model_for_actors

WAYS = ("as is", "populate, 1 thread", "populate, 2 threads", "private copy", "loaded before")
LAYERS = 24


def make_model(mib):
    width = round((mib * 2**20 / 4 / LAYERS) ** 0.5)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS))).eval()


def populate(model, threads):
    """Map the pages of the weights, in several threads."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGESIZE")
    ranges = []
    for parameter in model.parameters():
        begin = parameter.data_ptr() - parameter.data_ptr() % page
        ranges.append((begin, parameter.data_ptr() + parameter.nbytes - begin))

    def run(own):
        for begin, nbytes in own:
            libc.madvise(begin, nbytes, 22)  # MADV_POPULATE_READ

    workers = [threading.Thread(target=run, args=(ranges[n::threads],)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


class Actor:
    def __init__(self, small):
        torch.set_num_threads(1)
        self.call(load_model_in_actor(small))

    @staticmethod
    def call(model):
        x = torch.ones(1, model[0].in_features)
        begin = time.perf_counter()
        with torch.inference_mode():
            model(x)
        return time.perf_counter() - begin

    def measure(self, way, model_ref):
        if way == "loaded before":
            self.call(load_model_in_actor(model_ref))
        begin = time.perf_counter()
        model = load_model_in_actor(model_ref)
        load = time.perf_counter() - begin
        begin = time.perf_counter()
        if way.startswith("populate"):
            populate(model, int(way.split()[1]))
        if way == "private copy":
            model = copy.deepcopy(model)
        ready = time.perf_counter() - begin
        forwards = [self.call(model) for _ in range(4)]
        return load, ready, forwards[0], statistics.median(forwards[1:])


def huge_pages():
    """Return the option `huge` of the mount of /dev/shm."""
    with open("/proc/mounts") as file:
        options = next((line.split()[3] for line in file if line.split()[1] == "/dev/shm"), "")
    return next((option.partition("=")[2] for option in options.split(",") if option.startswith("huge=")), "never")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400, 1600], help="MiB of the models")
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    options = parser.parse_args()
    store = int(sum(options.sizes) * 2**20 * 1.2) + (200 << 20)
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=store, logging_level="error")
    small = prepare_model_for_actors(make_model(1))
    found = {}
    print(f"/dev/shm: huge={huge_pages()}\n\n{'MiB':>6}  {'way':<20}{'load ms':>9}{'ready ms':>10}", end="")
    print(f"{'first ms':>10}{'second ms':>11}{'first/second':>14}{'ready+first':>13}")
    for mib in options.sizes:
        model_ref = prepare_model_for_actors(make_model(mib))
        for way in WAYS:
            rows = []
            for _ in range(options.rounds):
                actor = ray.remote(num_cpus=1)(Actor).remote(small)
                rows.append(ray.get(actor.measure.remote(way, model_ref)))
                ray.kill(actor)
            load, ready, first, second = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
            found.setdefault(str(mib), {})[way] = {
                "load_ms": load,
                "ready_ms": ready,
                "first_ms": first,
                "second_ms": second,
            }
            print(f"{mib:>6}  {way:<20}{load:>9.1f}{ready:>10.1f}{first:>10.1f}{second:>11.1f}", end="")
            print(f"{first / second:>13.2f}x{(ready + first) / second:>12.2f}x")
    summary = [
        f"{mib} MiB: the first forward takes {ways['as is']['first_ms'] / ways['as is']['second_ms']:.2f}x the second"
        for mib, ways in found.items()
    ]
    print("\n" + "\n".join(summary))
    write_json(options.json, {"huge": huge_pages(), "sizes": found}, summary)
    ray.shutdown()


if __name__ == "__main__":
    main()
