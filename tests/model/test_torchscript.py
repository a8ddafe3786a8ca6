"""Test TorchScript beyond `tests/models.py`: functions, refused modules, graph constants, and later loads."""

from __future__ import annotations

import enum
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from describe import describe
from models import quietly
from torch import nn

from ray_zerocopy import (
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
)
from ray_zerocopy._model import graph, layout, operators, packing
from ray_zerocopy._model.script import rebuild
from ray_zerocopy._model.script.parts import constant_bytes

CPU = torch.device("cpu")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def scale(x: torch.Tensor, factor: float = 2.5, shift: int | None = None, *, word: str) -> torch.Tensor:
    """Scale `x`. The signature has defaults of several types and a keyword-only argument."""
    if shift is not None:
        x = x + shift
    return x * factor + len(word)


def test_a_function_keeps_its_signature(ray_session: None) -> None:
    """Every load of a scripted function has the names, types, defaults and kinds of its arguments."""
    source = quietly(lambda: torch.jit.script(scale))
    ref = prepare_model_for_actors({"run": source})
    for _ in range(3):
        loaded = load_model_in_actor(ref)["run"]
        assert type(loaded) is torch.jit.ScriptFunction
        assert str(loaded.schema) == str(source.schema)
        assert torch.equal(loaded(X, word="ab"), source(X, word="ab"))
        assert torch.equal(loaded(x=X, shift=3, word="", factor=1.0), X + 3)
    again = load_model_in_actor(prepare_model_for_actors(loaded))
    assert str(again.schema) == str(source.schema)


def bounded(
    x: torch.Tensor, low: float = -math.inf, high: float = math.inf, fill: float = math.nan, to: torch.device = CPU
) -> torch.Tensor:
    """Clamp `x`. The signature has defaults without literals."""
    return x.to(to).clamp(low, high) + torch.tensor([fill])


def test_defaults_without_literals(ray_session: None) -> None:
    """Infinities, nan and devices are kept as defaults."""
    source = quietly(lambda: torch.jit.script(bounded))
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert str(loaded.schema) == str(source.schema)
    assert loaded(X).isnan().all()
    assert torch.equal(loaded(X, fill=0.0), X)


def inner(self: torch.Tensor, by: int = 2) -> torch.Tensor:
    """Scale `self`. The library and TorchScript's archive use the same names internally."""
    return self * by


def of_inner(inner: torch.Tensor, inner_: int = 2) -> torch.Tensor:
    """Scale `inner`. The library uses the names of the arguments internally."""
    return inner * inner_


@pytest.mark.parametrize("function", [inner, of_inner])
def test_any_name_goes(function: Any, ray_session: None) -> None:
    """Functions and arguments keep names that the library uses internally."""
    source = quietly(lambda: torch.jit.script(function))
    ref = prepare_model_for_actors(source)
    for _ in range(3):
        loaded = load_model_in_actor(ref)
        assert str(loaded.schema) == str(source.schema)
        assert torch.equal(loaded(X), X * 2)


