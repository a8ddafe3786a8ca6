"""Measure how long it takes to share and to load a model, and how much memory that takes.

    python benchmarks/load.py            # everything: about four minutes on two busy cores
    python benchmarks/load.py --quick    # fewer rounds, no tenfold model

BERT-base with random weights goes to four actors in eight ways, one for each row of the table. Two Ray sessions run
side by side, one of them with RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1 in its environment. The rows take turns: each
figure is a median over rounds, and each row has one turn in each round. Needs Linux, transformers and safetensors.
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
import threading
import time
import warnings

import numpy as np
import ray
import safetensors.torch
import torch
import transformers
from results import add_json_option, describe, machine, versions, write_json

import ray_zerocopy as rz

MIB = 1 << 20
ACTORS = 4
PLAIN, FLAG, OURS, FLOOR = "ray.put(model)", "Ray's flag", "ray_zerocopy", "ray.put(arrays)"
NAMED = "ray_zerocopy by name"
TORCH, TORCH_MMAP, SAFETENSORS = "torch.load", "torch.load(mmap) + assign", "safetensors + assign"
ROWS = {
    PLAIN: "off",
    FLAG: "on",
    TORCH: "off",
    TORCH_MMAP: "off",
    SAFETENSORS: "off",
    OURS: "off",
    NAMED: "off",
    FLOOR: "off",
}
IN_STORE = (PLAIN, FLAG, OURS, NAMED, FLOOR)
BASE_HIDDEN, TENFOLD_HIDDEN = 768, 2652
# Room for the tenfold and the base model. Untouched pages cost nothing.
STORE_BYTES = 6 << 30
# The turn of one row in one actor ends after this many loads or this many seconds.
LOADS_A_TURN, SECONDS_A_TURN = 5, 0.5


def bert_config(hidden):
    return transformers.BertConfig(hidden_size=hidden, intermediate_size=4 * hidden)


def model_without_weights(hidden):
    with torch.device("meta"):
        return transformers.BertModel(bert_config(hidden)).eval()


def assign_weights(weights):
    """Build a model around loaded weights without a copy. Two buffers are in no checkpoint, so they are set here."""
    model = model_without_weights(BASE_HIDDEN)
    model.load_state_dict(weights, assign=True)
    length = model.config.max_position_embeddings
    model.embeddings.position_ids = torch.arange(length).expand((1, -1))
    model.embeddings.token_type_ids = torch.zeros((1, length), dtype=torch.long)
    return model


PREPARE = {
    PLAIN: lambda model: ray.put(model),
    FLAG: lambda model: ray.put(model),
    OURS: lambda model: rz.prepare_model_for_actors(model),
    NAMED: lambda model: rz.prepare_model_for_actors(model, name="bert", lifetime="detached", replace=True),
    FLOOR: lambda arrays: ray.put(arrays),
}
LOAD = {
    PLAIN: lambda ref: ray.get(ref),
    FLAG: lambda ref: ray.get(ref),
    TORCH: lambda path: torch.load(path, weights_only=False),
    TORCH_MMAP: lambda path: assign_weights(torch.load(path, mmap=True)),
    SAFETENSORS: lambda path: assign_weights(safetensors.torch.load_file(path)),
    OURS: lambda ref: rz.load_model_in_actor(ref),
    NAMED: lambda ref: rz.load_model_in_actor(ref),
    FLOOR: lambda ref: ray.get(ref),
}


# ---------------------------------------------------------------- in an actor


def private_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))


def trim_heap():
    """Return freed heap memory to the operating system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Actor:
    def __init__(self):
        torch.set_num_threads(1)
        model_without_weights(96)  # imports the classes that every row needs
        self.model = None
        self.before = 0

    def first(self, row, source):
        """Load the model, call it once and keep it. Return the seconds of the load and a checksum of the output."""
        begin = time.perf_counter()
        self.model = LOAD[row](source[0])
        seconds = time.perf_counter() - begin
        if row == FLOOR:
            return seconds, float(sum(array.sum(dtype=np.float64) for array in self.model))
        with torch.inference_mode():
            return seconds, float(self.model(torch.arange(128)[None]).last_hidden_state.double().abs().sum())

    def drop(self):
        """Drop the model, and take the private memory at this point as the baseline."""
        self.model = None
        trim_heap()
        self.before = private_bytes()

    def private(self):
        return private_bytes() - self.before

    def loads(self, row, source):
        """Load and drop the model a few times. Return the seconds of each load."""
        seconds = []
        while len(seconds) < LOADS_A_TURN and sum(seconds) < SECONDS_A_TURN:
            begin = time.perf_counter()
            model = LOAD[row](source[0])
            seconds.append(time.perf_counter() - begin)
            del model
        gc.collect()
        return seconds


