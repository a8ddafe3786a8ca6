"""The two functions for actors: what Hugging Face and safetensors see, what it costs, and what bad input gets."""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import copyreg
import dataclasses
import functools
import io
import os
import select
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from known_objects import known_objects
from models import CASES, Reduced, quietly
from torch import nn

from ray_zerocopy import (
    ModelLostError,
    ModelRef,
    ZeroCopyError,
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._device import choose
from ray_zerocopy._model import graph, packing, paths
from ray_zerocopy._store import put, store_place

# ---------------------------------------------------------------- what others make of a loaded model


def test_hugging_face_generates(ray_session: None) -> None:
    """A loaded decoder generates the same tokens as the source."""
    source = CASES["hugging_face_decoder"].make().eval()
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    ids = torch.arange(5)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), source.generate(ids, **options))


def test_ties_are_one_file_entry(ray_session: None, tmp_path: Path) -> None:
    """save_pretrained and safetensors see a loaded model's ties as they see the source's."""
    from safetensors.torch import load_model, save_model

    source = CASES["hugging_face_decoder"].make().eval()
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    for name, model in (("source", source), ("loaded", loaded)):
        model.save_pretrained(tmp_path / name)
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    for one, two in (("source.safetensors", "loaded.safetensors"), ("source/model.safetensors",) * 2):
        assert (tmp_path / one).read_bytes() == (tmp_path / two).read_bytes()
    assert (tmp_path / "loaded/model.safetensors").stat().st_size == (
        tmp_path / "source/model.safetensors"
    ).stat().st_size
    load_model(loaded, str(tmp_path / "source.safetensors"))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_copy_of_a_tensor_costs_that_tensor(ray_session: None) -> None:
    """Deepcopy or torch.save of one small tensor of a loaded model takes that tensor's bytes."""
    loaded = load_model_in_actor(prepare_model_for_actors(CASES["large_layers"].make()))
    bias = loaded[0].bias
    assert copy.deepcopy(bias).untyped_storage().nbytes() == bias.nbytes
    stream = io.BytesIO()
    torch.save(bias, stream)
    assert len(stream.getvalue()) < bias.nbytes + 2000


def test_loads_outside_of_inference_mode(ray_session: None) -> None:
    """A model loaded inside inference_mode can be trained afterwards."""
    ref = prepare_model_for_actors(nn.Linear(4, 4))
    with torch.inference_mode():
        loaded = load_model_in_actor(ref, keep_flags=True)
    loaded(torch.ones(1, 4)).sum().backward()
    assert loaded.weight.grad is not None


def test_a_default_device_does_not_matter(ray_session: None) -> None:
    """A default device or dtype set by the user does not change what is loaded."""
    ref = prepare_model_for_actors(CASES["views"].make())
    with torch.device("meta"):
        loaded = load_model_in_actor(ref)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_object_refs_inside_stay_alive(ray_session: None) -> None:
    """An ObjectRef held by the shared object is carried, and keeps its object for as long as the handle lives."""
    ref = prepare_model_for_actors({"model": nn.Linear(2, 2), "data": ray.put(np.arange(1000))})
    assert ray.get(load_model_in_actor(ref)["data"])[999] == 999


def test_numpy_arrays_are_shared_too(ray_session: None) -> None:
    """A large numpy array is a view of the store, writable like the source, and private to its writer."""
    source = {"table": np.arange(100_000), "fixed": np.arange(50_000)}
    source["fixed"].flags.writeable = False
    ref = prepare_model_for_actors(source)
    assert ref.carried_nbytes < 2000
    one, two = load_model_in_actor(ref), load_model_in_actor(ref)
    assert memory.location(torch.from_numpy(one["table"])) == memory.location(torch.from_numpy(two["table"]))
    one["table"][:] = 0
    assert two["table"][7] == 7
    assert not one["fixed"].flags.writeable


def test_with_rays_own_flag(tmp_path: Path) -> None:
    """Everything in test_models.py holds with RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1 too."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "model/test_models.py"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---------------------------------------------------------------- what it costs


def private_growth(kept: dict[str, Any], ref: ModelRef) -> int:
    """Load a model and touch all of it; return by how much the process's private memory grew."""
    load_model_in_actor(ref)  # the first load of a process imports modules
    before = _private_memory()
    kept["model"] = load_model_in_actor(ref)
    sum(p.sum() for p in kept["model"].parameters())
    return _private_memory() - before