class Box:
    """A class to script."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_a_function_of_a_class(ray_session: None) -> None:
    """A function whose types torch cannot read back can be shared if it has no defaults."""
    quietly(lambda: torch.jit.script(Box))

    def plain(box: Box, x: torch.Tensor) -> torch.Tensor:
        return x * box.size

    def with_default(box: Box, by: int = 2) -> int:
        return box.size * by

    def make(size: int) -> Box:
        return Box(size)

    scripted = quietly(lambda: torch.jit.script(plain))
    loaded = load_model_in_actor(prepare_model_for_actors(scripted))
    assert next(a.name for a in loaded.schema.arguments).startswith("box")
    with pytest.raises(TypeError, match=r"defaults would be lost.* a function without defaults"):
        prepare_model_for_actors(quietly(lambda: torch.jit.script(with_default)))


def test_weights_packed_for_mkldnn_are_refused(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that torch.jit.optimize_for_inference packed are refused. The error has the path and the remedy."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    frozen = quietly(lambda: torch.jit.freeze(torch.jit.script(net)))
    ref = prepare_model_for_actors(frozen)
    optimized = quietly(lambda: torch.jit.optimize_for_inference(frozen))
    if "ConstantMKLDNN" not in str(optimized.graph):
        pytest.skip("this build of torch packs nothing for mkldnn")
    monkeypatch.setattr(operators, "has_foreign_operators", lambda: True)  # as after torch.library.custom_op
    with pytest.raises(
        TypeError, match=r"dict\['a'\]\.model .*graph of its forward\(\) has weights packed.*optimize"
    ):
        prepare_model_for_actors({"a": nn.ModuleDict({"model": optimized})})
    x = torch.randn(1, 3, 8, 8)
    loaded = quietly(lambda: torch.jit.optimize_for_inference(load_model_in_actor(ref)))
    assert torch.allclose(loaded(x), net(x), atol=1e-5)


def many_layers() -> nn.Module:
    """Return a model with many objects and few bytes."""
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout()) for _ in range(100)]
    return nn.Sequential(*blocks).eval()


@pytest.mark.parametrize("keep_flags", [False, True])
@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_later_loads_of_many_layers(way: str, keep_flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two loads of 400 modules read the archive. Later loads do not, and give equal modules."""
    reads = []
    read = rebuild.read_module
    monkeypatch.setattr(rebuild, "read_module", lambda *given: reads.append(len(kept)) or read(*given))
    eager = many_layers().train(keep_flags)
    compiled = quietly(
        lambda: torch.jit.script(eager) if way == "scripted" else torch.jit.trace(eager, X, check_trace=False)
    )
    parts = graph.take_apart(compiled)
    packed = packing.pack(parts.tensors, parts.arrays)
    buffers = [(bytearray(buffer.memory()), 0) for buffer in packed.buffers]
    kept: list[Any] = []
    for _ in range(4):
        tensors = layout.unpack(packed.layout, buffers, keep_flags=keep_flags)
        kept.append(graph.put_together(parts.skeleton, tensors, parts.arrays, keep_flags=keep_flags)[0])
    assert reads == [0, 1]
    assert describe(kept[-1], flags=keep_flags) == describe(compiled, flags=keep_flags)


class Says:
    """A class to script, with an attribute that modules have as well."""

    def __init__(self) -> None:
        self.training = True


class Mode(enum.Enum):
    """An enum, which TorchScript pickles in a special way."""

    FAST = 1


class NoFlags(nn.Module):
    """Holds the word training next to True without being a flag, and flags in unusual tensors."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.mode = "training"
        self.on = True
        self.pairs = [("training", True), ("other", True)]
        self.inner = nn.Dropout()
        self.weight = nn.Parameter(torch.randn(8))
        if not plain:
            self.table = {"training": True}
            self.said = Says()
            self.speed = Mode.FAST
            self.sparse = nn.Parameter(torch.eye(8).to_sparse())
            self.held = [(torch.ones(2, requires_grad=True), True)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.weight


@pytest.mark.parametrize("plain", [True, False])
def test_only_flags_are_cleared(plain: bool, ray_session: None) -> None:
    """Eval mode and requires_grad=False change the flags of modules and tensors, and no other bool."""
    quietly(lambda: torch.jit.script(Says))
    ref = prepare_model_for_actors(quietly(lambda: torch.jit.script(NoFlags(plain))))
    for flags in (True, False, True, False, True, False):
        loaded = load_model_in_actor(ref, keep_flags=flags)
        assert (loaded.mode, loaded.on, loaded.pairs) == ("training", True, [("training", True), ("other", True)])
        assert [loaded.training, loaded.inner.training, loaded.weight.requires_grad] == [flags] * 3
        if not plain:
            assert loaded.table == {"training": True}
            assert loaded.said.training
            assert loaded.speed is Mode.FAST
            ((tensor, flag),) = loaded.held
            assert flag
            assert [loaded.sparse.requires_grad, tensor.requires_grad] == [flags] * 2


def test_compiled_code_goes_with_its_constants(ray_session: None) -> None:
    """The code cache does not keep a frozen model's weights alive after the last loaded module is gone."""
    frozen = quietly(lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(512, 512)).eval())))
    ref = prepare_model_for_actors(frozen)
    before = set(rebuild._compiled)
    loads = [load_model_in_actor(ref) for _ in range(4)]
    (key,) = set(rebuild._compiled) - before
    compiled = weakref.ref(rebuild._compiled[key])
    assert torch.equal(loads[3](torch.ones(1, 512)), frozen(torch.ones(1, 512)))
    del loads
    gc.collect()
    assert compiled() is None