# ---------------------------------------------------------------- in a session


class Session:
    """One Ray session in a separate process. The parent process calls the methods by name."""

    def __init__(self, folder):
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            logging_level="error",
            log_to_driver=False,
        )
        warnings.simplefilter("ignore")  # the flag warns at each put
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.folder = folder
        self.model = transformers.BertModel(bert_config(BASE_HIDDEN)).eval()
        self.arrays = [tensor.detach().numpy() for tensor in self.model.state_dict().values()]
        self.sources = {}
        self.actors = [ray.remote(Actor).options(num_cpus=1).remote() for _ in range(ACTORS)]
        self.warm()

    def warm(self):
        """Touch the store's pages, because the first write to a page takes many times as long as later writes."""
        block = np.ones(self.nbytes() + MIB, dtype=np.uint8)
        held = [ray.put(block) for _ in range(6)]
        del held
        ray.get([actor.drop.remote() for actor in self.actors])

    def settle(self):
        trim_heap()

    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def tensors(self):
        return len(self.model.state_dict())

    def expected(self):
        with torch.inference_mode():
            return float(self.model(torch.arange(128)[None]).last_hidden_state.double().abs().sum())

    def prepare(self, row):
        source = self.arrays if row == FLOOR else self.model
        begin = time.perf_counter()
        ref = PREPARE[row](source)
        seconds = time.perf_counter() - begin
        del ref
        return seconds

    def share(self, row):
        """Put the model into the store or write it to a file, for the actors to load."""
        path = os.path.join(self.folder, row.split()[0])
        if row in IN_STORE:
            self.sources[row] = [PREPARE[row](self.arrays if row == FLOOR else self.model)]
            return
        if row == TORCH:
            torch.save(self.model, path)
        elif row == TORCH_MMAP:
            path += "-weights"
            torch.save(self.model.state_dict(), path)
        else:
            safetensors.torch.save_file(self.model.state_dict(), path)
        self.sources[row] = [path]

    def first(self, row):
        """Load the model in each actor. Return the seconds, the checksums, and the private bytes of each actor."""
        ray.get([actor.drop.remote() for actor in self.actors])
        results = [ray.get(actor.first.remote(row, self.sources[row])) for actor in self.actors]
        # After all loads, because the kernel counts a page as private while only one process maps it.
        private = ray.get([actor.private.remote() for actor in self.actors])
        ray.get([actor.drop.remote() for actor in self.actors])
        return [seconds for seconds, _ in results], [checksum for _, checksum in results], private

    def loads(self, row):
        return [ray.get(actor.loads.remote(row, self.sources[row])) for actor in self.actors]

    def share_tenfold(self, row):
        """Drop the other rows, and share a model with the same number of tensors and ten times the bytes."""
        self.sources = {row: self.sources[row]}
        model = model_without_weights(TENFOLD_HIDDEN).to_empty(device="cpu")
        self.sources["tenfold"] = [PREPARE[row](model)]
        return sum(tensor.nbytes for tensor in model.state_dict().values()), len(model.state_dict())

    def loads_tenfold(self, row):
        """Load the base and the tenfold model in turns, in one actor."""
        return [ray.get(self.actors[0].loads.remote(row, self.sources[size])) for size in (row, "tenfold")]

    def close(self):
        self.sources.clear()
        ray.shutdown()


def serve(folder):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    session = Session(folder)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(session, method)(*arguments)), file=answers, flush=True)


# ---------------------------------------------------------------- taking turns


