"""How TorchScript loads beside the same model in eager mode.

    python benchmarks/torchscript.py

BERT-base with random weights, eager, traced and frozen, each shared once and loaded in actors of its own, fresh ones
for each round. "First" is the first load in a process, which compiles TorchScript's code; "later" the median of those
that follow. "Private" is what the first load adds to the actor's own memory, and what it has after four forwards.
The rounds of the three take turns; all figures are medians over rounds.
"""

from __future__ import annotations

import gc
import io
import platform
import statistics
import time
import warnings

import ray
import torch
import transformers

from ray_zerocopy import load_model_in_actor, prepare_model_for_actors

warnings.simplefilter("ignore")
ROUNDS, LOADS = 5, 40
IDS = torch.arange(64)[None]


def private():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


class Actor:
    def __init__(self):
        torch.set_num_threads(1)
        import transformers.models.bert.modeling_bert  # noqa: F401  imports are not what is measured

        load_model_in_actor(prepare_model_for_actors(torch.nn.Linear(2, 2)))

    def measure(self, model_ref):
        before = private()
        begin = time.perf_counter()
        model = load_model_in_actor(model_ref)
        first = time.perf_counter() - begin
        growth = private() - before
        later = []
        for _ in range(LOADS):
            begin = time.perf_counter()
            another = load_model_in_actor(model_ref)
            later.append(time.perf_counter() - begin)
            del another
        with torch.inference_mode():
            for _ in range(4):
                said = model(IDS)
        return first * 1e3, statistics.median(later) * 1e3, growth, private() - before, said[0].sum().item()


def jit_load(module):
    """Return what torch.jit.load takes for the whole archive, weights and all, from memory."""
    archive = io.BytesIO()
    torch.jit.save(module, archive)
    taken = []
    for _ in range(3):
        archive.seek(0)
        begin = time.perf_counter()
        torch.jit.load(archive)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3


def main():
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=2 << 30, logging_level="error")
    torch.set_num_threads(1)
    eager = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    eager.config.return_dict = False
    with torch.inference_mode(False), torch.no_grad():
        traced = torch.jit.trace(eager, IDS, strict=False)
        frozen = torch.jit.freeze(traced)
    models = {"eager": eager, "traced": traced, "frozen": frozen}
    expected = eager(IDS)[0].sum().item()
    refs, prepare = {}, {}
    for name, model in models.items():
        begin = time.perf_counter()
        refs[name] = prepare_model_for_actors(model)
        prepare[name] = time.perf_counter() - begin
    rows = {name: [] for name in refs}
    for _ in range(ROUNDS):
        for name, ref in refs.items():
            actor = ray.remote(num_cpus=0.1)(Actor).remote()
            *figures, said = ray.get(actor.measure.remote(ref))
            if abs(said - expected) > 1e-2 * abs(expected):
                raise SystemExit(f"{name} computed {said}, not {expected}")
            rows[name].append(figures)
            ray.kill(actor)
    size = refs["eager"].nbytes / 2**20
    versions = f"Python {platform.python_version()}, ray {ray.__version__}, torch {torch.__version__}"
    print(f"BERT-base, {size:.0f} MiB; {versions}; medians of {ROUNDS} actors each\n")
    heads = ("stored MiB", "first ms", "later ms", "of eager", "private MiB", "in use")
    print(" " * 10 + "".join(f"{head:>13}" for head in heads))
    base = statistics.median(row[1] for row in rows["eager"])
    for name, figures in rows.items():
        first, later, growth, used = (statistics.median(column) for column in zip(*figures, strict=True))
        stored = refs[name].nbytes / 2**20
        print(f"{name:10}{stored:13.1f}{first:13.1f}{later:13.2f}{later / base:12.2f}x{growth:13.1f}{used:13.1f}")
    print(f"\ntorch.jit.load of the traced model's whole archive: {jit_load(traced):.0f} ms")
    print("to reach: later at most 3x of eager, private at most 4 MB plus the code; the first load compiles the code")
    ray.shutdown()


if __name__ == "__main__":
    main()
