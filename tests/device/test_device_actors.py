"""Devices and dtypes through the public functions: loads in actors, and models that the driver has on a device."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import Runner
from describe import describe
from late_device import Late
from models import CASES, NAMES, Tied
from torch import nn

from ray_zerocopy import (
    ZeroCopyError,
    actor,
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._device import choose, destination, page_lock
from ray_zerocopy._device.ring import Ring
from ray_zerocopy._model import graph, packing
from ray_zerocopy._model.packing import Buffer
from ray_zerocopy._pages import store_file, views
from ray_zerocopy._store import get, host, put
from ray_zerocopy._store.ref import LoadOptions

pytestmark = pytest.mark.usefixtures("ray_session")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


# ---------------------------------------------------------------- what Ray assigned


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what workers say whose torch finds no GPU")
def test_the_device_is_what_ray_assigned() -> None:
    """Half a GPU or a whole one is the device by default; none is the CPU; another worker's is an error."""
    script = Path(__file__).parent / "assigned_script.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in ("half", "whole"):
        said = found[kind]
        assert (said["None"], said["'auto'"], said["'cpu'"]) == ("cuda:0", "cuda:0", "cpu")
        assert "Ray assigned cuda:0 to this worker, but torch" in said["load"]
        for device in ("'cuda'", "'cuda:0'", "0", "'cuda:1'"):
            assert "finds no usable CUDA device" in said[device]
    said = found["none"]
    assert (said["None"], said["'auto'"], said["load"]) == ("cpu", "cpu", "cpu")
    assert all("Ray assigned no GPU to this worker" in said[device] for device in ("'cuda'", "0", "'cuda:1'"))


def test_another_workers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs that torch sees, the one that Ray gave to another worker is refused, by name or index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    second = torch.device("cuda", 1)
    for device in (None, "auto", "cuda", "cuda:1", 1, second):
        assert choose.resolve_device(device, ["5"]) == second
    for device in ("cuda:0", 0, torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=r"not among the GPUs of this worker: \['cuda:1'\]"):
            choose.resolve_device(device, ["5"])
    # A driver, to which Ray assigns nothing, may take any; "cuda" is its current one, as it is to torch.
    assert [choose.resolve_device(device, None).index for device in ("cuda", "cuda:0", 0, 1)] == [1, 0, 0, 1]
    assert choose.resolve_device(None, None) == torch.device("cpu")


# ---------------------------------------------------------------- dtype on the CPU


@pytest.mark.parametrize("name", ["mlp", "tied", "batch_norm_net", "lstm", "large_layers"])
def test_dtype_is_what_torch_makes_of_it(name: str) -> None:
    """A model loaded with a dtype equals the source converted by torch: values, ties, integer buffers."""
    source = CASES[name].make().eval()
    loaded = load_model_in_actor(prepare_model_for_actors(source), dtype=torch.bfloat16)
    assert saved(loaded) == saved(copy.deepcopy(source).to(torch.bfloat16))
    if isinstance(loaded, Tied):
        assert loaded.head.weight is loaded.embed.weight


def test_what_is_converted_is_private() -> None:
    """Converted tensors count as private bytes and the others as shared; flags are kept where asked for."""
    source = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    source[0].bias.requires_grad_(False)
    ids = torch.arange(100_000)
    source[1].register_buffer("ids", ids)
    ref = prepare_model_for_actors(source)
    how = actor.load(ref, None, dtype=torch.float16, keep_flags=True)
    floats = sum(t.numel() for t in source.state_dict().values() if t.is_floating_point())
    assert how.private == floats * 2
    assert how.shared >= ids.nbytes
    assert memory.location(how.model[1].ids) is not None
    assert memory.location(how.model[0].weight) is None
    flags = [p.requires_grad for p in how.model.parameters()]
    assert flags == [p.requires_grad for p in source.parameters()]
    assert all(isinstance(p, nn.Parameter) for p in how.model.parameters())
    plain = actor.load(ref, None)
    assert plain.private == 0


