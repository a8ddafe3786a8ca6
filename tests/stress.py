"""Random steps over real Ray; after every step, every live object must have its own numbers.

    python tests/stress.py --seconds 600
    python tests/stress.py --seed 7 --steps 120 --verbose

Processes of several kinds hold models, results, and columns of datasets: this driver, actors, forked children, and a
second driver on the same cluster. Each step changes something in one process: it shares, loads, writes, casts, drops,
forks, exits, kills, or fills the store. Every tensor is filled from a unique number, and `Run` keeps the expected
numbers of every tensor in every process. A seed fixes all choices. It does not fix the timing in Ray.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

if __name__ == "__main__":  # before Ray starts: workers import this file as the module `stress`
    here = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH") or os.path.dirname(here)])
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else the second driver needs a token
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from torch import nn

from ray_zerocopy import ModelLostError, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy.actor import load_pipeline_in_actor, rewrite_pipeline_for_actors
from ray_zerocopy.arrow import column_to_tensor
from ray_zerocopy.invoke import call_model

STORE = 160 << 20
ACTORS = 2
TIMEOUT = 120  # seconds for one answer of another process
FORK = multiprocessing.get_context("fork")

# ---------------------------------------------------------------- numbers


@dataclasses.dataclass(frozen=True)
class Values:
    """The numbers that a tensor must have: a pattern from a unique number, and what was done to it since."""

    unique: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    operations: tuple[tuple[Any, ...], ...] = ()

    def then(self, *operation: Any) -> Values:
        return dataclasses.replace(self, operations=(*self.operations, operation))

    def tensor(self) -> torch.Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        fill(made, self.unique)
        for operation in self.operations:
            made = apply(made, operation)
        return made

    def final_shape(self) -> tuple[int, ...]:
        rows = [operation[2] - operation[1] for operation in self.operations if operation[0] == "rows"]
        return (rows[-1], *self.shape[1:]) if rows else self.shape


@functools.lru_cache(maxsize=1)
def pattern(count: int) -> torch.Tensor:
    return torch.arange(count) % 251


def fill(tensor: torch.Tensor, unique: int) -> None:
    """Write the pattern of a number: exact in float32 for numbers below 65536."""
    count = tensor.numel()
    tensor.copy_((pattern(1 << 22)[:count] + unique % 65536 * 256).view(tensor.shape))


def apply(tensor: torch.Tensor, operation: tuple[Any, ...]) -> torch.Tensor:
    """Apply an operation, in place where it is a write: to the tensor under test and to the expected one."""
    match operation:
        case ("set", position, value):
            tensor.view(-1)[position] = value
        case ("fill", first, last, value):
            tensor[first:last] = value
        case ("add", value):
            tensor.add_(value)
        case ("rows", first, last):
            return tensor[first:last]
        case ("to", dtype):
            return tensor.to(dtype)
    return tensor


def differences(held: object, expected: dict[str, Values]) -> list[str]:
    """Say in which tensors a held object differs from what is expected."""
    found = tensors_of(held)
    if found.keys() != expected.keys():
        return [f"has tensors {sorted(found)}, not {sorted(expected)}"]
    said = []
    for name, values in expected.items():
        right, tensor = values.tensor(), found[name].detach()
        if tensor.dtype != right.dtype or tensor.shape != right.shape:
            said.append(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {right.dtype} {tuple(right.shape)}")
        elif not torch.equal(tensor, right):
            wrong = (tensor != right).view(-1).nonzero().view(-1)
            first = int(wrong[0])
            said.append(
                f"{name!r} of {values.unique}: {len(wrong)} of {right.numel()} numbers differ; number {first} is "
                f"{tensor.reshape(-1)[first].item()}, not {right.reshape(-1)[first].item()}"
            )
    return said


def tensors_of(held: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a held object: a module, a dictionary, a tensor or an array."""
    if isinstance(held, nn.Module):
        return {prefix + name: tensor for name, tensor in held.state_dict(keep_vars=True).items()}
    if isinstance(held, dict):
        return {key: tensor for name in held for key, tensor in tensors_of(held[name], f"{prefix}{name}.").items()}
    return {prefix: held if isinstance(held, torch.Tensor) else torch.from_numpy(held)}  # type: ignore[arg-type]