def growth_by_a_call(kept: dict[str, Any], ref: ModelRef) -> int:
    """Load a model whose code has run already and call it; return by how much private memory grew."""
    kept["code"] = load_model_in_actor(ref)
    for _ in range(3):
        kept["code"](torch.ones(1, 1024))
    before = _private_memory()
    kept["model"] = load_model_in_actor(ref)
    kept["model"](torch.ones(1, 1024))
    return _private_memory() - before


def _private_memory() -> int:
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))


def bert_sized() -> nn.Module:
    """Return a random model of BERT-base's size and number of tensors."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def test_private_memory_is_not_the_weights(two_actors: list[Any]) -> None:
    """Loading and reading a model of 438 MB makes an actor's private memory grow by at most 4 MB."""
    ref = prepare_model_for_actors(bert_sized())
    assert ref.nbytes > 430_000_000
    assert ray.get(two_actors[0].run_kept.remote(private_growth, ref)) <= 4_000_000


@pytest.mark.parametrize("way", [torch.jit.script, lambda m: torch.jit.freeze(torch.jit.script(m))])
def test_private_memory_of_torchscript(way: Any, two_actors: list[Any]) -> None:
    """Loading and calling 80 MiB of TorchScript makes private memory grow by at most 4 MB, frozen or not."""
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(20)]).eval()
    ref = prepare_model_for_actors(quietly(lambda: way(net)))
    assert 80 << 20 < ref.nbytes < 81 << 20
    assert ray.get(two_actors[0].run_kept.remote(growth_by_a_call, ref)) <= 4_000_000


def test_preparing_needs_no_second_copy(ray_session: None) -> None:
    """Preparing a model of 438 MB makes the driver's own memory grow by at most 5% of that at any time."""
    source = bert_sized()
    prepare_model_for_actors(source)
    peak = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak.append(anonymous())

    def anonymous() -> int:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    ref = prepare_model_for_actors(source)
    stop.set()
    watcher.join()
    assert len(peak) > 3
    assert max(peak) - before <= 0.05 * ref.nbytes


# ---------------------------------------------------------------- the handle


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_the_handle_is_small_and_says_what_it_is(ray_session: None) -> None:
    """A handle pickles with Ray into little, prints what it stands for, and can be a dict key."""
    ref = prepare_model_for_actors(nn.Linear(512, 512))
    assert len(ray.cloudpickle.dumps(ref)) < 2000
    assert repr(ref).startswith("ModelRef(Linear, 2 tensors, 1.0 MiB shared, ")
    assert {ref: 1}[ref] == 1


def test_many_objects(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model larger than one object's share lies in several objects, and loads as from one."""
    monkeypatch.setattr(put, "OBJECT_BYTES", 1 << 20)
    source = CASES["large_layers"].make()
    ref = prepare_model_for_actors(source)
    assert len(ref.refs) > 1
    loaded = load_model_in_actor(ref)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    assert all(memory.location(p) is not None for p in loaded.parameters())


# ---------------------------------------------------------------- bad input


DEVNULL = open(os.devnull)
atexit.register(DEVNULL.close)
OUTSIDE = nn.Linear(1, 1)


class Holder:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


def lambda_with_poll() -> Any:
    lock = select.poll()
    return lambda: lock


def hook_with_poll() -> Any:
    return lambda module, args, output, lock=select.poll(): None  # noqa: B008


def function_of_a_notebook() -> Any:
    """Return a function that is pickled by value, as those of `__main__` are, and uses a global lock."""
    names: dict[str, Any] = {"__name__": "__main__", "LOCK": select.poll()}
    exec("def report(*args):\n    return LOCK", names)
    return names["report"]


class Chooser:
    """Leaves out one lock by its __getstate__, and not the other."""

    def __init__(self) -> None:
        self.lock = select.poll()
        self.kept = {"deep": select.poll()}

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.kept}