def test_a_pipeline_with_a_dtype() -> None:
    """The models of a pipeline are converted too."""
    skeleton, refs = rewrite_pipeline_for_actors({"model": nn.Linear(3, 3), "name": "x"})
    loaded = load_pipeline_in_actor(skeleton, refs, dtype=torch.float64)
    assert loaded["model"].weight.dtype == torch.float64


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.script(nn.Linear(2, 2)), "RecursiveScriptModule"),
        (lambda: [torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)], "Tensor of torch.qint8"),
        (lambda: [torch.ones(3).as_subclass(Subclass)], "Subclass of torch.float32"),
        (lambda: [torch.eye(3).to_sparse()], "Tensor of torch.float32"),
    ],
)
def test_no_dtype_for_what_knows_its_own(make: Callable[[], Any], words: str) -> None:
    """TorchScript, quantized and sparse tensors and subclasses refuse a dtype, by name; without one they load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        ref = prepare_model_for_actors(make())
        with pytest.raises(ValueError, match=rf"dtype=torch.bfloat16 cannot be applied to .* holds a {words}, "):
            load_model_in_actor(ref, dtype=torch.bfloat16)
        load_model_in_actor(ref)


# ---------------------------------------------------------------- unpickling while bytes move


class Sums:
    """Looks at its tensor when it is unpickled."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.total = float(self.tensor.sum())


class Constructed:
    """Is rebuilt by calling its class."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.total = float(tensor.sum())
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return Constructed, (self.tensor,)


class Merging(nn.Linear):
    """Looks at its weight in train() and eval()."""

    def train(self, mode: bool = True) -> Merging:
        self.total = float(self.weight.detach().sum())
        return super().train(mode)


@pytest.mark.parametrize("make", [lambda: Sums(torch.ones(4)), lambda: Constructed(torch.ones(4))])
def test_code_that_looks_at_tensors_waits(make: Callable[[], Any]) -> None:
    """What reads a tensor while it is unpickled finds the bytes there, though they arrive later than the tensors."""
    source = {"plain": nn.Linear(3, 3), "looks": make()}
    rebuilt, waited = put_together_late(source)
    assert rebuilt["looks"].total == 4.0
    assert waited


def test_eval_waits() -> None:
    """A class whose train() reads its weights finds them there."""
    source = Merging(3, 3).train()
    rebuilt, _ = put_together_late(source)
    assert rebuilt.total == source.total != 0


def test_ordinary_models_do_not_wait() -> None:
    """The skeleton of modules alone is unpickled before the bytes are asked for."""
    sources = [CASES[name].make() for name in ("mlp", "batch_norm_net", "lstm", "tied")]
    for source in (*sources, actor._Models("", sources, [], [])):
        parts = graph.take_apart(source)
        assert not parts.runs_constructors
        asked: list[int] = []
        unpickler = graph._Unpickler(io.BytesIO(parts.skeleton))
        unpickler.tensors, unpickler.carried, unpickler.keep_flags = parts.tensors, [], False
        unpickler.wait = lambda asked=asked: asked.append(1)
        unpickler.load()
        assert not asked


def put_together_late(source: object) -> tuple[Any, bool]:
    """Rebuild an object around tensors that are zero until somebody asks for their bytes."""
    parts = graph.take_apart(source)
    late = [torch.zeros_like(t) for t in parts.tensors]
    asked = []

    def arrived() -> None:
        asked.append(1)
        with torch.no_grad():
            for there, tensor in zip(late, parts.tensors, strict=True):
                there.copy_(tensor)

    if parts.runs_constructors:
        arrived()
    return graph.put_together(parts.skeleton, late, wait=arrived)[0], bool(asked)


# ---------------------------------------------------------------- the whole way, to a device made up


@pytest.fixture(scope="module")
def ring() -> Ring:
    return Ring(Late(), slot_bytes=64 * 1024, threads=3, depth=4)


def load_late(source: object, ring: Ring, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    monkeypatch.setattr(destination, "ring_of", lambda device: ring)
    return get.get(prepare_model_for_actors(source), LoadOptions(torch.device("cuda", 0), keep_flags=True, **how))


def store_descriptors() -> list[str]:
    """Return which of this process's descriptors are of the object store's file."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if "plasma" in os.path.basename(path)]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_gets_there(name: str, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of the table arrives as it is, from the store's pages through slots, and is counted as a copy."""
    source = CASES[name].make()
    loaded = load_late(source, ring, monkeypatch)
    assert describe(loaded.model) == describe(source)
    assert not store_descriptors()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in graph.take_apart(source).tensors}
    assert loaded.private <= sum(storages.values())
    assert loaded.private > 0 or not any(storages.values())