# ---------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build: a kind, sizes, and the number of its first tensor."""

    kind: str
    width: int
    height: int
    unique: int

    def build(self) -> Any:
        model = Model(self.width, self.height)
        if self.kind == "model":
            return model
        return {"model": model, "table": np.empty((self.height, 64), np.float32), "labels": ["no", "yes"]}

    def filled(self) -> Any:
        built = self.build()
        with torch.no_grad():
            for number, tensor in enumerate(self.tensors(built).values()):
                fill(tensor, self.unique + number)
        return built

    def values(self) -> dict[str, Values]:
        with torch.device("meta"):
            tensors = self.tensors(self.build())
        return {
            name: Values(self.unique + number, tuple(tensor.shape), tensor.dtype)
            for number, (name, tensor) in enumerate(tensors.items())
        }

    @staticmethod
    def tensors(built: Any) -> dict[str, torch.Tensor]:
        return tensors_of({k: v for k, v in built.items() if k != "labels"} if isinstance(built, dict) else built)


class Model(nn.Module):
    """Large and small tensors of two dtypes, and methods that return weights or write to them."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, height), nn.BatchNorm1d(height), nn.Linear(height, 32))

    def weight(self, name: str) -> torch.Tensor:
        return self.get_parameter(name)

    def add(self, name: str, value: float) -> torch.Tensor:
        return self.get_parameter(name).add_(value)

    def everything(self) -> dict[str, torch.Tensor]:
        return dict(self.state_dict())


# ---------------------------------------------------------------- in every process


class Holder:
    """What one process holds, and what it can do with it; the same code in drivers, actors and forked children."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        self.items: dict[int, Any] = {}
        self.handles: dict[int, tuple[Any, Any]] = {}
        self.children: dict[int, tuple[Connection, int, Any]] = {}

    # ------------------------------------------------------------ with Ray

    def connect(self, address: str) -> None:
        ray.init(address=address, logging_level="error", log_to_driver=False)

    def end_session(self) -> None:
        ray.shutdown()

    def share(self, handle: int, plan: Plan) -> None:
        if plan.kind == "model":
            self.handles[handle] = (None, prepare_model_for_actors(plan.filled()))
        else:
            self.handles[handle] = rewrite_pipeline_for_actors(plan.filled())

    def give(self, handle: int, how: str) -> Any:
        value = {"nested": [self.handles[handle]]}
        if how == "put":
            return [ray.put(value)]
        return ray.cloudpickle.dumps(value) if how == "pickled" else value

    def take(self, handle: int, how: str, given: Any) -> None:
        if how == "put":
            given = ray.get(given[0])
        elif how == "pickled":
            given = ray.cloudpickle.loads(given)
        self.handles[handle] = given["nested"][0]

    def load(self, item: int, handle: int, dtype: torch.dtype | None = None) -> None:
        self.items[item] = load(self.handles[handle], dtype)

    def is_lost(self, handle: int, expected: dict[str, Values]) -> list[str]:
        """Say what is wrong with a handle whose owner is gone: it may lead to its model or raise ModelLostError."""
        try:
            return differences(load(self.handles.pop(handle)), expected)
        except ModelLostError:
            return []

    def call(self, item: int, handle: int, method: str, args: tuple[Any, ...]) -> None:
        self.items[item] = ray.get(call_model.remote(self.handles[handle][1], args, None, method), timeout=TIMEOUT)

    def take_column(self, item: int, block: list[Any]) -> None:
        self.items[item] = column_to_tensor(ray.get(block[0]), "x")

    def put_and_drop(self, sizes: list[int], kept: int) -> None:
        """Put arrays into the store, of which the last `kept` live at a time."""
        refs: collections.deque[Any] = collections.deque(maxlen=kept)
        for number, size in enumerate(sizes):
            refs.append(ray.put(np.full(size, number % 199 + 7, np.uint8)))

    # ------------------------------------------------------------ without Ray

    def pid(self) -> int:
        return os.getpid()

    def check(self, items: dict[int, dict[str, Values]], handles: dict[int, dict[str, Values]]) -> list[str]:
        said = [f"process {os.getpid()} holds {sorted(self.items)}"] * (self.items.keys() != items.keys())
        for item, expected in items.items():
            said += [f"item {item}: {text}" for text in differences(self.items[item], expected)]
        for handle, expected in handles.items():
            said += [f"handle {handle}: {text}" for text in differences(load(self.handles[handle]), expected)]
        return said

    def write(self, item: int, name: str, operation: tuple[Any, ...]) -> None:
        with torch.no_grad():
            apply(tensors_of(self.items[item])[name], operation)

    def cast(self, item: int, dtype: torch.dtype) -> None:
        self.items[item].to(dtype) if dtype != torch.bfloat16 else self.items[item].bfloat16()

    def assign(self, item: int, values: dict[str, Values]) -> None:
        state = {name: value.tensor() for name, value in values.items()}
        self.items[item].load_state_dict(state, strict=False, assign=True)

    def set_none(self, item: int, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.items[item].get_submodule(path), leaf, None)

    def narrow(self, item: int, name: str, operation: tuple[Any, ...], as_array: bool) -> None:
        """Keep a part of one tensor and let the rest of the object go."""
        tensor = apply(tensors_of(self.items[item])[name].detach(), operation)
        self.items[item] = tensor.numpy() if as_array else tensor

    def drop(self, item: int) -> None:
        del self.items[item]

    def drop_handle(self, handle: int) -> None:
        del self.handles[handle]

    def collect(self) -> None:
        gc.collect()

    # ------------------------------------------------------------ children

    def fork(self, child: int, how: str) -> None:
        """Fork a child that holds what this process holds, and serves the same commands until it exits."""
        ours, theirs = multiprocessing.Pipe()
        if how == "multiprocessing":
            process = FORK.Process(target=self._serve_as_child, args=(theirs, ours))
            process.start()
            self.children[child] = ours, process.pid or 0, process
        else:
            pid = os.fork()
            if pid == 0:
                try:
                    self._serve_as_child(theirs, ours)
                finally:
                    os._exit(0)
            self.children[child] = ours, pid, None
        theirs.close()

    def _serve_as_child(self, connection: Connection, other: Connection) -> None:
        for theirs in [other, *(child for child, _, _ in self.children.values())]:
            theirs.close()
        self.children = {}
        serve(self, connection)

    def end_child(self, child: int, how: str) -> None:
        connection, pid, process = self.children.pop(child)
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
        else:
            connection.send(((), how, ()))
        process.join(TIMEOUT) if process is not None else os.waitpid(pid, 0)
        connection.close()

    def leave(self) -> None:
        raise SystemExit

    def leave_empty(self) -> None:
        self.items.clear()
        self.handles.clear()
        gc.collect()
        raise SystemExit

    def ask(self, path: tuple[int, ...], method: str, args: tuple[Any, ...]) -> Any:
        """Run a method here, or in the child to which `path` leads."""
        if not path:
            return getattr(self, method)(*args)
        return ask(self.children[path[0]][0], path[1:], method, args)