def script_with_poll() -> Any:
    scripted = quietly(lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
    getattr(scripted, "0").lock = select.poll()
    return scripted


def class_with_poll() -> type:
    class Local:
        lock = select.poll()

    return Local


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (lambda m: setattr(m[1], "_lock", select.poll()), r"Sequential\.1\._lock is a select\.poll"),
        (
            lambda m: setattr(m, "config", {"a": [1, select.poll()]}),
            r"Sequential\.config\['a'\]\[1\] is a select",
        ),
        (lambda m: setattr(m[0], "owner", Holder(DEVNULL)), r"Sequential\.0\.owner\.inner is a _io\.TextIO"),
        (lambda m: setattr(m, "make", lambda_with_poll()), r"Sequential\.make\.<closure lock> is a select\.poll"),
        (lambda m: setattr(m[0], "owner", weakref.ref(OUTSIDE)), r"Sequential\.0\.owner is a weakref\.ReferenceType"),
        (
            lambda m: vars(m[0]).update(owner=weakref.proxy(m)),
            r"Sequential\.0\.owner is a weakref\.CallableProxyType",
        ),
        (lambda m: vars(m[0]).update(owner=weakref.proxy(m[0].weight)), r"Sequential\.0\.owner is a weakref\.Proxy"),
        (
            lambda m: vars(m[0]).update(o=(p := [m]), q=[p], z=select.poll()),
            r"Sequential\.0\.z is a select\.poll",
        ),
        (lambda m: vars(m[0]).update(owner=[m, select.poll()]), r"Sequential\.0\.owner\[1\] is a select\.poll"),
        (
            lambda m: m[0].register_forward_hook(hook_with_poll()),
            r"Sequential\.0\._forward_hooks\[\d+\]\.<default lock>",
        ),
        (lambda m: setattr(m, "report", function_of_a_notebook()), r"Sequential\.report\.<global LOCK> is a select"),
        (
            lambda m: setattr(m, "owner", class_with_poll()()),
            r"Sequential\.owner\.__class__\.lock is a select\.poll",
        ),
        (
            lambda m: setattr(m, "seen", {1: 2, weakref.ref(OUTSIDE): 3}),
            r"Sequential\.seen\.keys\(\)\[1\] is a weakref",
        ),
        (lambda m: setattr(m, "owner", Chooser()), r"Sequential\.owner\.kept\['deep'\] is a select\.poll"),
        (lambda m: m.append(script_with_poll()), r"Sequential\.2\.0\.lock is a select\.poll"),
        (lambda m: setattr(m, "steps", (i for i in range(3))), r"Sequential\.steps is a builtins\.generator"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_pickled_is_named(place: Any, path: str, ray_session: None) -> None:
    """The error names the path of the attribute and the remedy, and nothing is left in the store."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model)
    before = known_objects()
    with pytest.raises(
        TypeError, match=rf"Sequential cannot be shared: {path}.*(in the worker|Hold the object|list of its items)"
    ):
        prepare_model_for_actors(model)
    assert known_objects() <= before, "what was known before may have gone since"


def test_a_model_larger_than_the_store(ray_session: None) -> None:
    """A model that the store cannot hold is refused before anything is put, with sizes and the setting."""
    before = known_objects()
    with pytest.raises(ZeroCopyError, match=r"1\.5 GiB to share.*holds 1\.0 GiB.*object_store_memory="):
        prepare_model_for_actors(torch.empty(3 << 29, dtype=torch.uint8))
    assert known_objects() <= before, "what was known before may have gone since"


def test_rays_without_names_of_sessions(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.44 has no name for its session: another sign of it does, and a handle of another one is told."""
    monkeypatch.delattr(ray.runtime_context.RuntimeContext, "get_session_name")
    ref = prepare_model_for_actors(nn.Linear(2, 2))
    assert load_model_in_actor(ref).in_features == 2
    with pytest.raises(ModelLostError, match="from another Ray session"):
        load_model_in_actor(dataclasses.replace(ref, session="127.0.0.1:1"))


@pytest.mark.parametrize("wrong", [None, "ref", 3, nn.Linear(1, 1)])
def test_what_is_no_handle(wrong: Any, ray_session: None) -> None:
    """Anything but a handle is a TypeError that says how to make one."""
    with pytest.raises(TypeError, match=r"a ModelRef is needed.*prepare_model_for_actors"):
        load_model_in_actor(wrong)


def test_an_object_ref_is_no_model(ray_session: None) -> None:
    """An ObjectRef given for a model, and a handle shared twice, are said to be that."""
    with pytest.raises(TypeError, match="an ObjectRef was given"):
        prepare_model_for_actors(ray.put(1))
    with pytest.raises(TypeError, match="is shared already"):
        prepare_model_for_actors(prepare_model_for_actors(nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "None was"),
        ("bert-base", "'bert-base' was"),
        (Path("model.pt"), "model.pt"),
        (nn.Linear, "class Linear"),
    ],
)
def test_what_is_not_yet_a_model(wrong: Any, words: str, ray_session: None) -> None:
    """A name, a path, a class, or nothing, given for a model, is refused where it is shared."""
    with pytest.raises(TypeError, match=rf"{words}.*given where a model is to be shared"):
        prepare_model_for_actors(wrong)


def test_a_handle_from_another_session(ray_session: None) -> None:
    """A handle from an earlier Ray session is an error at once, not a wait for what never comes."""
    ref = prepare_model_for_actors(nn.Linear(1, 1))
    foreign = ModelRef(ref.class_name, ref.nbytes, ref.carried_nbytes, ref.tensors, ref.refs, "session_of_old")
    with pytest.raises(ModelLostError, match=r"another Ray session \(session_of_old\).*again"):
        load_model_in_actor(foreign)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu9", "is not a device that torch knows"),
        ([1], "is not a device that torch knows"),
        ("meta", "holds no weights"),
        ("cuda", "finds no usable CUDA device|Ray assigned no GPU"),
        ("mps", "this machine has no mps device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_unknown_devices(device: Any, words: str, ray_session: None) -> None:
    """A device that is unknown or absent is a ValueError that names it."""
    ref = prepare_model_for_actors(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=words):
        load_model_in_actor(ref, device=device)


def test_no_gpu_assigned_means_cpu(two_actors: list[Any]) -> None:
    """In a worker without GPUs None and "auto" are the CPU, and "cuda" is an error that says what to ask Ray for."""

    def devices(ref: ModelRef) -> list[str]:
        said = [str(load_model_in_actor(ref, device=d).weight.device) for d in (None, "auto", "cpu")]
        try:
            load_model_in_actor(ref, device="cuda")
        except ValueError as error:
            said.append(str(error))
        return said

    ref = prepare_model_for_actors(nn.Linear(1, 1))
    *found, refusal = ray.get(two_actors[0].run.remote(devices, ref))
    assert found == ["cpu"] * 3
    assert "Ray assigned no GPU to this worker. Ask for one" in refusal


@pytest.mark.parametrize(
    ("visible", "assigned", "device", "expected"),
    [
        ("3", ["3"], None, "cuda:0"),
        ("3,5", ["5"], "auto", "cuda:1"),
        (None, ["2"], None, "cuda:2"),
        ("GPU-abc", ["GPU-abc"], None, "cuda:0"),
        ("0", [], None, "cpu"),
    ],
)
def test_the_device_is_rays_choice(
    visible: str | None, assigned: list[str], device: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None and "auto" are the GPU that Ray assigned, as torch counts the visible ones."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose.resolve_device(device, assigned) == torch.device(expected)


def test_a_hidden_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Ray assigned but the environment hides is an error that names both."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ValueError, match=r"Ray assigned GPU 0.*CUDA_VISIBLE_DEVICES='1' hides it"):
        choose.resolve_device(None, ["0"])


# ---------------------------------------------------------------- reports


def test_model_memory_of_a_handle_and_of_a_copy(ray_session: None) -> None:
    """The report counts a handle's bytes as shared, a copy's as private, and names the largest."""
    source = CASES["large_layers"].make()
    ref = prepare_model_for_actors(source)
    total = sum(p.nbytes for p in source.parameters())
    shared = memory.model_memory(ref)
    assert (shared.shared, shared.private, shared.largest_private) == (total, 0, ())
    copied = memory.model_memory(copy.deepcopy(load_model_in_actor(ref)), largest=2)
    assert (copied.shared, copied.private) == (0, total)
    assert [path for path, _ in copied.largest_private] == ["Sequential.2.weight", "Sequential.0.weight"]
    assert "1.0 MiB  Sequential.2.weight" in str(copied)


class KeepsModel:
    def __init__(self, ref: ModelRef) -> None:
        self.model = load_model_in_actor(ref)

    def write(self) -> int:
        self.model.weight.data[0, 0] = 1
        return os.getpid()


def test_pool_memory(ray_session: None) -> None:
    """The report over a pool, by handle and by actors, has its processes, private pages, and the cost of copies."""
    ref = prepare_model_for_actors(nn.Linear(1024, 1024))
    actors = [ray.remote(num_cpus=0.1)(KeepsModel).remote(ref) for _ in range(2)]
    writer, _ = pids = ray.get([actors[0].write.remote(), actors[1].__ray_call__.remote(_pid)])
    for pool in (ref, actors):
        found = memory.pool_memory(pool)
        assert sorted(p.pid for p in found.processes) == sorted(pids)
        assert {p.pid: p.model_private for p in found.processes} == {pids[0]: 4096, pids[1]: 0}
        assert all(p.mapped >= ref.nbytes and p.private > 0 and p.pss > 0 for p in found.processes)
        assert found.copies >= 2 * ref.nbytes
        assert ref.nbytes <= found.stored <= ref.nbytes + 8192
        assert str(writer) in str(found)
        assert "2 separate copies would take 8.0 MiB" in str(found)
    with pytest.raises(TypeError, match="takes a ModelRef or actor handles"):
        memory.pool_memory([1])


def _pid(_: Any) -> int:
    return os.getpid()


def test_a_location_is_of_a_tensor() -> None:
    """Anything but a tensor has no location, and is named."""
    with pytest.raises(TypeError, match=r"location takes a tensor, not a numpy.ndarray"):
        memory.location(np.ones(3))  # type: ignore[arg-type]


def test_walk_never_runs_a_property() -> None:
    """Looking for tensors and paths reads no property."""

    class Trap:
        __slots__ = ("__hidden", "seen")

        def __init__(self) -> None:
            self.__hidden = torch.ones(1)
            self.seen = [torch.zeros(1)]

        @property
        def trap(self) -> None:
            raise AssertionError("a property was run")

    found = [path for path, part in paths.walk(Trap(), "trap") if isinstance(part, torch.Tensor)]
    assert found == ["trap.__hidden", "trap.seen[0]"]


def test_memory_counts_arrays_and_hidden_places(ray_session: None) -> None:
    """Numpy arrays, and tensors in deques and partials, are counted, and two tensors over one array once."""
    array = np.zeros(500_000, dtype=np.float32)
    pair = [torch.from_numpy(array), torch.from_numpy(array)]
    hidden = {"deque": collections.deque([torch.zeros(1000)]), "partial": functools.partial(print, torch.zeros(500))}
    source = {"pair": pair, "array": array[:2000], "other": np.ones(100_000), **hidden}
    total = array.nbytes + 800_000 + 4000 + 2000
    assert (memory.model_memory(source).shared, memory.model_memory(source).private) == (0, total)
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert memory.model_memory(loaded).private == 0
    loaded["other"][50_000] = 7  # in the middle: at the ends another tensor may have part of the page
    ((path, nbytes),) = memory.model_memory(loaded).largest_private
    assert path == "dict['other']"
    assert 0 < nbytes <= 4096


def test_small_tensors_are_packed_in_pieces(ray_session: None) -> None:
    """A model of small tensors only is packed piece by piece: no second copy of it in the driver at any time."""
    source = [torch.full((1000,), float(i)) for i in range(10_000)]
    pieces = [b for b in packing.pack(graph.take_apart(source).tensors).buffers if b.is_packed]
    assert max(piece.nbytes for piece in pieces) <= max(0.04 * 40_000_000, 4 << 20)
    ref = prepare_model_for_actors(source)
    assert len(ref.refs) == len(pieces) > 5
    assert all(torch.equal(a, b) for a, b in zip(source, load_model_in_actor(ref), strict=True))


def exhaust_files(ref: ModelRef) -> tuple[int, str]:
    """Load three hundred times under a limit of a hundred more files, then load with none left."""
    import resource

    used = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, hard))
    opened = []
    try:
        kept = [load_model_in_actor(ref) for _ in range(300)]
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        try:
            load_model_in_actor(ref)
        except ZeroCopyError as error:
            return len(kept), str(error)
        return len(kept), ""
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_loads_take_no_files(two_actors: list[Any]) -> None:
    """Live loads hold no descriptors; and with none left a load is an error, never a load without isolation."""
    loads, said = ray.get(two_actors[1].run.remote(exhaust_files, prepare_model_for_actors(nn.Linear(512, 512))))
    assert loads == 300
    assert "cannot map the model: Too many open files" in said


def test_a_train_of_ones_own_is_not_called(ray_session: None) -> None:
    """A class whose `train` is a training loop is put in eval mode by its flag."""

    class Trainer(nn.Linear):
        def train(self, dataset: Any = True) -> Any:
            raise AssertionError("the training loop was run")

    loaded = load_model_in_actor(prepare_model_for_actors(nn.Sequential(Trainer(2, 2))))
    assert not loaded.training
    assert not loaded[0].training


class OwnEval(nn.Linear):
    """Means something else by `eval` than torch does."""

    def eval(self, data: Any) -> Any:
        raise AssertionError("the evaluation was run")


class EvalOfItself(nn.Sequential):
    """Has an `eval` that leaves everything in train mode."""

    def eval(self) -> Any:
        self.asked = True
        return self


class ReducedOwnEval(OwnEval):
    """Is built anew by its own reducer."""

    def __reduce__(self) -> Any:
        return ReducedOwnEval, (2, 2)


@pytest.mark.parametrize("make", [lambda: OwnEval(2, 2), lambda: ReducedOwnEval(2, 2)])
def test_an_eval_of_ones_own_is_not_called(make: Any, ray_session: None) -> None:
    """A class whose `eval` takes arguments is put in eval mode by its flag, alone or inside others."""
    for model in (make(), nn.Sequential(make(), nn.Dropout())):
        loaded = load_model_in_actor(prepare_model_for_actors(model))
        assert not any(part.training for part in loaded.modules())
        assert not any(p.requires_grad for p in loaded.parameters())


def test_an_eval_that_does_nothing(ray_session: None) -> None:
    """Where an `eval` of one's own gives no eval mode, the flags give it all the same."""
    loaded = load_model_in_actor(prepare_model_for_actors(EvalOfItself(nn.Dropout(), nn.BatchNorm1d(2))))
    assert loaded.asked
    assert not any(part.training for part in loaded.modules())


class Slotted(torch.Tensor):
    """A tensor subclass with a slot."""

    __slots__ = ("unit",)


def subclassed() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.randn(2, 2).as_subclass(Slotted))
    model.weight.unit = "mm"
    model.weight.shard = {"dim": 0}
    model.prompt = torch.randn(2).as_subclass(Slotted).requires_grad_()
    return model


