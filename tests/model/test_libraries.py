"""What a driver changes in a library, and what torch drops: registries, methods, generated modules, inverses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import Runner
from models import quietly
from test_functions import run_as_script
from torch import nn
from torch.distributions import transforms

from ray_zerocopy import ZeroCopyWarning, load_model_in_actor, prepare_model_for_actors

X = torch.tensor([[0.25, 0.5]])
IDS = torch.tensor([[1, 2, 3]])

# ---------------------------------------------------------------- inverse transforms

SIGMOID, AFFINE = transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0)
INVERSE = {
    "single": lambda: SIGMOID.inv,
    "composed": lambda: transforms.ComposeTransform([AFFINE, SIGMOID]).inv,
    "with_a_cache": lambda: transforms.ExpTransform(cache_size=1).inv,
    "in_a_distribution": lambda: (
        torch.distributions.TransformedDistribution(
            torch.distributions.Normal(0.0, 1.0), [AFFINE.inv, transforms.TanhTransform()]
        ).log_prob
    ),
}


class Transformed(nn.Module):
    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.transform(x * self.scale)


def call(model_ref: Any, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = load_model_in_actor(model_ref)(*inputs)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("name", INVERSE)
def test_inverse_transforms(name: str, two_actors: list[Any]) -> None:
    """The inverse of a transform arrives with the transform, which torch's own pickle leaves out."""
    model = Transformed(INVERSE[name]())
    with torch.no_grad():
        expected = model(X)
    assert torch.equal(ray.get(two_actors[0].run.remote(call, prepare_model_for_actors(model), X)), expected)


def test_an_inverse_and_its_transform_stay_a_pair(ray_session: None) -> None:
    """A model that holds a transform and its inverse gets both, and each is the inverse of the other."""
    model = nn.Linear(2, 2)
    model.transform, model.inverse = AFFINE, AFFINE.inv
    loaded = load_model_in_actor(prepare_model_for_actors(model))
    assert loaded.inverse.inv is loaded.transform
    assert loaded.transform.inv is loaded.inverse


# ---------------------------------------------------------------- registries of transformers

LLAMA = """
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
)).eval()
"""
ATTENTION = {
    "lambda": """
        AttentionInterface.register("doubled", lambda *a, **k: (sdpa_attention_forward(*a, **k)[0] * 2, None))
        AttentionMaskInterface.register("doubled", sdpa_mask)
        """,
    "partial": """
        import functools
        def scaled(factor, *a, **k): return sdpa_attention_forward(*a, **k)[0] * factor, None
        AttentionInterface.register("doubled", functools.partial(scaled, 2))
        AttentionMaskInterface.register("doubled", sdpa_mask)
        """,
    "object_and_mask": """
        class Scaled:
            def __call__(self, *a, **k): return sdpa_attention_forward(*a, **k)[0] * 2, None
        AttentionInterface.register("doubled", Scaled())
        AttentionMaskInterface.register("doubled", lambda *a, **k: sdpa_mask(*a, **k))
        """,
}


