"""How TorchScript loads beside the same model in eager mode.

    python benchmarks/torchscript.py

Two models with random weights, BERT-base and four hundred small layers, eager and as TorchScript, each shared once
and loaded in actors of its own, fresh ones for each round. "First" is the first load in a process, which compiles
TorchScript's code; "second" writes down how to make the objects; "later" is the median of those that follow, "flags"
of those with keep_flags=True. "Private" is what the first load adds to the actor's own memory, "in use" what it has
after four forwards. The rows of a model take turns; all figures are medians over rounds.

The row "tiny" is the traced BERT with a hidden size of 24: the same code over hardly any weights, so its private
memory is what the code takes.
"""

from __future__ import annotations

import copy
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
ROUNDS, LOADS = 3, 40
IDS = torch.arange(64)[None]
X = torch.randn(2, 8)


def private():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


class Actor:
    def __init__(self):
        torch.set_num_threads(1)
        import transformers.models.bert.modeling_bert  # noqa: F401  imports are not what is measured

        load_model_in_actor(prepare_model_for_actors(torch.nn.Linear(2, 2)))

    def measure(self, model_ref, example):
        before = private()
        model, first = timed(model_ref)
        growth = private() - before
        _, second = timed(model_ref)
        later = [timed(model_ref)[1] for _ in range(LOADS)]
        flags = [timed(model_ref, keep_flags=True)[1] for _ in range(LOADS)][2:]
        with torch.inference_mode():
            for _ in range(4):
                said = model(example)
        said = said[0] if isinstance(said, tuple) else said
        figures = (first * 1e3, second * 1e3, statistics.median(later) * 1e3, statistics.median(flags) * 1e3)
        return (*figures, growth, private() - before), said.sum().item()


def timed(model_ref, **options):
    begin = time.perf_counter()
    model = load_model_in_actor(model_ref, **options)
    return model, time.perf_counter() - begin


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


def bert(hidden):
    config = transformers.BertConfig(hidden_size=hidden, intermediate_size=4 * hidden)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.config.return_dict = False
    return model


def small_layers():
    layers = (torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.BatchNorm1d(8), torch.nn.Dropout())
    return torch.nn.Sequential(*[copy.deepcopy(layer) for _ in range(100) for layer in layers]).eval()


def measured(models, example):
    """Return the handles of models of one kind and, for each, the medians over rounds."""
    refs = {name: prepare_model_for_actors(model) for name, model in models.items()}
    rows = {name: [] for name in refs}
    for _ in range(ROUNDS):
        for name, ref in refs.items():
            actor = ray.remote(num_cpus=0.1)(Actor).remote()
            figures, said = ray.get(actor.measure.remote(ref, example))
            with torch.inference_mode():
                expected = models[name](example)
            expected = (expected[0] if isinstance(expected, tuple) else expected).sum().item()
            if abs(said - expected) > 1e-2 * abs(expected) + 1e-2:
                raise SystemExit(f"{name} computed {said}, not {expected}")
            rows[name].append(figures)
            ray.kill(actor)
    return refs, {
        name: [statistics.median(column) for column in zip(*row, strict=True)] for name, row in rows.items()
    }


def show(title, refs, rows):
    heads = (
        "stored MiB",
        "first ms",
        "second ms",
        "later ms",
        "of eager",
        "flags ms",
        "of eager",
        "private MiB",
        "in use",
    )
    print(f"\n{title:10}" + "".join(f"{head:>12}" for head in heads))
    base = rows["eager"]
    for name, (first, second, later, flags, growth, used) in rows.items():
        stored = refs[name].nbytes / 2**20
        print(f"{name:10}{stored:12.1f}{first:12.1f}{second:12.1f}{later:12.2f}{later / base[2]:11.2f}x", end="")
        print(f"{flags:12.2f}{flags / base[3]:11.2f}x{growth:12.1f}{used:12.1f}")


def main():
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=2 << 30,
        logging_level="error",
        log_to_driver=False,
    )
    torch.set_num_threads(1)
    eager, layers = bert(768), small_layers()
    with torch.no_grad():
        traced = torch.jit.trace(eager, IDS, strict=False)
        berts = {"eager": eager, "traced": traced, "frozen": torch.jit.freeze(traced)}
        berts["tiny"] = torch.jit.trace(bert(24), IDS, strict=False)
        smalls = {"eager": layers, "scripted": torch.jit.script(layers), "traced": torch.jit.trace(layers, X)}
    versions = f"Python {platform.python_version()}, ray {ray.__version__}, torch {torch.__version__}"
    print(f"{versions}; medians of {ROUNDS} actors each")
    refs, rows = measured(berts, IDS)
    show("BERT-base", refs, rows)
    code, growth = rows["tiny"][4], rows["traced"][4]
    print(f"of the traced model's {growth:.1f} MiB private, code {code:.1f}, all else {growth - code:.1f}")
    show("400 layers", *measured(smalls, X))
    print(f"\ntorch.jit.load of the traced BERT's whole archive: {jit_load(traced):.0f} ms")
    print("to reach: later at most 3x of eager, private at most 4 MB plus the code; the first load compiles the code")
    ray.shutdown()


if __name__ == "__main__":
    main()