@pytest.mark.parametrize("grad", [True, False])
def test_tensor_subclasses_keep_or_lose_their_gradients(grad: bool, ray_session: None) -> None:
    """Tensors of a subclass are leaves, which want a gradient with keep_flags only, and keep all else."""
    source = subclassed()
    skeleton, refs = rewrite_pipeline_for_actors({"model": source, "prompt": source.prompt})
    with torch.set_grad_enabled(grad):
        for load in (
            lambda **how: load_model_in_actor(prepare_model_for_actors(source), **how),
            lambda **how: load_pipeline_in_actor(skeleton, refs, **how)["model"],
        ):
            plain, kept = load(), load(keep_flags=True)
            for model in (plain, kept):
                assert type(model.weight) is type(model.prompt) is Slotted
                assert isinstance(model.weight, nn.Parameter)
                assert (model.weight.unit, model.weight.shard) == ("mm", {"dim": 0})
                assert torch.equal(model.weight, source.weight)
                assert model.weight.is_leaf
                assert model.prompt.is_leaf
            assert not any(p.requires_grad for p in (*plain.parameters(), plain.prompt))
            assert all(p.requires_grad for p in (*kept.parameters(), kept.prompt))
    before = kept.weight.detach().clone()
    optimizer = torch.optim.SGD([*kept.parameters(), kept.prompt], lr=1.0)
    (kept(torch.ones(1, 2)) * kept.prompt).sum().backward()
    optimizer.step()
    assert kept.prompt.grad is not None
    assert not torch.equal(before, kept.weight)
    prompt = load_pipeline_in_actor(skeleton, refs, keep_flags=True)["prompt"]
    assert prompt.is_leaf
    assert prompt.requires_grad