def test_few_compiled_models_are_kept(ray_session: None) -> None:
    """A process keeps the code of the last few models, and compiles the code of older ones again."""
    source = quietly(lambda: torch.jit.script(nn.Linear(8, 8)))
    refs = [prepare_model_for_actors(source) for _ in range(rebuild.MAX_COMPILED + 2)]
    for ref in refs:
        load_model_in_actor(ref)
    assert len(rebuild._recent) == rebuild.MAX_COMPILED
    assert torch.equal(load_model_in_actor(refs[0])(X), source(X))


class Slices(nn.Module):
    """Two overlapping Parameters over a large storage, and a buffer of another dtype over the same storage."""

    def __init__(self) -> None:
        super().__init__()
        large = torch.randn(100_000)
        self.one = nn.Parameter(large[50_001:50_009])
        self.two = nn.Parameter(large[50_005:50_013])
        self.register_buffer("bits", large.view(torch.int32)[50_006:50_010])
        self.register_buffer("empty", torch.randn(1000)[7:7])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.one + self.two + self.bits.sum()


def test_dtypes_over_one_storage(ray_session: None) -> None:
    """Tensors of two dtypes over one storage keep both dtypes, or are refused if torch would lose one."""
    weight = torch.randn(8)

    class Two(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.register_buffer("bits", weight.view(torch.int32))
            self.weight = nn.Parameter(weight)
            if more:
                self.table = {"a": torch.randn(2)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + self.bits

    source = quietly(lambda: torch.jit.script(Two(False)))
    ref = prepare_model_for_actors(source)
    for _ in range(3):
        loaded = load_model_in_actor(ref, keep_flags=True)
        assert describe(loaded) == describe(source)
        assert torch.equal(loaded(X), source(X))
    with pytest.raises(TypeError, match=r"different dtypes over one storage.*Clone one of them"):
        prepare_model_for_actors(quietly(lambda: torch.jit.script(Two(True))))


def test_a_slice_is_stored_as_the_slice(ray_session: None) -> None:
    """Small slices of large storages in TorchScript are stored without the rest of the storage, and keep ties."""
    source = quietly(lambda: torch.jit.script(Slices()))
    parts = graph.take_apart(source)
    ref = prepare_model_for_actors(source)
    assert ref.nbytes <= sum(a.raw().nbytes for a in parts.arrays) + 512
    for _ in range(3):
        loaded = load_model_in_actor(ref, keep_flags=True)
        assert describe(loaded) == describe(source)
        assert torch.equal(loaded(X), source(X))
    with torch.no_grad():
        loaded.one[4:] = 0
    assert loaded.two[0] == loaded.bits[0] == 0


class SlicesBeside(nn.Module):
    """A slice of a large storage beside lists, tuples and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = Slices()
        self.convolution = nn.Conv2d(1, 1, 3, padding="same")
        self.numbers = [1, 2]
        self.words = ["a", "b"]
        self.none = torch.jit.Attribute(None, list[float] | None)
        self.some = torch.jit.Attribute([0.5], list[float] | None)
        self.nested = [(1, [2.5, 3.5]), (4, [5.5])]
        self.empty = torch.jit.Attribute([], list[int])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slices(x) + self.convolution(x[None, None]).sum()

    @torch.jit.export
    def add(self, number: int) -> list[int]:
        self.numbers.append(number)
        return self.numbers

    @torch.jit.export
    def held(self) -> tuple[list[str], list[float] | None, list[float] | None, list[tuple[int, list[float]]]]:
        return self.words, self.none, self.some, self.nested


class TiedLists(nn.Module):
    """After `tie`, holds one list under two names, or twice in another list."""

    def __init__(self) -> None:
        super().__init__()
        self.one = [1, 2]
        self.two = [3]
        self.both = torch.jit.Attribute([], list[list[int]])

    def forward(self, number: int) -> list[list[int]]:
        self.one.append(number)
        answer = [self.one, self.two]
        answer.extend(self.both)
        return answer


class Assigns(TiedLists):
    @torch.jit.export
    def tie(self) -> None:
        self.two = self.one


class Appends(TiedLists):
    @torch.jit.export
    def tie(self) -> None:
        self.both.append(self.one)
        self.both.append(self.two)


@pytest.mark.parametrize("kind", [Assigns, Appends])
def test_lists_that_are_one_stay_one(kind: Any, ray_session: None) -> None:
    """Two attributes that a method made one list are one list in every load."""
    source = quietly(lambda: torch.jit.script(kind()))
    source.tie()
    ref = prepare_model_for_actors(source)
    answers = [load_model_in_actor(ref)(7) for _ in range(4)]
    assert answers == [source(7)] * 4


class Traced(nn.Module):
    """A slice of a large storage beside a graph constant."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = Slices()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slices(x) + torch.tensor([1.0])


@pytest.mark.parametrize("way", ["script", "trace"])
def test_slices_beside_lists_and_constants(way: str, ray_session: None) -> None:
    """Slices beside lists, convolutions and constants are stored as slices, and loads do not share lists."""
    source = quietly(lambda: torch.jit.script(SlicesBeside()) if way == "script" else torch.jit.trace(Traced(), X))
    ref = prepare_model_for_actors(source)
    assert ref.nbytes <= sum(a.raw().nbytes for a in graph.take_apart(source).arrays) + 1024
    loads = [load_model_in_actor(ref, keep_flags=True) for _ in range(4)]
    for number, loaded in enumerate(loads):
        assert describe(loaded) == describe(source)
        assert torch.equal(loaded(X), source(X))
        if way == "script":
            assert loaded.held() == source.held()
            assert loaded.empty == []
            assert loaded.add(number) == [1, 2, number]
            assert loaded.add(number) == [1, 2, number, number]


def counting() -> torch.jit.ScriptFunction:
    """Return a function that counts its calls in a graph constant."""
    count = torch.zeros(1)

    def count_up(x: torch.Tensor) -> torch.Tensor:
        count.add_(1)
        return x + count

    return torch.jit.trace(count_up, torch.zeros(1), check_trace=False)


def calls(way: str) -> torch.jit.ScriptModule:
    """Return a scripted module that writes to a graph constant of a function that it calls."""
    called = counting()
    constant = torch.zeros(1)
    kept = torch.jit.trace(lambda x: constant.expand(x.shape[0]), torch.zeros(1), check_trace=False)

    def forked(x: torch.Tensor) -> torch.Tensor:
        return called(x)

    class Called(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return called(x)

    class Forked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            task = torch.jit.fork(forked, x)
            return torch.jit.wait(task)

    class Returned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + kept(x).add_(1)

    def hook(self: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return called(output)

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_forward_hook(hook)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    made = {"called": Called, "forked": Forked, "returned": Returned, "hooked": Hooked}.get(way)
    if made is None:
        return torch.jit.trace(Called(), torch.zeros(1), check_trace=False)
    return torch.jit.script(made())


@pytest.mark.parametrize("way", ["called", "traced", "forked", "returned", "hooked"])
def test_a_written_constant_of_a_called_function_is_each_loads_own(way: str, ray_session: None) -> None:
    """A write to a graph constant of a called function changes no other load."""
    ref = prepare_model_for_actors(quietly(lambda: calls(way)))
    zero = torch.zeros(1)
    loads = [load_model_in_actor(ref) for _ in range(3)]
    said = [[float(model(zero)) for _ in range(3)] for model in loads]
    before = said[0][0]  # tracing has called the function
    assert said == [[before, before + 1, before + 2]] * 3
    assert float(load_model_in_actor(ref)(zero)) == before


class Table(nn.Module):
    """Returns a row of its table, or keeps the row in an attribute that the caller can read."""

    def __init__(self, size: int, keep: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(size, 8))
        self.keep = keep
        self.last = torch.ones(8)

    def forward(self, row: int) -> list[torch.Tensor]:
        if self.keep:
            self.last = self.table[row]
            return []
        return [self.table[row]]


@pytest.mark.parametrize("size", [2, 20_000])
@pytest.mark.parametrize("keep", [False, True])
def test_a_returned_constant_is_each_loads_own(keep: bool, size: int, ray_session: None) -> None:
    """A caller's write to a returned graph constant changes no other load of the process."""
    frozen = quietly(lambda: torch.jit.freeze(torch.jit.script(Table(size, keep).eval()), preserved_attrs=["last"]))

    def row_of(model: Any) -> torch.Tensor:
        (row,) = model(1) or [model.last]
        return row

    ref = prepare_model_for_actors(frozen)
    loads = [load_model_in_actor(ref) for _ in range(3)]
    row_of(loads[0]).fill_(5)
    assert row_of(loads[0]).sum() == 40
    assert all(row_of(model).sum() == 0 for model in [*loads[1:], load_model_in_actor(ref), frozen])


def test_constants_of_called_functions_are_shared_and_counted(ray_session: None) -> None:
    """A large graph constant of a called function is in the store, is shared, and is in the report."""
    large = torch.randn(100_000)
    function = quietly(lambda: torch.jit.trace(lambda x: x + large, torch.zeros(1), check_trace=False))

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    source = quietly(lambda: torch.jit.script(Calls()))
    assert constant_bytes(source) >= large.nbytes
    ref = prepare_model_for_actors(source)
    assert large.nbytes <= ref.nbytes < large.nbytes + 50_000
    loaded = load_model_in_actor(ref)
    assert torch.equal(loaded(torch.ones(1)), large + 1)
    assert memory.model_memory(ref).shared >= large.nbytes
    report = memory.model_memory(loaded)
    assert report.shared >= large.nbytes
    assert report.private < 10_000


def tied_to_script() -> dict[str, Any]:
    """Return parameters that an eager module, two scripted modules, a list and an optimizer hold."""
    eager = nn.Linear(8, 8)
    layers = nn.Sequential(eager, nn.Conv1d(2, 2, 1))
    one, two = torch.jit.script(layers), torch.jit.trace(nn.Sequential(eager, nn.ReLU()), X)
    parameters = list(one.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return {"one": one, "eager": eager, "two": two, "parameters": parameters, "optimizer": optimizer}


@pytest.mark.parametrize("order", [1, -1])
def test_a_parameter_tied_to_torchscript_is_one_object(order: int, ray_session: None) -> None:
    """Gradients of eager and scripted modules with one Parameter add up, and an optimizer trains all of them."""
    source = quietly(lambda: dict(list(tied_to_script().items())[::order]))
    ref = prepare_model_for_actors(source)
    expected = train(source)
    for flags in (True, False, True, True, False):
        loaded = load_model_in_actor(ref, keep_flags=flags)
        weight = loaded["eager"].weight
        assert type(weight) is nn.Parameter
        assert weight.requires_grad is flags
        assert getattr(loaded["one"], "0").weight is weight
        assert getattr(loaded["two"], "0").weight is weight
        assert [id(p) for p in loaded["parameters"]] == [id(p) for p in loaded["one"].parameters()]
        assert loaded["parameters"][0] is weight
        if flags:
            assert all(torch.equal(*pair) for pair in zip(train(loaded), expected, strict=True))


def train(parts: dict[str, Any]) -> list[torch.Tensor]:
    """Take two steps through all the modules, and return the parameters."""
    for _ in range(2):
        parts["optimizer"].zero_grad()
        parts["two"](parts["one"](parts["eager"](X))).pow(2).sum().backward()
        parts["optimizer"].step()
    return [p.detach().clone() for p in parts["parameters"]]