class Child:
    """The process of a session, as the parent process uses it."""

    def __init__(self, folder, flag):
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"}
        if flag == "on":
            environment["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])

        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--serve", folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("A session ended early. Its error is printed above.")
        return json.loads(line)

    def ask(self, method, *arguments):
        print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
        return self.answer()

    def measure_growth(self, row):
        """Return the peak growth of the driver's heap, in bytes, while it prepares the model.

        The parent process takes the samples. A thread in the driver would wait for the interpreter's lock meanwhile.
        """
        samples = [self.anonymous_bytes()]
        done = threading.Event()

        def sample():
            while not done.is_set():
                samples.append(self.anonymous_bytes())
                time.sleep(0.0005)

        sampler = threading.Thread(target=sample)
        sampler.start()
        self.ask("prepare", row)
        done.set()
        sampler.join()
        return max(samples) - samples[0]

    def anonymous_bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * os.sysconf("SC_PAGESIZE")

    def close(self):
        self.ask("close")
        self.process.stdin.close()
        self.process.wait(30)


def measure(rounds, tenfold):
    results = {row: {"prepare": [], "growth": [], "first": [], "loads": [], "private": []} for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {flag: Child(folder, flag) for flag in ("off", "on")}
        for child in sessions.values():
            child.answer()
        facts = {"nbytes": sessions["off"].ask("nbytes"), "tensors": sessions["off"].ask("tensors")}
        expected = sessions["off"].ask("expected")

        def settle():
            time.sleep(1.2)  # Ray frees dropped objects once a second
            for child in sessions.values():
                child.ask("settle")

        settle()
        for number in range(rounds + 1):
            # The order is reversed each round, so that no row always follows the same row. The slow row runs once.
            for row in (IN_STORE + IN_STORE[1:])[:: 1 if number % 2 else -1]:
                seconds = sessions[ROWS[row]].ask("prepare", row)
                if number:  # the first round warms up
                    results[row]["prepare"].append(seconds)
            settle()
        for row in IN_STORE:
            results[row]["growth"].append(sessions[ROWS[row]].measure_growth(row))
            settle()
        for row, flag in ROWS.items():
            sessions[flag].ask("share", row)
            results[row]["first"], checksums, private = sessions[flag].ask("first", row)
            results[row]["private"].append(sum(private))
            if row != FLOOR and any(abs(value - expected) > 1e-6 * expected for value in checksums):
                sys.exit(f"{row}: the loaded models give the checksums {checksums}, the source gives {expected}.")
        for _ in range(rounds):
            for row, flag in ROWS.items():
                for seconds in sessions[flag].ask("loads", row):
                    results[row]["loads"] += seconds
        for row in (OURS, FLAG) if tenfold else ():
            child = sessions[ROWS[row]]
            facts["tenfold nbytes"], facts["tenfold tensors"] = child.ask("share_tenfold", row)
            pairs = [child.ask("loads_tenfold", row) for _ in range(25)]
            results[row]["tenfold"] = [[s for pair in pairs[1:] for s in pair[size]] for size in (0, 1)]
            child.close()  # the next session needs the memory of its store
        if not tenfold:
            for child in sessions.values():
                child.close()
    return results, facts


# ---------------------------------------------------------------- the table


def median(values, scale=1.0):
    return statistics.median(values) * scale if values else None


def format_value(value, form):
    return "" if value is None else format(value, form)


def report(results, facts, seconds):
    print(
        f"BERT-base, random weights, {facts['nbytes'] / MIB:.1f} MiB in {facts['tensors']} tensors; CPU, one thread"
    )
    print(describe({"versions": versions(), "machine": machine()}))
    ours, plain = ([len(results[row][figure]) for figure in ("prepare", "loads")] for row in (OURS, PLAIN))
    print(f"medians of {ours[0]} prepares and {ours[1]} loads ({PLAIN}: {plain[0]} and {plain[1]}); ", end="")
    print(f"{seconds:.0f} s in total\n")
    head = ["", "prepare s", "driver growth", "first load ms", "load ms", f"{ACTORS} actors, private MiB"]
    rows = [head]
    for row, r in results.items():
        growth = median(r["growth"], 1 / facts["nbytes"])
        rows.append(
            [
                row,
                format_value(median(r["prepare"]), ".3f"),
                "" if growth is None else f"{growth:.2f}x",
                format_value(median(r["first"], 1e3), ".1f"),
                format_value(median(r["loads"], 1e3), ".2f"),
                format_value(median(r["private"], 1 / MIB), ".0f"),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print(
        f"{FLOOR}: the lower bound, the same bytes as numpy arrays. Its actors sum the arrays; others call the model."
    )
    print("private: what four actors gain by the load, including the scratch memory of one forward in each\n")

    def ratio(figure, row, other):
        return median(results[row][figure]) / median(results[other][figure])

    goals = [
        ("load time relative to Ray's flag", ratio("loads", OURS, FLAG), 0.6),
        (f"prepare time relative to {FLOOR}", ratio("prepare", OURS, FLOOR), 1.25),
    ]
    if "tenfold" in results[OURS]:
        size = facts["tenfold nbytes"] / facts["nbytes"]
        small, large = (median(seconds, 1e3) for seconds in results[OURS]["tenfold"])
        name = (
            f"load with {size:.1f}x the bytes in {facts['tenfold tensors']} tensors ({large:.2f} of {small:.2f} ms)"
        )
        goals.append((name, large / small, 1.2))
    width = max(len(name) for name, *_ in goals)
    summary = []
    for name, value, limit in goals:
        verdict = "yes" if value <= limit else "NO"
        summary.append(f"{name.ljust(width)}  {value:5.2f}x  goal: {limit:.2f}x  {verdict}")
    more = median(results[NAMED]["loads"], 1e3) - median(results[OURS]["loads"], 1e3)
    name = "a load by name minus a load without a name"
    summary.append(f"{name.ljust(width)}  {more:5.2f} ms goal: 0.20 ms {'yes' if more <= 0.2 else 'NO'}")
    print("\n".join(summary))
    if "tenfold" in results[FLAG]:
        small, large = (median(seconds, 1e3) for seconds in results[FLAG]["tenfold"])
        print(f"  (the same with Ray's flag: {large / small:.2f}x, {large:.2f} of {small:.2f} ms)")

    print("\nwhere ray_zerocopy loses:")
    losses = []
    for figure, label in (
        ("prepare", "prepare"),
        ("growth", "driver growth"),
        ("first", "first load"),
        ("loads", "load"),
        ("private", "private memory"),
    ):
        ours = median(results[OURS][figure])
        for row, r in results.items():
            # A difference within 5%, or within one MiB per actor, is a tie.
            if row in (OURS, NAMED) or not r[figure]:
                continue
            theirs = median(r[figure])
            slack = ACTORS * MIB if figure in ("growth", "private") else 0.05 * theirs
            if ours <= theirs + slack:
                continue
            unit, scale = ("MiB", 1 / MIB) if figure in ("growth", "private") else ("ms", 1e3)
            losses.append(f"{label}: {ours * scale:.1f} {unit}, {row} {theirs * scale:.1f} {unit}")
    print("\n".join(f"  {line}" for line in losses) or "  nowhere in this run")
    print("  the weights must fit into the object store; a checkpoint on disk needs no store and no driver")
    return [*summary, *(f"loses: {line}" for line in losses)]


def figures(results, facts):
    """Return the medians of all rows: seconds, bytes a byte of the model, milliseconds, MiB."""
    found = {}
    for row, r in results.items():
        found[row] = {
            "prepare_s": median(r["prepare"]),
            "driver_growth": median(r["growth"], 1 / facts["nbytes"]),
            "first_load_ms": median(r["first"], 1e3),
            "load_ms": median(r["loads"], 1e3),
            "private_mib": median(r["private"], 1 / MIB),
        }
        if "tenfold" in r:
            found[row]["tenfold_ms"] = [median(seconds, 1e3) for seconds in r["tenfold"]]
    return {"rows": found, "mib": facts["nbytes"] / MIB, **facts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row (default 5)")
    parser.add_argument("--quick", action="store_true", help="three rounds, and no tenfold model")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    begin = time.perf_counter()
    results, facts = measure(3 if options.quick else options.rounds, tenfold=not options.quick)
    summary = report(results, facts, time.perf_counter() - begin)
    write_json(options.json, figures(results, facts), summary)


if __name__ == "__main__":
    main()
