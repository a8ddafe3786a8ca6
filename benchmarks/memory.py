"""Measure the time of a load against the size of the model, and the memory against the number of actors.

    python benchmarks/memory.py            # about five minutes on two idle cores
    python benchmarks/memory.py --quick    # at most 4 actors and 400 MiB
    python benchmarks/memory.py --peers 0.1.5 0.2.0   # also versions of the earlier library, from the package index

Each group of ways has a Ray session of its own, one after the other: plain ways, Ray's flag
(RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1), and each version of the earlier library of the same import name, which pip
installs into a directory of its own. In each session, actors load BERT-base (random weights, 417.6 MiB) one after
the other, call it once, and keep it. The figures are what all actors together gained since before the load: private
memory, and their proportional share (PSS), which counts a shared page once. One actor then loads models of 96 tensors
in several sizes, and the median of 7 loads counts (3 for loads of more than a second).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from results import add_json_option, write_json

MIB = 1 << 20
PUT, FLAG, FILE, MMAP, SAFETENSORS, OURS = (
    "ray.put(model)",
    "Ray's flag",
    "torch.load",
    "torch.load(mmap) + assign",
    "safetensors + assign",
    "ray_zerocopy",
)
GROUPS = {"plain": (PUT, FILE, MMAP, SAFETENSORS, OURS), "flag": (FLAG,)}
BLOCKS = 24


def bert():
    import transformers

    return transformers.BertModel(transformers.BertConfig()).eval()


def blocks(mib):
    """Return a model of 96 tensors and about `mib` MiB."""
    import torch

    width = round((mib * MIB / 4 / BLOCKS) ** 0.5)
    layers = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.LayerNorm(width)) for _ in range(BLOCKS)]
    return torch.nn.Sequential(*layers).eval()


def share(way, model, path):
    """Put a model into the store or into a file, and return what the actors get."""
    import ray
    import torch

    if way in (PUT, FLAG):
        return [ray.put(model)]
    if way == OURS:
        import ray_zerocopy

        return [ray_zerocopy.prepare_model_for_actors(model)]
    if way == FILE:
        torch.save(model, path)
        return [path]
    if way == MMAP:
        torch.save(model.state_dict(), path)
        return [path]
    if way == SAFETENSORS:
        import safetensors.torch

        safetensors.torch.save_file(model.state_dict(), path)
        return [path]
    from ray_zerocopy import ModelWrapper  # the earlier library

    return [ModelWrapper.from_model(model, mode="actor")]


def load(way, source, make_empty):
    import ray
    import torch

    if way in (PUT, FLAG):
        return ray.get(source)
    if way == OURS:
        import ray_zerocopy

        return ray_zerocopy.load_model_in_actor(source)
    if way == FILE:
        return torch.load(source, weights_only=False)
    if way in (MMAP, SAFETENSORS):
        import safetensors.torch

        weights = torch.load(source, mmap=True) if way == MMAP else safetensors.torch.load_file(source)
        with torch.device("meta"):
            model = make_empty()
        model.load_state_dict(weights, assign=True)
        return model
    return source.load()


def set_buffers(model):
    """Set the two buffers of a BERT that are in no checkpoint."""
    import torch

    length = model.config.max_position_embeddings
    model.embeddings.position_ids = torch.arange(length).expand((1, -1))
    model.embeddings.token_type_ids = torch.zeros((1, length), dtype=torch.long)


def own_memory():
    """Return the private and the proportional memory of this process, in bytes."""
    with open("/proc/self/smaps_rollup") as file:
        fields = {line.split()[0].rstrip(":"): int(line.split()[1]) * 1024 for line in list(file)[1:]}
    return fields["Private_Clean"] + fields["Private_Dirty"], fields["Pss"]


class Actor:
    def __init__(self):
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.BertModel(transformers.BertConfig(hidden_size=96, num_hidden_layers=1)).eval()(
            torch.arange(8)[None]
        )
        self.model = None

    def keep(self, way, source):
        """Load BERT, call it once, and keep it."""
        import torch

        self.model = load(way, source[0], bert)
        if way in (MMAP, SAFETENSORS):
            set_buffers(self.model)
        with torch.inference_mode():
            return float(self.model(torch.arange(128)[None]).last_hidden_state.double().abs().sum())

    def drop(self):
        self.model = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def memory(self):
        return own_memory()

    def loads(self, way, source, mib):
        """Return the seconds of several loads."""
        seconds = []
        while len(seconds) < (7 if sum(seconds) < 3 else 3):
            begin = time.perf_counter()
            model = load(way, source[0], lambda: blocks(mib))
            seconds.append(time.perf_counter() - begin)
            del model
        gc.collect()
        return seconds


def measure(group, ways, counts, sizes):
    """Measure the ways of one session; runs in a process of its own."""
    import ray
    import torch

    warnings.simplefilter("ignore")
    store = int((max(sizes) + 500) * MIB * 2.2)
    ray.init("local", num_cpus=32, include_dashboard=False, object_store_memory=store, log_to_driver=False)
    torch.manual_seed(0)
    model = bert()
    with torch.inference_mode():
        expected = float(model(torch.arange(128)[None]).last_hidden_state.double().abs().sum())
    actors = [ray.remote(num_cpus=1)(Actor).remote() for _ in range(max(counts))]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights")
        for way in ways:
            row = found[way] = {"private_mib": {}, "pss_mib": {}, "load_ms": {}}
            ray.get([actor.drop.remote() for actor in actors])
            before = [sum(column) for column in zip(*ray.get([a.memory.remote() for a in actors]), strict=True)]
            source = share(way, model, path)
            for number, actor in enumerate(actors, 1):
                checksum = ray.get(actor.keep.remote(way, source))
                if abs(checksum - expected) > 1e-6 * expected:
                    raise SystemExit(f"{way}: the loaded model gives the checksum {checksum}, the source {expected}.")
                if number in counts:
                    now = [sum(column) for column in zip(*ray.get([a.memory.remote() for a in actors]), strict=True)]
                    row["private_mib"][number] = (now[0] - before[0]) / MIB
                    row["pss_mib"][number] = (now[1] - before[1]) / MIB
            ray.get([actor.drop.remote() for actor in actors])
            del source
            time.sleep(1.2)  # Ray frees dropped objects once a second
            for mib in sizes:
                source = share(way, blocks(mib), path)
                seconds = ray.get(actors[0].loads.remote(way, source, mib))
                row["load_ms"][mib] = statistics.median(seconds) * 1e3
                del source
                time.sleep(1.2)
    ray.shutdown()
    return found


def environment(group, folder):
    """Return the environment of a session: Ray's flag, or the earlier library in a directory of its own."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(here.parent)}
    env.pop("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", None)
    if group == "flag":
        env["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
    elif group not in GROUPS:
        target = os.path.join(folder, group)
        install = ["install", "-q", "--no-deps", "--target", target, f"ray-zerocopy=={group}"]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True, stdout=subprocess.DEVNULL)
        env["PYTHONPATH"] = target
    env["PYTHONPATH"] += os.pathsep + str(here)
    return env


