"""Test every promise with every model of `tests/models.py`."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from describe import describe, storage_bytes
from models import BAKED, CALLABLE, CASES, NAMES, PACKED, SCRIPTED, call
from torch import nn

from ray_zerocopy import load_model_in_actor, memory, prepare_model_for_actors
from ray_zerocopy._model import graph, layout, paths
from ray_zerocopy._model.tensors import components
from ray_zerocopy._store.fetch import fetch

SHARED: dict[str, tuple[Any, Any]] = {}


@pytest.fixture
def shared(ray_session: None, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return the named source model and its ModelRef. Each is made once."""
    name = request.getfixturevalue("name")
    if name not in SHARED:
        source = CASES[name].make()
        SHARED[name] = source, prepare_model_for_actors(source)
    return SHARED[name]


def is_eval(model: Any) -> bool:
    """Tell whether no module of the graph is in train mode and no tensor requires a gradient."""
    parts = [part for _, part in paths.walk(model)]
    modules = [p for p in parts if isinstance(p, torch.nn.Module) and not isinstance(p, torch.fx.GraphModule)]
    return not any(getattr(p, "training", False) for p in modules) and not any(
        p.requires_grad for p in parts if isinstance(p, torch.Tensor)
    )


@pytest.mark.parametrize("name", NAMES)
def test_loads_equal_with_flags(name: str, shared: tuple[Any, Any]) -> None:
    """With keep_flags the loaded graph has the source's types, values, strides, ties, modes and requires_grad."""
    source, ref = shared
    assert describe(load_model_in_actor(ref, keep_flags=True)) == describe(source)


@pytest.mark.parametrize("name", NAMES)
def test_loads_in_eval_mode(name: str, shared: tuple[Any, Any]) -> None:
    """By default modules are in eval mode, no tensor requires a gradient, and the rest equals the source."""
    source, ref = shared
    loaded = load_model_in_actor(ref)
    assert is_eval(loaded)
    assert describe(loaded, flags=False) == describe(source, flags=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_load_is_as_the_first(name: str, shared: tuple[Any, Any]) -> None:
    """Four loads that are alive in one process all equal the source and share no memory, with flags and without."""
    source, ref = shared
    for flags in (True, False):
        loads = [load_model_in_actor(ref, keep_flags=flags) for _ in range(4)]
        expected = describe(source, flags=flags)
        assert all(describe(loaded, flags=flags) == expected for loaded in loads)
        assert all(is_eval(loaded) for loaded in loads) or flags
        assert not any(one & two for one, two in itertools.combinations(map(addresses, loads), 2))


def addresses(model: Any) -> set[int]:
    """Return the addresses of a model's tensors, without graph constants, which all loads of a process share."""
    return {
        piece.data_ptr()
        for path, part in paths.walk(model)
        if isinstance(part, torch.Tensor) and "<constant" not in path
        for piece in components(part)
        if piece.numel()
    }


@pytest.mark.parametrize("name", CALLABLE)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_computes_the_same(name: str, mode: str, shared: tuple[Any, Any]) -> None:
    """In eval and in train mode the outputs equal the source's, bit for bit."""
    _, ref = shared
    twin = CASES[name].make().train(mode == "train")
    loaded = load_model_in_actor(ref).train(mode == "train")
    expected, got = call(twin, name), call(loaded, name)
    assert len(expected) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_stores_each_storage_once(name: str, shared: tuple[Any, Any]) -> None:
    """The store has the bytes of the distinct storages, and at most `ALIGNMENT` bytes of padding for each."""
    source, ref = shared
    bodies = fetch(ref).bodies
    stored = sum(memoryview(buffer).nbytes for body in bodies for buffer in body["buffers"])
    assert stored == ref.nbytes
    parts = graph.take_apart(source)
    distinct = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parts.tensors}
    arrays = sum(array.raw().nbytes for array in parts.arrays)
    padding = layout.ALIGNMENT * (len(distinct) + len(parts.arrays))
    assert stored <= sum(distinct.values()) + arrays + padding
    if name not in BAKED:
        assert stored <= storage_bytes(source) + arrays + padding


