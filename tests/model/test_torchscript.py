"""TorchScript beyond the table: functions, what cannot be shared, and what a later load costs."""

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
from ray_zerocopy._model import graph, layout, packing
from ray_zerocopy._model.script import rebuild
from ray_zerocopy._model.script.parts import baked_bytes

CPU = torch.device("cpu")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def scale(x: torch.Tensor, factor: float = 2.5, shift: int | None = None, *, word: str) -> torch.Tensor:
    """Be a function with defaults of several types, and an argument that only goes by its name."""
    if shift is not None:
        x = x + shift
    return x * factor + len(word)


def test_a_function_keeps_its_signature(ray_session: None) -> None:
    """A scripted function comes back with its arguments' names, types, defaults and kinds, at every load."""
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
    """Be a function with defaults that have no literals."""
    return x.to(to).clamp(low, high) + torch.tensor([fill])


def test_defaults_without_literals(ray_session: None) -> None:
    """Infinities, nan and devices are kept as defaults."""
    source = quietly(lambda: torch.jit.script(bounded))
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert str(loaded.schema) == str(source.schema)
    assert loaded(X).isnan().all()
    assert torch.equal(loaded(X, fill=0.0), X)


def inner(self: torch.Tensor, by: int = 2) -> torch.Tensor:
    """Be a function whose names are words that the library, or TorchScript's archive, uses itself."""
    return self * by


def of_inner(inner: torch.Tensor, inner_: int = 2) -> torch.Tensor:
    """Be another one."""
    return inner * inner_


@pytest.mark.parametrize("function", [inner, of_inner])
def test_any_name_goes(function: Any, ray_session: None) -> None:
    """Functions and arguments may have names that are in use inside, and keep them."""
    source = quietly(lambda: torch.jit.script(function))
    ref = prepare_model_for_actors(source)
    for _ in range(3):
        loaded = load_model_in_actor(ref)
        assert str(loaded.schema) == str(source.schema)
        assert torch.equal(loaded(X), X * 2)


class Box:
    """A class of TorchScript."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_a_function_of_a_class(ray_session: None) -> None:
    """A function whose types torch cannot read back is shared without defaults, and refused if it has any."""
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
    with pytest.raises(TypeError, match=r"its defaults would be lost: share a function without defaults"):
        prepare_model_for_actors(quietly(lambda: torch.jit.script(with_default)))


def test_weights_packed_for_mkldnn_are_refused(ray_session: None) -> None:
    """What torch.jit.optimize_for_inference packed is refused when sharing, with path, fact and remedy."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    frozen = quietly(lambda: torch.jit.freeze(torch.jit.script(net)))
    ref = prepare_model_for_actors(frozen)
    optimized = quietly(lambda: torch.jit.optimize_for_inference(frozen))
    if "ConstantMKLDNN" not in str(optimized.graph):
        pytest.skip("this build of torch packs nothing for mkldnn")
    with pytest.raises(
        TypeError, match=r"dict\['a'\]\.model .*graph of its forward\(\) has weights packed.*optimize"
    ):
        prepare_model_for_actors({"a": nn.ModuleDict({"model": optimized})})
    x = torch.randn(1, 3, 8, 8)
    loaded = quietly(lambda: torch.jit.optimize_for_inference(load_model_in_actor(ref)))
    assert torch.allclose(loaded(x), net(x), atol=1e-5)


def many_layers() -> nn.Module:
    """Return a model whose load is all objects and hardly any bytes."""
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout()) for _ in range(100)]
    return nn.Sequential(*blocks).eval()