def load(handle: tuple[Any, Any], dtype: torch.dtype | None = None) -> Any:
    skeleton, ref = handle
    if skeleton is None:
        return load_model_in_actor(ref, "cpu", dtype=dtype)
    pipeline = load_pipeline_in_actor(skeleton, ref, "cpu", dtype=dtype)
    assert pipeline.pop("labels") == ["no", "yes"]
    return pipeline


def ask(connection: Connection, path: tuple[int, ...], method: str, args: tuple[Any, ...]) -> Any:
    connection.send((path, method, args))
    if not connection.poll(TIMEOUT):
        raise TimeoutError(f"no answer to {method} in {TIMEOUT} s")
    try:
        failed, answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError(f"the process ended during {method}") from None
    if failed:
        raise RuntimeError(answer)
    return answer


def serve(holder: Holder, connection: Connection) -> None:
    """Answer the commands that come through a connection, until it is closed."""
    while True:
        try:
            path, method, args = connection.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            answer: Any = False, holder.ask(path, method, args)
        except SystemExit:
            return
        except BaseException:
            answer = True, traceback.format_exc()
        connection.send(answer)


@ray.remote
def use_in_task(given: dict[str, Any], expected: dict[str, Values], fork: bool) -> list[str]:
    """Load in a task worker, which may have warm models, let a child use the model and exit, and check it."""
    holder = Holder()
    holder.handles[0] = given["nested"][0]
    holder.load(0, 0)
    if fork:
        holder.fork(1, "os.fork")
        holder.ask((1,), "drop", (0,))
        holder.put_and_drop([4 << 20] * 8, kept=2)
        holder.end_child(1, "leave_empty")
    holder.put_and_drop([4 << 20] * 8, kept=2)
    return holder.check({0: expected}, {})