class Recurrent(nn.Module):
    """RNNs beside other weights; one is held twice, one has a weight that is seen from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 6)
        self.lstm = nn.LSTM(6, 90, num_layers=2, bidirectional=True)
        self.small = nn.ModuleList([nn.GRU(5, 3, bias=False), nn.RNN(4, 2), nn.LSTM(6, 8, proj_size=3)])
        self.again = self.lstm
        self.tied = nn.GRU(5, 3)
        self.rows = self.tied.weight_ih_l0.detach()[:2]
        self.own_way = OwnWay(5, 3)


class OwnWay(nn.GRU):
    def flatten_parameters(self) -> None:
        pass


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_rnn_weights_arrive_in_the_devices_order(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RNN's weights go at once to where the device wants them, in one storage; a tie is not given up for that."""
    source = Recurrent()
    ring = Ring(Late(orders=True), slot_bytes=4096, threads=3, depth=4)
    loaded = load_late(source, ring, monkeypatch, dtype=dtype)
    model = loaded.model
    for have, want in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(have, want.to(have.dtype))
        assert have.dtype == (dtype or want.dtype)
    for rnn in (model.lstm, *model.small):
        weights = rnn._flat_weights
        assert [id(weight) for weight in weights] == [id(weight) for weight in rnn.parameters()]
        assert len({weight.untyped_storage()._cdata for weight in weights}) == 1
        size = weights[0].itemsize
        ends = [0]
        for weight in reversed(weights):
            assert weight.storage_offset() == ends[-1] + 3
            ends.append(weight.storage_offset() + weight.numel())
        whole = torch.empty(0, dtype=torch.uint8).set_(weights[0].untyped_storage())
        padding = {int(byte) for end in ends[:-1] for byte in whole[end * size : (end + 3) * size]}
        assert padding <= {0, 0xCC}  # never what a slot had before
    for rnn in (model.tied, model.own_way):
        assert len({weight.untyped_storage()._cdata for weight in rnn._flat_weights}) == 4
    assert model.again is model.lstm
    assert model.rows.data_ptr() == model.tied.weight_ih_l0.data_ptr()
    assert loaded.private <= sum(t.nbytes for t in model.state_dict().values()) + 6 * (64 + 24 * 16)


class Sharing(nn.Module):
    """RNNs with one weight in common, with all, and with attributes that are not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(6, 90), nn.LSTM(6, 90)
        self.second.weight_ih_l0 = self.first.weight_ih_l0
        self.others = [copy.copy(self.first)]
        self.own_way = nn.GRU(5, 3)
        self.own_way.flatten_parameters = print
        self.unnamed = nn.GRU(5, 3)
        del self.unnamed.mode


def test_rnns_that_share_weights_take_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of several RNNs goes to the block of the first; an RNN unlike torch's gets none, and no error."""
    source = Sharing()
    ring = Ring(Late(orders=True), slot_bytes=4096, threads=3, depth=4)
    loaded = load_late(source, ring, monkeypatch)
    model = loaded.model
    for have, want in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(have, want)
    assert model.second.weight_ih_l0 is model.first.weight_ih_l0
    storages = [
        [weight.untyped_storage()._cdata for weight in rnn._flat_weights]
        for rnn in (model.first, *model.others, model.second, model.own_way, model.unnamed)
    ]
    assert storages[0] == storages[1] == storages[0][:1] * 4
    assert storages[2][0] == storages[0][0]
    assert [len(set(each)) for each in storages[2:]] == [4, 4, 4]
    assert loaded.private <= sum(weight.nbytes for weight in model.parameters()) + 64 + 4 * 12