def test_reducers_of_others_are_kept(ray_session: None) -> None:
    """A reducer that somebody registered for a module's class is what pickles it."""

    class Guarded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.lock = threading.Lock()

    copyreg.pickle(Guarded, lambda module: (nn.Linear, (module.in_features, module.out_features)))
    try:
        assert type(load_model_in_actor(prepare_model_for_actors(nn.Sequential(Guarded())))[0]) is nn.Linear
    finally:
        del copyreg.dispatch_table[Guarded]


FULL_STORE = """
import numpy as np, ray, torch, warnings
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
from ray_zerocopy import prepare_model_for_actors, load_model_in_actor, memory, ZeroCopyWarning
held = ray.put(np.ones(70_000_000, dtype=np.uint8))
kept = ray.get(held)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ref = prepare_model_for_actors(torch.nn.Linear(3500, 3500))
said = [str(w.message) for w in caught if w.category is ZeroCopyWarning]
assert len(said) == 1 and "Linear (46.7 MiB) is in a file on disk in /" in said[0], said
assert "has 66.8 MiB of 95.4 MiB in use" in said[0], said
loaded = load_model_in_actor(ref, require_isolation=True)
assert len(memory.pool_memory(ref).processes) == 1, memory.pool_memory(ref)
ray.shutdown()
"""