@ray.remote
def hand_on(given: Any) -> Any:
    return given


# ---------------------------------------------------------------- the expected state


@dataclasses.dataclass
class Item:
    """An object that a process holds."""

    kind: str
    values: dict[str, Values]


class Place:
    """A process that holds objects, and what it must hold."""

    def __init__(self, name: str, path: tuple[int, ...] = ()) -> None:
        self.name = name
        self.path = path
        self.items: dict[int, Item] = {}
        self.handles: set[int] = set()
        self.uses_ray = not path

    def start(self, method: str, args: tuple[Any, ...]) -> Callable[[], Any]:
        """Send a command, and return a function that waits for the answer."""
        raise NotImplementedError

    def ask(self, method: str, *args: Any) -> Any:
        return self.start(method, args)()


class HerePlace(Place):
    """The driver of the test, or a forked child of it."""

    def __init__(self, name: str, holder: Holder, path: tuple[int, ...] = ()) -> None:
        super().__init__(name, path)
        self.holder = holder

    def start(self, method: str, args: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: self.holder.ask(self.path, method, args)

    def child(self, name: str, number: int) -> Place:
        return HerePlace(name, self.holder, (*self.path, number))


class ActorPlace(Place):
    """An actor, or a forked child of one."""

    def __init__(self, name: str, actor: Any = None, path: tuple[int, ...] = ()) -> None:
        super().__init__(name, path)
        self.actor = ray.remote(num_cpus=0)(Holder).remote() if actor is None else actor

    def start(self, method: str, args: tuple[Any, ...]) -> Callable[[], Any]:
        answer = self.actor.ask.remote(self.path, method, args)
        return lambda: ray.get(answer, timeout=TIMEOUT)

    def child(self, name: str, number: int) -> Place:
        return ActorPlace(name, self.actor, (*self.path, number))


class DriverPlace(Place):
    """A second driver on the same cluster, or a forked child of it."""

    def __init__(self, name: str, connection: Connection | None = None, path: tuple[int, ...] = ()) -> None:
        super().__init__(name, path)
        if connection is None:
            connection, theirs = multiprocessing.Pipe()
            command = [sys.executable, os.path.abspath(__file__), "--second-driver", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
        self.connection = connection

    def start(self, method: str, args: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: ask(self.connection, self.path, method, args)

    def child(self, name: str, number: int) -> Place:
        return DriverPlace(name, self.connection, (*self.path, number))

    def end(self) -> None:
        self.connection.send(((), "leave", ()))
        self.process.wait(TIMEOUT)
        self.connection.close()


class Wrong(Exception):
    """Numbers differ from those expected."""


@dataclasses.dataclass
class Handle:
    """A handle on a shared model or pipeline, and the process that must live for it to lead there."""

    kind: str
    values: dict[str, Values]
    owner: Place


class Run:
    """The state of a run, and its steps. A step returns what it did, or None where it cannot be taken now."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = iter(range(1, sys.maxsize))
        self.driver = HerePlace("driver", Holder())
        self.places: list[Place] = [self.driver]
        self.second: DriverPlace | None = None
        self.handles: dict[int, Handle] = {}
        self.datasets: dict[int, tuple[Any, list[Any], Values]] = {}
        for _ in range(ACTORS):
            self.places.append(ActorPlace(f"actor {next(self.numbers)}"))

    # ------------------------------------------------------------ choices

    def number(self, count: int = 1) -> int:
        """Return the first of `count` numbers that nothing else has."""
        return next(iter([next(self.numbers) for _ in range(count)]))

    def choose(self, places: Iterator[Any]) -> Any:
        found = list(places)
        return self.random.choice(found) if found else None

    def place_for_item(self) -> Place | None:
        """Choose a process that may use Ray and has room for another item."""
        return self.choose(place for place in self.places if place.uses_ray and len(place.items) < 4)

    def any_item(self, *kinds: str) -> tuple[Place, int, Item] | None:
        return self.choose(
            (place, number, item)
            for place in self.places
            for number, item in place.items.items()
            if not kinds or item.kind in kinds
        )

    def any_handle(self, *kinds: str) -> tuple[Place, int, Handle] | None:
        """Choose a handle in a process that has room for another item."""
        return self.choose(
            (place, number, self.handles[number])
            for place in self.places
            if place.uses_ray and len(place.items) < 4
            for number in sorted(place.handles)
            if not kinds or self.handles[number].kind in kinds
        )

    def operation(self, values: Values) -> tuple[Any, ...]:
        """Choose a write to a tensor of these values."""
        shape, value = values.final_shape(), self.random.randrange(1, 200)
        rows = shape[0] if shape else 0
        kind = self.random.choice(["set", "fill", "add"]) if rows else "add"
        if kind == "fill":
            first = self.random.randrange(rows)
            return "fill", first, min(rows, first + self.random.randrange(1, 40)), value
        count = int(np.prod(shape))
        return ("set", self.random.randrange(count), value) if kind == "set" else ("add", value)

    # ------------------------------------------------------------ steps: handles

    def share(self) -> str | None:
        place = self.choose(place for place in self.places if place.uses_ray and len(place.handles) < 5)
        if place is None or len(self.handles) > 8:
            return None
        kind = self.random.choice(["model", "model", "pipeline"])
        plan = Plan(kind, self.random.choice([16, 256, 1024]), self.random.choice([64, 1024, 2048]), self.number(20))
        handle = self.number()
        place.ask("share", handle, plan)
        place.handles.add(handle)
        self.handles[handle] = Handle(kind, plan.values(), place)
        return f"{place.name}: share {kind} {plan.width} x {plan.height} of {plan.unique} as handle {handle}"

    def hand_on(self) -> str | None:
        found = self.choose(
            (giver, taker, handle)
            for giver in self.places
            for taker in self.places
            if giver.uses_ray and taker.uses_ray and self.second not in (giver, taker)
            for handle in sorted(giver.handles - taker.handles)
        )
        if found is None:
            return None
        giver, taker, handle = found
        how = self.random.choice(["nested", "nested", "put", "put", "task", "task", "pickled"])
        given = giver.ask("give", handle, how)
        if how == "task":
            given = ray.get(hand_on.remote(given), timeout=TIMEOUT)
        taker.ask("take", handle, how, given)
        taker.handles.add(handle)
        return f"{giver.name}: give handle {handle} to {taker.name}, {how}"

    def drop_handle(self) -> str | None:
        found = self.choose((p, h) for p in self.places if p.uses_ray for h in sorted(p.handles))
        if found is None:
            return None
        place, handle = found
        place.ask("drop_handle", handle)
        place.handles.remove(handle)
        if not any(handle in place.handles for place in self.places):
            del self.handles[handle]
        return f"{place.name}: drop handle {handle}"

    def task(self) -> str | None:
        found = self.choose((p, h) for p in self.places[:1] for h in sorted(p.handles))
        if found is None:
            return None
        place, handle = found
        fork = self.random.random() < 0.5
        given = place.ask("give", handle, "nested")
        said = ray.get(use_in_task.remote(given, self.handles[handle].values, fork), timeout=TIMEOUT)
        self.require(said)
        return f"a task: load handle {handle}{' and fork' if fork else ''}"

    # ------------------------------------------------------------ steps: what gives an item

    def load(self) -> str | None:
        found = self.any_handle()
        if found is None:
            return None
        place, handle, record = found
        item, values = self.number(), record.values
        dtype = None
        if record.kind == "model" and self.random.random() < 0.15:
            dtype, values = torch.bfloat16, cast(values, torch.bfloat16)
        place.ask("load", item, handle, dtype)
        place.items[item] = Item(record.kind, values)
        return f"{place.name}: load handle {handle} as item {item}{f' in {dtype}' if dtype else ''}"

    def result(self) -> str | None:
        found = self.any_handle("model")
        if found is None:
            return None
        place, handle, record = found
        item = self.number()
        method = self.random.choice(["weight", "weight", "add", "everything"])
        name = self.random.choice(["layers.0.weight", "layers.2.weight"])
        if method == "everything":
            kept, args = Item("results", {f"{key}.": value for key, value in record.values.items()}), ()
        elif method == "add":
            kept, args = Item("tensor", {"": record.values[name].then("add", 3.0)}), (name, 3.0)
        else:
            kept, args = Item("tensor", {"": record.values[name]}), (name,)
        place.ask("call", item, handle, method, args)
        place.items[item] = kept
        return f"{place.name}: call {method}{args} of handle {handle}, and keep the result as item {item}"

    def dataset(self) -> str | None:
        if len(self.datasets) >= 2:
            number = self.random.choice(sorted(self.datasets))
            del self.datasets[number]
            return f"driver: drop dataset {number}"
        values = Values(self.number(), (self.random.choice([100_000, 1_000_000]),))
        made = ray.data.from_arrow(pa.table({"x": values.tensor().numpy()})).materialize()
        number = self.number()
        self.datasets[number] = made, made.to_arrow_refs(), values
        return f"driver: make dataset {number} of {values.unique}"

    def column(self) -> str | None:
        place = self.place_for_item()
        if place is None or place is self.second or not self.datasets:
            return None
        number = self.random.choice(sorted(self.datasets))
        _, blocks, values = self.datasets[number]
        item = self.number()
        place.ask("take_column", item, blocks[:1])
        place.items[item] = Item("tensor", {"": values})
        return f"{place.name}: column of dataset {number} as item {item}"

    # ------------------------------------------------------------ steps: what changes an item

    def write(self) -> str | None:
        found = self.any_item()
        if found is None:
            return None
        place, number, item = found
        name = self.random.choice(sorted(item.values))
        operation = self.operation(item.values[name])
        place.ask("write", number, name, operation)
        item.values = {**item.values, name: item.values[name].then(*operation)}
        return f"{place.name}: {operation} in {name!r} of item {number}"

    def cast(self) -> str | None:
        found = self.any_item("model")
        if found is None:
            return None
        place, number, item = found
        dtype = self.random.choice([torch.bfloat16, torch.bfloat16, torch.float64])
        place.ask("cast", number, dtype)
        item.values = cast(item.values, dtype)
        return f"{place.name}: cast item {number} to {dtype}"

    def assign(self) -> str | None:
        found = self.any_item("model")
        if found is None:
            return None
        place, number, item = found
        names = sorted(item.values)
        names = self.random.sample(names, self.random.choice([len(names), len(names) // 2 + 1]))
        values = {
            name: Values(self.number(), item.values[name].shape, item.values[name].dtype) for name in sorted(names)
        }
        place.ask("assign", number, values)
        item.values = {**item.values, **values}
        return f"{place.name}: load_state_dict(assign=True) of {len(names)} tensors of item {number}"

    def set_none(self) -> str | None:
        found = self.any_item("model")
        if found is None or len(found[2].values) < 2:
            return None
        place, number, item = found
        name = self.random.choice(sorted(item.values))
        place.ask("set_none", number, name)
        item.values = {key: value for key, value in item.values.items() if key != name}
        return f"{place.name}: set {name!r} of item {number} to None"

    def narrow(self) -> str | None:
        found = self.any_item()
        if found is None:
            return None
        place, number, item = found
        name = self.random.choice(sorted(item.values))
        values = item.values[name]
        shape = values.final_shape()
        if not shape or shape[0] < 2:
            return None
        first = self.random.randrange(shape[0] - 1)
        operation = "rows", first, self.random.randrange(first + 1, shape[0] + 1)
        as_array = ("to", torch.bfloat16) not in values.operations and self.random.random() < 0.5
        place.ask("narrow", number, name, operation, as_array)
        place.items[number] = Item("tensor", {"": values.then(*operation)})
        return f"{place.name}: keep {operation} of {name!r} of item {number}{' as an array' if as_array else ''}"

    def drop(self) -> str | None:
        found = self.any_item()
        if found is None:
            return None
        place, number, _ = found
        place.ask("drop", number)
        del place.items[number]
        return f"{place.name}: drop item {number}"

    # ------------------------------------------------------------ steps: processes

    def fork(self) -> str | None:
        parent = self.choose(p for p in self.places if len(p.path) < 2 and p.items and len(self.children(p)) < 2)
        if parent is None or sum(bool(place.path) for place in self.places) >= 4:
            return None
        number, how = self.number(), self.random.choice(["os.fork", "multiprocessing"])
        parent.ask("fork", number, how)
        child = parent.child(f"child {number} of {parent.name}", number)
        child.items = {key: Item(item.kind, item.values) for key, item in parent.items.items()}
        self.places.append(child)
        return f"{parent.name}: fork child {number} by {how}"

    def children(self, parent: Place) -> list[Place]:
        """Return the living children of a process, and theirs."""
        root = parent.name if not parent.path else f"of {parent.name}"
        return [place for place in self.places if place.path and place is not parent and place.name.endswith(root)]

    def end_child(self) -> str | None:
        child = self.choose(place for place in self.places if place.path)
        if child is None:
            return None
        how = self.random.choice(["leave", "leave_empty", "killed"])
        self._end_child(child, how)
        return f"{child.name}: exit, {how}"

    def _end_child(self, child: Place, how: str) -> None:
        for grandchild in self.children(child):
            self._end_child(grandchild, "leave")
        parent = next(p for p in self.places if child.name == f"child {child.path[-1]} of {p.name}")
        parent.ask("end_child", child.path[-1], how)
        self.places.remove(child)

    def kill(self) -> str | None:
        place = self.choose(place for place in self.places if isinstance(place, ActorPlace) and not place.path)
        os.kill(place.ask("pid"), signal.SIGKILL)
        self.places = [p for p in self.places if not (isinstance(p, ActorPlace) and p.actor is place.actor)]
        self.owner_is_gone(place)
        new = ActorPlace(f"actor {self.number()}")
        self.places.insert(1, new)
        return f"{place.name}: SIGKILL; start {new.name}"

    def owner_is_gone(self, owner: Place) -> None:
        """Let go of the handles that only a process that ended held, and of those that it owned."""
        for number, handle in list(self.handles.items()):
            holders = [place for place in self.places if number in place.handles]
            if handle.owner is owner:
                for place in holders:
                    place.handles.remove(number)
                    self.require(place.ask("is_lost", number, handle.values))
            if handle.owner is owner or not holders:
                del self.handles[number]

    def second_driver(self) -> str | None:
        """Let a second driver begin, end its session and go on, begin another session, or exit."""
        if self.second is None:
            self.second = DriverPlace(f"driver {self.number()}")
            self.second.ask("connect", ray.get_runtime_context().gcs_address)
            self.places.append(self.second)
            return f"{self.second.name}: begin"
        name = self.second.name
        if not self.second.uses_ray and self.random.random() < 0.5:
            self.second.ask("connect", ray.get_runtime_context().gcs_address)
            self.second.uses_ray = True
            return f"{name}: begin another session"
        for child in self.children(self.second):
            if child in self.places:
                self._end_child(child, "leave")
        if self.second.uses_ray and self.random.random() < 0.8:
            self.second.ask("end_session")
            self.second.uses_ray = False
            for handle in sorted(self.second.handles):
                del self.handles[handle]
                self.second.ask("drop_handle", handle)
            self.second.handles.clear()
            return f"{name}: ray.shutdown()"
        self.places.remove(self.second)
        self.owner_is_gone(self.second)
        self.second.end()
        self.second = None
        return f"{name}: exit"

    # ------------------------------------------------------------ steps: the store

    def pressure(self) -> str | None:
        place = self.choose(place for place in self.places if place.uses_ray)
        size = self.random.choice([1 << 20, 4 << 20, 9 << 20])
        place.ask("put_and_drop", [size] * (STORE // size), 1 << 20)
        return f"{place.name}: fill the store by {size >> 20} MiB"

    def spill(self) -> str | None:
        self.driver.ask("put_and_drop", [16 << 20] * (2 * STORE // (16 << 20)), 1 << 20)
        return "driver: put twice what the store holds, so that it spills"

    def collect(self) -> str | None:
        place = self.choose(iter(self.places))
        place.ask("collect")
        return f"{place.name}: gc.collect()"

    # ------------------------------------------------------------ the run

    def step(self) -> tuple[str, str]:
        """Take a random step, and return its kind and what was done."""
        while True:
            (kind,) = self.random.choices(list(STEPS), list(STEPS.values()))
            done: str | None = getattr(self, kind)()
            if done is not None:
                self.driver.ask("put_and_drop", [self.random.randrange(1 << 20, 6 << 20) for _ in range(6)], 3)
                return kind, done

    def check(self, with_handles: bool) -> None:
        """Compare every live object of every process with what is expected."""
        answers = []
        for place in self.places:
            items = {number: item.values for number, item in place.items.items()}
            handles = {number: self.handles[number].values for number in sorted(place.handles) if with_handles}
            answers.append((place, place.start("check", (items, handles))))
        said = [f"{place.name}: {text}" for place, answer in answers for text in answer()]
        for number, (_, blocks, values) in self.datasets.items():
            column = np.concatenate([block["x"].to_numpy() for block in ray.get(blocks, timeout=TIMEOUT)])
            said += [f"dataset {number}: {text}" for text in differences(column, {"": values})]
        self.require(said)

    def require(self, said: list[str]) -> None:
        if said:
            raise Wrong("\n".join(said))

    def end(self) -> None:
        for place in [place for place in self.places if len(place.path) == 1]:
            self._end_child(place, "leave")
        if self.second is not None:
            self.second.end()


def cast(values: dict[str, Values], dtype: torch.dtype) -> dict[str, Values]:
    return {k: v.then("to", dtype) if v.dtype.is_floating_point else v for k, v in values.items()}


# Steps by how often they are tried.
STEPS = {
    "share": 8,
    "hand_on": 5,
    "drop_handle": 4,
    "task": 2,
    "load": 12,
    "result": 6,
    "dataset": 2,
    "column": 3,
    "write": 8,
    "cast": 4,
    "assign": 3,
    "set_none": 3,
    "narrow": 3,
    "drop": 7,
    "fork": 5,
    "end_child": 5,
    "kill": 0.7,
    "second_driver": 1.5,
    "pressure": 6,
    "spill": 0.5,
    "collect": 2,
}


def run(seed: int, seconds: float, steps: int, verbose: bool) -> int:
    """Run until the time or the steps are over; return the exit status."""
    history: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    state = Run(seed)
    try:
        while time.monotonic() - begin < seconds and len(history) < steps:
            history.append("(not finished)")
            kind, history[-1] = state.step()
            counts[kind] += 1
            if verbose:
                print(f"{len(history):5d} {time.monotonic() - begin:6.1f} s  {history[-1]}", flush=True)
            state.check(with_handles=len(history) % 8 == 0)
        state.check(with_handles=True)
        state.end()
    except BaseException as error:
        for number, text in enumerate(history, 1):
            print(f"{number:5d} {text}")
        text = str(error) if isinstance(error, Wrong) else traceback.format_exc()
        print(f"{text}\nFAILED: seed {seed}, step {len(history)}, {time.monotonic() - begin:.0f} s", flush=True)
        return 1
    print(", ".join(f"{kind} {counts[kind]}" for kind in STEPS))
    print(f"PASSED: seed {seed}, {len(history)} steps, {time.monotonic() - begin:.0f} s")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="repeat the choices of a run (default: a random seed)")
    parser.add_argument("--seconds", type=float, default=60, help="stop after this time (default: 60)")
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="stop after this many steps")
    parser.add_argument("--verbose", action="store_true", help="print each step")
    parser.add_argument("--second-driver", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if given.second_driver is not None:
        serve(Holder(), Connection(given.second_driver))
        return 0
    seed = random.randrange(1 << 30) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as spilled, contextlib.ExitStack() as stack:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=STORE,
            logging_level="error",
            log_to_driver=False,
            object_spilling_directory=spilled,
            _system_config={"free_objects_batch_size": 1},  # dropped objects make room at once
        )
        stack.callback(ray.shutdown)
        return run(seed, given.seconds, given.steps, given.verbose)


if __name__ == "__main__":
    import stress

    sys.exit(stress.main())
