"""What a call of a model as a Ray task costs: beside an empty task, beside the forward alone, warm and first.

    python benchmarks/task_overhead.py            # about two minutes on two cores

BERT-base with random weights, one short input, one thread. Tasks run one after the other on one Ray CPU, so that one
worker process serves all of them. Each round does each row once, in an order of its own, with a short pause before
each, as sporadic calls have; the row "back to back" is without pauses. Figures are medians over the rounds, in ms. An
overhead is taken within its round, and the median over those. Needs transformers.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time

import ray
import torch
import transformers

import ray_zerocopy as rz
from ray_zerocopy.invoke import call_model, rewrite_pipeline

TOKENS = 16


def empty(model_ref, args, kwargs):
    return None


def forward_here(model_ref, args, kwargs):
    """Time the forward alone in a worker that has the model, as an actor would have it."""
    import builtins

    model = getattr(builtins, "_benchmark_model", None)
    if model is None:
        model = builtins._benchmark_model = rz.load_model_in_actor(model_ref)
        with torch.inference_mode():
            model(*args, **kwargs)
    begin = time.perf_counter()
    with torch.inference_mode():
        model(*args, **kwargs)
    return time.perf_counter() - begin


class Actor:
    def __init__(self, model_ref):
        self.model = rz.load_model_in_actor(model_ref)

    def call(self, args, kwargs):
        with torch.inference_mode():
            return self.model(*args, **kwargs)


def pid(_=None):
    return os.getpid()


def timed(function, pause=0.03):
    time.sleep(pause)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1000


def ms(values):
    return f"{statistics.median(values):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--firsts", type=int, default=5, help="fresh worker processes for the first call")
    options = parser.parse_args()

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        num_cpus=1, include_dashboard=False, object_store_memory=2 << 30, logging_level="error", log_to_driver=False
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig()).eval()
    model_ref = rz.prepare_model_for_actors(model)
    rewritten = rewrite_pipeline(model)
    data = {"input_ids": torch.randint(0, 30000, (1, TOKENS))}
    empty_task = ray.remote(empty)
    forward_task = ray.remote(forward_here)
    pid_task = ray.remote(pid)
    actor = ray.remote(num_cpus=0)(Actor).remote(model_ref)
    expected = model(**data).last_hidden_state
    got = ray.get(call_model.remote(model_ref, (), data)).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-5)

    rows = {
        "empty task, same arguments": lambda: ray.get(empty_task.remote(model_ref, (), data)),
        "call_model, warm": lambda: ray.get(call_model.remote(model_ref, (), data)),
        "rewritten.model, warm": lambda: rewritten(**data),
        "a call of an actor that has the model": lambda: ray.get(actor.call.remote((), data)),
    }
    alone = "the forward alone, in a worker"
    times = {row: [] for row in [*rows, alone]}
    over = {row: [] for row in rows}
    processes = set()
    for number in range(options.rounds + 3):
        order = random.sample(list(rows), len(rows))
        turn = {row: timed(rows[row]) for row in order}
        turn[alone] = ray.get(forward_task.remote(model_ref, (), data)) * 1000
        processes.add(ray.get(pid_task.remote()))
        if number < 3:  # not yet warm
            continue
        for row, value in turn.items():
            times[row].append(value)
        for row in rows:
            over[row].append(turn[row] - turn["empty task, same arguments"] - turn[alone])

    # Back to back: the next call comes while the last one's memory is still being made clean.
    tight = [timed(rows["call_model, warm"], pause=0) for _ in range(options.rounds + 3)][3:]
    floor = statistics.median(times["empty task, same arguments"]) + statistics.median(times[alone])

    first, load, again = [], [], []
    for number in range(options.firsts):
        # Another environment is another worker process; a task of its own before, so that its start does not count.
        environment = {"env_vars": {"BENCHMARK_PROCESS": str(number)}}
        ray.get(pid_task.options(runtime_env=environment).remote())
        ray.get(empty_task.options(runtime_env=environment).remote(model_ref, (), data))
        ray.get(ray.remote(import_model).options(runtime_env=environment).remote())
        load.append(ray.get(ray.remote(load_and_touch).options(runtime_env=environment).remote(model_ref, data)))
        fresh = {"env_vars": {"BENCHMARK_PROCESS": f"{number} again"}}
        ray.get(ray.remote(import_model).options(runtime_env=fresh).remote())
        ray.get(empty_task.options(runtime_env=fresh).remote(model_ref, (), data))
        warm = call_model.options(runtime_env=fresh)
        first.append(timed(lambda warm=warm: ray.get(warm.remote(model_ref, (), data))))
        time.sleep(0.1)
        again.append(timed(lambda warm=warm: ray.get(warm.remote(model_ref, (), data))))

    print(
        f"BERT-base, {model_ref!r}; input of {TOKENS} tokens; one thread; "
        f"{os.cpu_count()} cores {platform.machine()}; ray {ray.__version__}, torch {torch.__version__}, "
        f"{options.rounds} rounds in {len(processes)} process(es)\n"
    )
    print("| | ms | beyond empty task + forward, ms |\n|---|---|---|")
    print(f"| {alone} | {ms(times[alone])} | |")
    for row in rows:
        print(f"| {row} | {ms(times[row])} | {'' if row.startswith('empty') else ms(over[row])} |")
    print(f"| call_model, back to back | {ms(tight)} | {statistics.median(tight) - floor:.2f} |")
    print(f"| load and first forward in a fresh process, as an actor does | {ms(load)} | |")
    print(f"| call_model, first in a fresh process | {ms(first)} | |")
    print(f"| call_model, second in that process | {ms(again)} | |")


def import_model():
    """Import what the model's class needs, and run a first small operation."""
    import transformers  # noqa: F401
    from transformers import BertModel  # noqa: F401

    import ray_zerocopy.invoke  # noqa: F401

    torch.ones(8, 8) @ torch.ones(8, 8)


def load_and_touch(model_ref, data):
    begin = time.perf_counter()
    model = rz.load_model_in_actor(model_ref)
    with torch.inference_mode():
        model(**data)
    return (time.perf_counter() - begin) * 1000


if __name__ == "__main__":
    main()