STORE_ON_DISK = """
import os, sys, ray, torch, warnings
ray.init(
    "local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, logging_level="error",
    _plasma_directory=sys.argv[1],
)
from ray_zerocopy import prepare_model_for_actors, load_model_in_actor, memory, ZeroCopyWarning
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    refs = [prepare_model_for_actors(torch.nn.Linear(500, 500)) for _ in range(2)]
    models = [load_model_in_actor(ref, require_isolation=True) for ref in refs]
said = [str(w.message) for w in caught if w.category is ZeroCopyWarning]
assert len(said) == 1 and f"not in memory: it is in {sys.argv[1]} (" in said[0] and "95.4 MiB" in said[0], said
ray.shutdown()
"""


@pytest.mark.parametrize("script", [FULL_STORE, STORE_ON_DISK])
def test_a_store_on_disk_is_said(script: str, tmp_path: Path) -> None:
    """A model in a file on disk, and a store on disk, give one warning each, with the place and sizes."""
    if script is STORE_ON_DISK and store_place._file_system(str(tmp_path)) == "tmpfs":
        pytest.skip("the temporary directory is in memory")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_pool_memory_of_the_dead_and_the_foreign(ray_session: None) -> None:
    """A dead actor is counted as dead, and a foreign handle is an error."""
    ref = prepare_model_for_actors(nn.Linear(64, 64))
    actors = [ray.remote(num_cpus=0.1)(KeepsModel).remote(ref) for _ in range(2)]
    ray.get([actor.__ray_call__.remote(_pid) for actor in actors])
    ray.kill(actors[0])
    found = memory.pool_memory(actors)
    assert len(found.processes) == found.dead == 1
    assert "1 of the actors had died" in str(found)
    assert len(memory.pool_memory(actors[1]).processes) == 1
    with pytest.raises(ModelLostError, match="another Ray session"):
        memory.pool_memory(ModelRef("Linear", 1, 1, 1, ref.refs, "old"))