def print_table(title, rows, columns, form):
    print(f"\n{title}")
    widths = [max(26, *(len(row) for row in rows))] + [9] * len(columns)
    print("  ".join([" " * widths[0], *(str(column).rjust(9) for column in columns)]))
    for row, values in rows.items():
        cells = (format(values[str(column)], form).rjust(9) for column in columns)
        print("  ".join([row.ljust(widths[0]), *cells]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 4 actors and 400 MiB")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of actors")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 40, 400, 1600], help="sizes of models, MiB")
    parser.add_argument("--peers", nargs="*", default=[], help="versions of the earlier library")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    add_json_option(parser)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(**json.loads(given.measure))))
        return
    if given.quick:
        given.counts, given.sizes = [1, 2, 4], [40, 400]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for group, ways in (GROUPS | {peer: (f"earlier library {peer}",) for peer in given.peers}).items():
            task = {"group": group, "ways": ways, "counts": given.counts, "sizes": given.sizes}
            done = subprocess.run(
                [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--measure", json.dumps(task)],
                env=environment(group, folder),
                cwd=folder,  # Ray puts the working directory first on the path of its workers
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stdout[-1000:] + done.stderr[-3000:])
            found |= json.loads(done.stdout.splitlines()[-1])
    found[OURS] = found.pop(OURS)  # last
    print_table(
        "load, ms, by the size of the model in MiB", {w: f["load_ms"] for w, f in found.items()}, given.sizes, ".2f"
    )
    for figure, title in (("private_mib", "private memory"), ("pss_mib", "proportional memory")):
        rows = {way: f[figure] for way, f in found.items()}
        print_table(f"BERT-base, 417.6 MiB: {title} of all actors, MiB, by their number", rows, given.counts, ".0f")
    most, largest = str(given.counts[-1]), str(given.sizes[-1])
    pss, loads = ({way: found[way][figure] for way in (OURS, FLAG, PUT)} for figure in ("pss_mib", "load_ms"))
    summary = [
        f"{most} actors with BERT-base: {pss[OURS][most]:.0f} MiB with {OURS}, {pss[PUT][most]:.0f} with {PUT}",
        f"load of {largest} MiB: {loads[OURS][largest]:.2f} ms with {OURS}, {loads[FLAG][largest]:.2f} with {FLAG}, "
        f"{loads[PUT][largest]:.0f} with {PUT}",
    ]
    print("\n" + "\n".join(summary))
    write_json(given.json, found, summary)


if __name__ == "__main__":
    main()