def locations(ref: Any) -> list[Any]:
    """Load the model and return the location and size of each tensor."""
    model = load_model_in_actor(ref)
    tensors = [part for _, part in paths.walk(model) if isinstance(part, torch.Tensor)]
    return [(memory.location(t), t.numel()) for tensor in tensors for t in components(tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_is_really_shared(name: str, shared: tuple[Any, Any], two_actors: list[Any]) -> None:
    """Every tensor with bytes is at the same device, inode and offset in two actors."""
    _, ref = shared
    if name in PACKED:
        report = memory.model_memory(ref)
        assert report.private >= 4 * 3 * 3 * 3  # int8 weights of the smallest layer
        assert any("_packed_params" in path for path, _ in report.largest_private)
        return
    one, two = ray.get([actor.run.remote(locations, ref) for actor in two_actors])
    assert one == two
    assert len(one) > 0
    assert all(where is not None for where, numel in one if numel)


def test_sharing_is_told_from_copying(two_actors: list[Any]) -> None:
    """`memory.location` is None for a model that the actor copied: the negative control."""

    def copied(ref: Any) -> list[Any]:
        model = copy.deepcopy(load_model_in_actor(ref))
        return [memory.location(p) for p in model.parameters()]

    ref = prepare_model_for_actors(CASES["large_layers"].make())
    assert all(where is None for where in ray.get(two_actors[0].run.remote(copied, ref)))


@pytest.mark.parametrize("name", NAMES)
def test_writes_stay_private(name: str, shared: tuple[Any, Any]) -> None:
    """A write to every byte of a loaded model changes no other load and not the source."""
    source, ref = shared
    before = describe(source)
    writer = load_model_in_actor(ref)
    other = load_model_in_actor(ref, keep_flags=True)
    for _, part in paths.walk(writer):
        if isinstance(part, torch.Tensor):
            for tensor in components(part):
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(17)
    assert describe(source) == before
    assert describe(other) == before
    assert describe(load_model_in_actor(ref, keep_flags=True)) == before


@pytest.mark.parametrize("name", ["exported_program"])
def test_exported_programs_in_threads(name: str, shared: tuple[Any, Any]) -> None:
    """Several threads can load exported programs at the same time."""
    with switching_often(), ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(load_model_in_actor, [shared[1]] * 12))
    assert {str(program.graph_signature) for program in loaded} == {str(loaded[0].graph_signature)}


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Switch threads every 10 us."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_graph_modules_in_threads(ray_session: None) -> None:
    """Several threads can load GraphModules at the same time, and each gets the right code."""
    sources = [torch.fx.symbolic_trace(nn.Sequential(*[nn.ReLU()] * n)) for n in range(1, 5)]
    refs = [prepare_model_for_actors(source) for source in sources]
    with switching_often(), ThreadPoolExecutor(len(refs)) as threads:
        loaded = list(threads.map(load_model_in_actor, refs * 10))
    assert [model.code for model in loaded] == [source.code for source in sources] * 10


class Calls(nn.Module):
    """Calls all kinds of functions: Python, C, an operator, one that torch dispatches between two, a method."""

    def forward(self, x: torch.Tensor, scale: float = 2.0, *rest: torch.Tensor) -> tuple[torch.Tensor, Any]:
        pooled = torch.nn.functional.max_pool2d(x, kernel_size=2)
        summed = torch.ops.aten.add.Tensor(pooled, pooled[..., :1])
        parts = torch.chunk(summed.to(torch.float64), 2, dim=-1)
        return torch.cat([parts[1], parts[0]]) * scale, {"gelu": torch.nn.functional.gelu(x), "rest": rest}


def test_graph_modules_load_while_others_are_called(ray_session: None) -> None:
    """Loading GraphModules does not disturb a model that another thread calls."""
    source = torch.fx.symbolic_trace(nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)], nn.ReLU()))
    ref = prepare_model_for_actors(source)
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    loaded = threading.Event()

    def call() -> int:
        calls = 0
        while not loaded.is_set():
            assert type(other(torch.ones(1, 4))) is torch.Tensor
            calls += 1
        return calls

    with switching_often(), ThreadPoolExecutor(1) as threads:
        called = threads.submit(call)
        try:
            for _ in range(30):
                load_model_in_actor(ref)
        finally:
            loaded.set()
        assert called.result() > 0


def test_the_calls_of_a_graph_module(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load restores all functions, names, types and constants of a GraphModule without tracing it."""
    source = torch.fx.symbolic_trace(Calls())
    ref = prepare_model_for_actors(source)
    monkeypatch.setattr(torch.fx.Tracer, "trace", None)
    loaded = load_model_in_actor(ref)
    assert loaded.code == source.code
    assert [(n.op, n.target, n.name, n.type) for n in loaded.graph.nodes] == [
        (n.op, n.target, n.name, n.type) for n in source.graph.nodes
    ]
    x = torch.rand(1, 1, 4, 8)
    (result, others), (expected, known) = loaded(x), source(x)
    assert torch.equal(result, expected)
    assert torch.equal(others["gelu"], known["gelu"])


def copied(model: Any) -> Any:
    """Describe a deep copy, or return torch's error message."""
    try:
        return describe(copy.deepcopy(model))
    except (RuntimeError, ValueError) as refusal:
        return str(refusal)


def saved(model: Any) -> tuple[Any, int]:
    """Describe the model after torch.save and torch.load, and return the file's size; or return torch's error."""
    stream = io.BytesIO()
    try:
        torch.save(model, stream)
        length = stream.tell()
        stream.seek(0)
        return describe(torch.load(stream, weights_only=False)), length
    except (RuntimeError, ValueError, TypeError, AttributeError, pickle.PicklingError) as refusal:
        return re.sub("0x[0-9a-f]+", "", str(refusal)), 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*LeafSpec:FutureWarning")
def test_can_be_copied_and_saved(name: str, shared: tuple[Any, Any]) -> None:
    """Deepcopy and torch.save give the same result for a loaded model as for the source, and files of one size."""
    source, ref = shared
    loaded = load_model_in_actor(ref, keep_flags=True)
    expected = copied(source)
    # torch does not copy activations that have a gradient history. A loaded model's activations have none.
    assert copied(loaded) == expected or "graph leaves" in expected
    (expected, most), (got, length) = saved(source), saved(loaded)
    assert got == expected or isinstance(expected, str)
    assert length <= most * 1.02 + 2000 or isinstance(expected, str)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_can_be_shared_again(name: str, shared: tuple[Any, Any]) -> None:
    """A loaded model can be prepared again. It takes as many bytes, and its load equals the source."""
    source, ref = shared
    again = prepare_model_for_actors(load_model_in_actor(ref, keep_flags=True))
    # The store also has TorchScript's code, whose length depends on the numbers that torch gives to classes.
    assert abs(again.nbytes - ref.nbytes) <= (1024 if name in SCRIPTED else 0)
    assert describe(load_model_in_actor(again, keep_flags=True)) == describe(source)