def test_flags_of_what_pickles_itself(ray_session: None) -> None:
    """A module with a __reduce__ of its own is in eval mode and without gradients all the same."""
    loaded = load_model_in_actor(prepare_model_for_actors(nn.Sequential(Reduced(3)).eval()))
    assert not loaded[0].training
    assert not loaded[0].weight.requires_grad


def test_script_functions_and_packed_scripts_are_counted(ray_session: None) -> None:
    """A traced function's constants and a scripted layer's packed weights are in the report."""
    weight = torch.randn(300, 300)
    function, packed = quietly(
        lambda: (
            torch.jit.trace(lambda x: x @ weight, torch.randn(2, 300)),
            torch.jit.script(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(300, 300)))),
        )
    )
    assert memory.model_memory(prepare_model_for_actors([function])).shared == weight.nbytes
    assert memory.model_memory(prepare_model_for_actors(packed)).private >= 300 * 300


def test_an_exported_module_is_refused_with_advice(ray_session: None) -> None:
    """What torch.export's module() gives cannot be pickled, and the error says what to share in its place."""
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(TypeError, match="Share the ExportedProgram"):
        prepare_model_for_actors(program.module())
    loaded = load_model_in_actor(prepare_model_for_actors(program))
    x = torch.randn(1, 2)
    assert torch.equal(loaded.module()(x), program.module()(x))
