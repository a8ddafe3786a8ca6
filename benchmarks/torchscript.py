"""Compare loads of TorchScript modules with loads of the same models in eager mode.

    python benchmarks/torchscript.py

There are two models with random weights, BERT-base and four hundred small layers, each eager and as TorchScript. Each
is shared once and loaded in a fresh actor in each round. The rows of a model take turns, and all figures are medians
over rounds. The columns:

- first: the first load in a process, which compiles TorchScript's code;
- second: the second load, which records how to construct the objects;
- later: the median of the loads after that;
- flags: the same with keep_flags=True;
- private: the growth of the actor's private memory by the first load;
- in use: that growth after four forwards.

The row "tiny" is the traced BERT with a hidden size of 24. It has the same code and almost no weights, so its private
memory is the memory of the code.
"""

from __future__ import annotations

import argparse
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
from results import add_json_option, write_json

from ray_zerocopy import load_model_in_actor, prepare_model_for_actors

warnings.simplefilter("ignore")
ROUNDS, LOADS = 3, 40
IDS = torch.arange(64)[None]
X = torch.randn(2, 8)


def private_mib():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


class Actor:
    def __init__(self):
        torch.set_num_threads(1)
        import transformers.models.bert.modeling_bert  # noqa: F401  excludes the import from the measurement

        load_model_in_actor(prepare_model_for_actors(torch.nn.Linear(2, 2)))

    def measure(self, model_ref, example):
        before = private_mib()
        model, first = time_load(model_ref)
        growth = private_mib() - before
        _, second = time_load(model_ref)
        later = [time_load(model_ref)[1] for _ in range(LOADS)]
        flags = [time_load(model_ref, keep_flags=True)[1] for _ in range(LOADS)][2:]
        with torch.inference_mode():
            for _ in range(4):
                output = model(example)
        output = output[0] if isinstance(output, tuple) else output
        figures = (first * 1e3, second * 1e3, statistics.median(later) * 1e3, statistics.median(flags) * 1e3)
        return (*figures, growth, private_mib() - before), output.sum().item()


def time_load(model_ref, **options):
    begin = time.perf_counter()
    model = load_model_in_actor(model_ref, **options)
    return model, time.perf_counter() - begin


def time_jit_load(module):
    """Return the milliseconds that torch.jit.load takes for the whole archive, with weights, from memory."""
    archive = io.BytesIO()
    torch.jit.save(module, archive)
    seconds = []
    for _ in range(3):
        archive.seek(0)
        begin = time.perf_counter()
        torch.jit.load(archive)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e3


def make_bert(hidden):
    config = transformers.BertConfig(hidden_size=hidden, intermediate_size=4 * hidden)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.config.return_dict = False
    return model


def make_small_layers():
    layers = (torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.BatchNorm1d(8), torch.nn.Dropout())
    return torch.nn.Sequential(*[copy.deepcopy(layer) for _ in range(100) for layer in layers]).eval()


def measure_models(models, example):
    """Return the handle of each model, and for each the medians over rounds."""
    refs = {name: prepare_model_for_actors(model) for name, model in models.items()}
    rows = {name: [] for name in refs}
    for _ in range(ROUNDS):
        for name, ref in refs.items():
            actor = ray.remote(num_cpus=0.1)(Actor).remote()
            figures, output = ray.get(actor.measure.remote(ref, example))
            with torch.inference_mode():
                expected = models[name](example)
            expected = (expected[0] if isinstance(expected, tuple) else expected).sum().item()
            if abs(output - expected) > 1e-2 * abs(expected) + 1e-2:
                raise SystemExit(f"{name}: the loaded model's output sums to {output}, the source's to {expected}.")
            rows[name].append(figures)
            ray.kill(actor)
    return refs, {
        name: [statistics.median(column) for column in zip(*row, strict=True)] for name, row in rows.items()
    }


def print_table(title, refs, rows):
    headings = (
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
    print(f"\n{title:10}" + "".join(f"{head:>12}" for head in headings))
    base = rows["eager"]
    for name, (first, second, later, flags, growth, used) in rows.items():
        stored = refs[name].nbytes / 2**20
        print(f"{name:10}{stored:12.1f}{first:12.1f}{second:12.1f}{later:12.2f}{later / base[2]:11.2f}x", end="")
        print(f"{flags:12.2f}{flags / base[3]:11.2f}x{growth:12.1f}{used:12.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    options = parser.parse_args()
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=2 << 30,
        logging_level="error",
        log_to_driver=False,
    )
    torch.set_num_threads(1)
    eager, layers = make_bert(768), make_small_layers()
    with torch.no_grad():
        traced = torch.jit.trace(eager, IDS, strict=False)
        berts = {"eager": eager, "traced": traced, "frozen": torch.jit.freeze(traced)}
        berts["tiny"] = torch.jit.trace(make_bert(24), IDS, strict=False)
        smalls = {"eager": layers, "scripted": torch.jit.script(layers), "traced": torch.jit.trace(layers, X)}
    versions = f"Python {platform.python_version()}, ray {ray.__version__}, torch {torch.__version__}"
    print(f"{versions}; medians of {ROUNDS} actors each")
    refs, rows = measure_models(berts, IDS)
    print_table("BERT-base", refs, rows)
    code, growth = rows["tiny"][4], rows["traced"][4]
    print(f"private memory of the traced model, {growth:.1f} MiB: code {code:.1f}, the rest {growth - code:.1f}")
    small_refs, small_rows = measure_models(smalls, X)
    print_table("400 layers", small_refs, small_rows)
    print(f"\ntorch.jit.load of the traced BERT's whole archive: {time_jit_load(traced):.0f} ms")
    columns = ("first_ms", "second_ms", "later_ms", "flags_ms", "private_mib", "in_use_mib")
    figures = {
        size: {name: dict(zip(columns, row, strict=True)) for name, row in found.items()}
        for size, found in (("BERT-base", rows), ("400 layers", small_rows))
    }
    summary = [
        f"{size}, {name}: a later load takes {row['later_ms'] / found['eager']['later_ms']:.2f}x of eager  goal: 3x"
        for size, found in figures.items()
        for name, row in found.items()
        if name not in ("eager", "tiny")
    ]
    write_json(options.json, figures, summary)
    print("goals: later at most 3x of eager, private at most 4 MB plus the code; the first load compiles the code")
    ray.shutdown()


if __name__ == "__main__":
    main()