@pytest.fixture
def registries() -> Iterator[None]:
    """Remove what a test registers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop("doubled", None)


@pytest.mark.parametrize("name", ATTENTION)
def test_registered_attention(name: str, registries: None, ray_session: None) -> None:
    """A worker that has registered nothing computes with the attention that the driver registered."""
    model = run_as_script(LLAMA + textwrap.dedent(ATTENTION[name]))["model"]
    with torch.no_grad():
        plain = model(IDS).logits
        model.set_attn_implementation("doubled")
        expected = model(IDS).logits
    assert not torch.allclose(plain, expected)
    worker = ray.remote(num_cpus=0.1)(Runner).remote()  # a new process, which has registered nothing
    torch.testing.assert_close(ray.get(worker.run.remote(call, prepare_model_for_actors(model), IDS)), expected)
    ray.kill(worker)


def test_models_that_use_no_registered_function(registries: None, ray_session: None) -> None:
    """A function that is registered and not used is not sent with a model."""
    names = run_as_script(LLAMA + "data = bytes(2_000_000)\nAttentionInterface.register('doubled', lambda *a: data)")
    assert prepare_model_for_actors(names["model"]).carried_nbytes < 1_000_000


def test_two_functions_of_one_name(registries: None, ray_session: None) -> None:
    """Two models register a function each under one name: the worker computes with that of the last load."""
    model_refs, expected = [], []
    for factor in (2, 5):
        source = ATTENTION["lambda"].replace("* 2", f"* {factor}")
        model = run_as_script(LLAMA + textwrap.dedent(source))["model"]
        model.set_attn_implementation("doubled")
        with torch.no_grad():
            expected.append(model(IDS).logits)
        model_refs.append(prepare_model_for_actors(model))
    assert not torch.allclose(*expected)
    worker = ray.remote(num_cpus=0.1)(Runner).remote()
    for number in (0, 1, 0):
        torch.testing.assert_close(ray.get(worker.run.remote(call, model_refs[number], IDS)), expected[number])
    ray.kill(worker)


# ---------------------------------------------------------------- replaced methods

REPLACED = {
    "method": ("class A:\n    f = lambda self, x: x * 3\nSilu.forward = A.f", "forward"),
    "wrapped": (
        "import functools\nown = Silu.forward\nSilu.forward = functools.wraps(own)(lambda self, x: own(self, x) * 3)",
        "forward",
    ),
    "base_class": ("nn.Module.describe = lambda self: 'mine'", "describe"),
    "static_method": ("Silu.scale = staticmethod(lambda x: x * 3)", "scale"),
    "property": ("Silu.device = property(lambda self: 'cpu')", "device"),
    "decorated_by_torch": ("Silu.forward = torch.no_grad()(lambda self, x: x * 3)", "forward"),
    "partial_method": (
        "import functools as f\ndef scale(self, x, by): return x * by\nSilu.forward = f.partialmethod(scale, by=3)",
        "forward",
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_method_is_a_warning(name: str, ray_session: None) -> None:
    """A script replaces a method of a library's class: prepare says that workers do not get it."""
    source, attribute = REPLACED[name]
    kept = {kind: dict(vars(kind)) for kind in (nn.SiLU, nn.Module)}
    try:
        model = run_as_script("Silu = nn.SiLU\nmodel = nn.Sequential(nn.Linear(2, 2), nn.SiLU())\n" + source)["model"]
        with pytest.warns(
            ZeroCopyWarning, match=rf"\.{attribute} was replaced by a function of __main__.*imports=\["
        ):
            prepare_model_for_actors(model)
    finally:
        for kind, attributes in kept.items():
            for changed in [key for key, value in vars(kind).items() if attributes.get(key) is not value]:
                if changed in attributes:
                    setattr(kind, changed, attributes[changed])
                else:
                    delattr(kind, changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model_for_actors(model)


def test_a_replaced_method_of_a_class_of_the_script(two_actors: list[Any]) -> None:
    """The class of a script travels by value, with what replaced its method."""
    source = "class Net(nn.Linear):\n    pass\nNet.forward = lambda self, x: x * 3\nmodel = Net(2, 2)"
    model_ref = prepare_model_for_actors(run_as_script(source)["model"])
    assert torch.equal(ray.get(two_actors[0].run.remote(call, model_ref, X)), X * 3)


# ---------------------------------------------------------------- modules that a package writes at run time


def generated_module(package: str, folder: Path, source: str) -> types.ModuleType:
    """Import a source file from a folder as a module of an installed package, as libraries with templates do."""
    name = f"{package}.generated_{folder.name.replace('-', '_')}"
    importlib.import_module(package)
    file = folder / "generated.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GENERATED = """
import torch
FACTOR = 3
def times(self, x):
    return helper(x)
def helper(x):
    return x * FACTOR
class Net(torch.nn.Linear):
    forward = times
"""


@pytest.mark.parametrize("form", ["class", "bound_method", "function"])
@pytest.mark.parametrize("package", ["hypothesis", "torch.nn"])
def test_generated_modules(form: str, package: str, tmp_path: Path, two_actors: list[Any]) -> None:
    """A module that exists in this process only travels by value, though its package can be imported."""
    module = generated_module(package, tmp_path, GENERATED)
    try:
        if form == "class":
            model = module.Net(2, 2)
        else:
            model = nn.Linear(2, 2)
            model.forward = types.MethodType(module.times, model) if form == "bound_method" else module.helper
        model_ref = quietly(lambda: prepare_model_for_actors(model))
    finally:
        del sys.modules[module.__name__]
    assert torch.equal(ray.get(two_actors[0].run.remote(call, model_ref, X)), X * 3)


# ---------------------------------------------------------------- what a user sets on a traced graph


class Adds(nn.Module):
    def forward(self, pair: Any) -> torch.Tensor:
        return pair[0] + pair[1]


def read_marks(model_ref: Any, inputs: Any) -> Any:
    model = load_model_in_actor(model_ref)
    marks = {node.name: (getattr(node, "tag", None), node.meta.get("stage")) for node in model.graph.nodes}
    return getattr(model.graph, "origin", None), marks, model(inputs)


@pytest.mark.parametrize("form", ["nodes", "code"])
def test_attributes_of_a_graph_and_its_nodes(form: str, two_actors: list[Any]) -> None:
    """What a user set on a graph, on nodes and in their `meta` arrives.

    Where the graph travels as code, torch traces the code again, and the placeholders get other names.
    """
    if form == "nodes":
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    else:
        model = torch.fx.symbolic_trace(Adds(), concrete_args={"pair": (torch.fx.PH, torch.fx.PH)})
    model.graph.origin = "user"
    for number, node in enumerate(model.graph.nodes):
        node.tag, node.meta["stage"] = f"node {number}", number
    inputs = X if form == "nodes" else (X, X)
    origin, marks, output = ray.get(two_actors[0].run.remote(read_marks, prepare_model_for_actors(model), inputs))
    nodes = [node for node in model.graph.nodes if form == "nodes" or node.op != "placeholder"]
    assert origin == "user"
    assert {node.name: marks[node.name] for node in nodes} == {n.name: (n.tag, n.meta["stage"]) for n in nodes}
    torch.testing.assert_close(output, model(inputs))


def test_attributes_of_a_graph_that_cannot_be_pickled(two_actors: list[Any]) -> None:
    """One that cannot be pickled is a warning, and the others arrive."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    first = next(iter(model.graph.nodes))
    first.tag, first.meta["stage"] = (step for step in "ab"), 3
    with pytest.warns(ZeroCopyWarning, match=f"'tag' of the node {first.name} of a GraphModule cannot be pickled"):
        model_ref = prepare_model_for_actors(model)
    assert ray.get(two_actors[0].run.remote(read_marks, model_ref, X))[1][first.name] == (None, 3)