@pytest.mark.parametrize("keep_flags", [False, True])
@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_later_loads_of_many_layers(way: str, keep_flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads of four hundred modules read them from the archive; later ones read nothing, and give the same."""
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
    """A class of TorchScript with an attribute that a module has, too."""

    def __init__(self) -> None:
        self.training = True


class Mode(enum.Enum):
    """An enum, which TorchScript pickles in a way of its own."""

    FAST = 1


class NoFlags(nn.Module):
    """Holds the word training beside True where that is no flag, and flags in unusual tensors."""

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
    """Eval mode and requires_grad=False change flags of modules and tensors, and no other bool of a module."""
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
    """Kept code does not keep a frozen model's weights: they go with the last module that was loaded."""
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
    """A process keeps the code of the last few models only, and compiles again what it has let go."""
    source = quietly(lambda: torch.jit.script(nn.Linear(8, 8)))
    refs = [prepare_model_for_actors(source) for _ in range(rebuild.MOST_COMPILED + 2)]
    for ref in refs:
        load_model_in_actor(ref)
    assert len(rebuild._kept) == rebuild.MOST_COMPILED
    assert torch.equal(load_model_in_actor(refs[0])(X), source(X))


class Slices(nn.Module):
    """Two Parameters of a large storage, which overlap, and a buffer of another type over it."""

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
    """Tensors of two dtypes over one storage keep both, and are refused where torch would make them one."""
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
    with pytest.raises(TypeError, match=r"different dtypes over one storage.*clone one of them"):
        prepare_model_for_actors(quietly(lambda: torch.jit.script(Two(True))))


def test_a_slice_is_stored_as_the_slice(ray_session: None) -> None:
    """Small parts of large storages in TorchScript are stored as the bytes they are, ties kept."""
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
    """Holds one list under two names, or twice in another list, once `tie` was called."""

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
    """What a method made one list is one in every load."""
    source = quietly(lambda: torch.jit.script(kind()))
    source.tie()
    ref = prepare_model_for_actors(source)
    answers = [load_model_in_actor(ref)(7) for _ in range(4)]
    assert answers == [source(7)] * 4


class Traced(nn.Module):
    """A slice of a large storage beside a constant of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = Slices()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slices(x) + torch.tensor([1.0])


@pytest.mark.parametrize("way", ["script", "trace"])
def test_slices_beside_lists_and_constants(way: str, ray_session: None) -> None:
    """Slices are stored as slices beside lists, convolutions and constants, and lists are each load's own."""
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
    """Return a function that counts its calls in a constant of its graph."""
    count = torch.zeros(1)

    def count_up(x: torch.Tensor) -> torch.Tensor:
        count.add_(1)
        return x + count

    return torch.jit.trace(count_up, torch.zeros(1), check_trace=False)


def calls(way: str) -> torch.jit.ScriptModule:
    """Return a scripted module that writes to a constant of what it calls."""
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
    """What a module writes into a constant of a function that it calls reaches no other load."""
    ref = prepare_model_for_actors(quietly(lambda: calls(way)))
    zero = torch.zeros(1)
    loads = [load_model_in_actor(ref) for _ in range(3)]
    said = [[float(model(zero)) for _ in range(3)] for model in loads]
    before = said[0][0]  # what tracing has counted
    assert said == [[before, before + 1, before + 2]] * 3
    assert float(load_model_in_actor(ref)(zero)) == before


class Table(nn.Module):
    """Gives a row of its table to the caller, or keeps it where the caller gets at it."""

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
    """What a caller writes into a constant that it was given reaches no other load of the process."""
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
    """A large constant of a function that a scripted module calls is in the store, shared, and in the report."""
    large = torch.randn(100_000)
    function = quietly(lambda: torch.jit.trace(lambda x: x + large, torch.zeros(1), check_trace=False))

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    source = quietly(lambda: torch.jit.script(Calls()))
    assert baked_bytes(source) >= large.nbytes
    ref = prepare_model_for_actors(source)
    assert large.nbytes <= ref.nbytes < large.nbytes + 50_000
    loaded = load_model_in_actor(ref)
    assert torch.equal(loaded(torch.ones(1)), large + 1)
    assert memory.model_memory(ref).shared >= large.nbytes
    report = memory.model_memory(loaded)
    assert report.shared >= large.nbytes
    assert report.private < 10_000


def tied_to_script() -> dict[str, Any]:
    """Return parameters that are held by an eager module, two scripted ones, a list and an optimizer."""
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