def test_it_never_reads_the_private_view(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load to a device maps nothing: the bytes come from the store's file, or its own mapping without one."""

    def refuse(*_: object) -> Any:
        raise store_file.Unmappable("not here")

    source = CASES["large_layers"].make()
    monkeypatch.setattr(views, "private_view", refuse)
    assert describe(load_late(source, ring, monkeypatch).model) == describe(source)
    monkeypatch.setattr(host, "open_file", refuse)
    loaded = load_late(source, ring, monkeypatch, dtype=torch.float64)
    assert describe(loaded.model) == describe(copy.deepcopy(source).double())


def test_an_error_in_the_skeleton_stops_the_upload(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that cannot be unpickled is an error with its own as the cause; no thread and no descriptor stay."""
    source = [torch.ones(1 << 20), Broken()]
    with pytest.raises(ZeroCopyError, match=r"list cannot be rebuilt.*ArithmeticError: as ever") as caught:
        load_late(source, ring, monkeypatch)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    del caught
    assert not [thread for thread in threading.enumerate() if thread.name == "ray_zerocopy-upload"]
    assert not store_descriptors()


def test_pages_are_locked_once_a_handle(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """With page_lock a handle's pages are locked at its first load, and let go when the handle goes."""
    made: list[weakref.ref[Any]] = []

    class Locked:
        def __init__(self, device: torch.device, ranges: list[tuple[int, int]], keep_alive: object) -> None:
            self.ranges = [(-(-begin // 4096) * 4096, end // 4096 * 4096) for begin, end in ranges]
            made.append(weakref.ref(self))

    monkeypatch.setattr(page_lock, "PageLock", Locked)
    monkeypatch.setattr(destination, "ring_of", lambda device: ring)
    source = CASES["large_layers"].make()
    ref = prepare_model_for_actors(source)
    how = LoadOptions(torch.device("cuda", 0), keep_flags=True, page_lock=True)
    for _ in range(2):
        assert describe(get.get(ref, how).model) == describe(source)
    assert [lock() is None for lock in made] == [False]
    del ref
    gc.collect()
    assert [lock() is None for lock in made] == [True]


def test_other_accelerators_get_a_plain_copy() -> None:
    """A device other than CUDA goes by torch's own copy of each storage; "meta" stands for one here."""
    source = CASES["tied"].make()
    loaded = get.get(prepare_model_for_actors(source), LoadOptions(torch.device("meta"), torch.bfloat16)).model
    assert {(t.device.type, t.dtype) for t in loaded.state_dict().values()} == {("meta", torch.bfloat16)}
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.head.weight.shape == source.head.weight.shape


class Broken:
    def __init__(self) -> None:
        self.state = 1

    def __setstate__(self, state: object) -> None:
        raise ArithmeticError("as ever")


# ---------------------------------------------------------------- a driver whose model is on a device


@pytest.fixture
def as_if_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packing take every storage for one that is not in host memory."""
    monkeypatch.setattr(packing, "_on_host", lambda storage: False)


@pytest.mark.parametrize("name", ["mlp", "tied", "batch_norm_net", "every_dtype", "large_layers"])
def test_a_model_on_a_device_is_shared(name: str, as_if_on_a_device: None) -> None:
    """Storages that must come to the host arrive in the store as they are, ties included, large and small ones."""
    source = CASES[name].make()
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert saved(loaded) == saved(source.eval())


def test_it_is_staged_piece_by_piece(as_if_on_a_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a bounded number of a device's bytes are in host memory at once, or one storage if that is larger."""
    monkeypatch.setattr(put, "STAGED_BYTES", 1 << 20)
    source = [torch.full((300_000,), n, dtype=torch.uint8) for n in range(20)]
    source += [torch.full((3 << 20,), 7, dtype=torch.uint8), torch.ones(5)]
    held: list[Any] = []
    most = []
    staging = Buffer.memory

    def counted(buffer: Buffer) -> memoryview:
        stage = staging(buffer)
        array = np.asarray(stage).view(Counted)
        array.count(held)
        most.append(sum(held))
        return array.data

    class Counted(np.ndarray):  # type: ignore[type-arg]
        def count(self, held: list[int]) -> None:
            self.held = held
            held.append(self.nbytes)

        def __del__(self) -> None:
            if getattr(self, "held", None):
                self.held.remove(self.nbytes)

    monkeypatch.setattr(Buffer, "memory", counted)
    ref = prepare_model_for_actors(source)
    assert max(most) <= max(3 << 20, (1 << 20) + 64)
    assert sum(1 for nbytes in most if nbytes > 1 << 20) <= 1
    assert not held
    assert len(ref.refs) >= 7
    for have, want in zip(load_model_in_actor(ref), source, strict=True):
        assert torch.equal(have, want)


# ---------------------------------------------------------------- on a GPU


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("name", ["mlp", "tied", "batch_norm_net", "every_dtype", "large_layers"])
    def test_equal_to_the_source(self, name: str) -> None:
        """A model on the GPU has the source's bytes, and one shared from the GPU has them too."""
        source = CASES[name].make().eval()
        loaded = load_model_in_actor(prepare_model_for_actors(source), device="cuda")
        assert {t.device.type for t in loaded.state_dict().values()} == {"cuda"}
        again = load_model_in_actor(prepare_model_for_actors(loaded))
        assert saved(again) == saved(source)

    def test_rnn_weights_are_one_block(self) -> None:
        """An RNN runs on the GPU without cuDNN's warning about scattered weights, and as on the CPU."""
        source = CASES["lstm"].make().eval()
        loaded = load_model_in_actor(prepare_model_for_actors(source), device="cuda")
        assert len({w.untyped_storage()._cdata for w in loaded._flat_weights}) == 1
        assert loaded._flat_weights[0].untyped_storage().nbytes() < 1.1 * sum(w.nbytes for w in source._flat_weights)
        x = torch.randn(5, 2, 6)
        torch.testing.assert_close(loaded(x.cuda())[0].cpu(), source(x)[0], rtol=1e-3, atol=1e-4)

    def test_rnn_weights_take_no_more_memory(self) -> None:
        """An RNN's weights are at no time on the GPU twice."""
        source = nn.LSTM(1000, 1000, num_layers=4).eval()
        ref = prepare_model_for_actors(source)
        load_model_in_actor(prepare_model_for_actors(CASES["lstm"].make()), device="cuda")  # cuDNN's own memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loaded = load_model_in_actor(ref, device="cuda")
        assert torch.cuda.max_memory_allocated() - before <= 1.02 * ref.nbytes
        assert len({w.untyped_storage()._cdata for w in loaded._flat_weights}) == 1

    def test_page_lock(self) -> None:
        """Loads with the store's pages page-locked are right, twice, and after the handle went and came."""
        source = CASES["large_layers"].make().eval()
        ref = prepare_model_for_actors(source)
        for _ in range(2):
            loaded = load_model_in_actor(ref, device="cuda", page_lock=True)
            assert saved(loaded.cpu()) == saved(source)
        assert len(page_lock._locks) == 1
        del ref
        assert len(page_lock._locks) == 0

    def test_two_actors_on_one_gpu(self) -> None:
        """Two actors with half a GPU each have the model on the GPU that Ray assigned, each one of its own."""

        def load_and_write(ref: Any, value: float) -> tuple[str, int, float]:
            model = load_model_in_actor(ref)
            before = float(model.weight.sum())
            model.weight.fill_(value)
            torch.cuda.synchronize()
            assert torch.all(model.weight == value)
            return str(model.weight.device), torch.cuda.current_device(), before

        source = nn.Linear(2000, 2000)
        ref = prepare_model_for_actors(source)
        actors = [ray.remote(num_gpus=0.5, num_cpus=0.1)(Runner).remote() for _ in range(2)]
        found = ray.get([a.run.remote(load_and_write, ref, float(n)) for n, a in enumerate(actors)])
        for device, current, before in found:
            assert (device, current) == ("cuda:0", 0)
            assert before == pytest.approx(float(source.weight.sum()), abs=0.5)
