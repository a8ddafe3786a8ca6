"""Tensors that have no values in the driver, and `dtype=` on tensors that other tensors depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from describe import describe
from torch import nn

from ray_zerocopy.actor import load_model_in_actor, prepare_model_for_actors, rewrite_pipeline_for_actors
from ray_zerocopy.invoke import rewrite_pipeline


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def half_loaded() -> nn.Module:
    """A skeleton that received a state dict with one layer missing."""
    model = nn.Sequential(on_meta(), nn.Linear(4, 4))
    model[0][1].to_empty(device="cpu")
    return model


class Tied(nn.Module):
    """Has an output layer that a checkpoint leaves out, because it is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        with torch.device("meta"):
            self.output = nn.Linear(4, 8, bias=False)


class Pipeline:
    def __init__(self) -> None:
        self.encoder = nn.Linear(4, 4)
        self.stages = [{"model": on_meta()}]


def lazy_in_list() -> dict[str, Any]:
    return {"models": [nn.LazyLinear(4)], "ready": nn.Linear(2, 2)}


def buffer_only() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.empty(4, device="meta"))
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (on_meta, r"Sequential\.0\.weight.*\.0\.bias.*are on the meta device.*load_state_dict\(.*allow_meta=True"),
        (half_loaded, r"Sequential\.0\.0\.weight, Sequential\.0\.0\.bias are on the meta device"),
        (Tied, r"Tied\.output\.weight is on the meta device.*tie_weights"),
        (buffer_only, r"Linear\.mask is on the meta device"),
        (lazy_in_list, r"dict\['models'\]\[0\]\.weight.*not initialized.*Call the model once"),
        (lambda: nn.LazyConv2d(2, 3), r"LazyConv2d\.weight.*not initialized"),
        (lambda: torch.empty(3, device="meta"), r"Tensor is on the meta device"),
        (lambda: [nn.Parameter(torch.empty(1, device="meta")) for _ in range(9)], r"list\[0\].* and 4 more tensors"),
    ],
)
def test_tensors_without_values_are_refused_by_name(make: Callable[[], Any], words: str, ray_session: None) -> None:
    """A tensor on the meta device or in a lazy module is a ValueError with its path and the remedy."""
    with pytest.raises(ValueError, match=words):
        prepare_model_for_actors(make())


@pytest.mark.parametrize("rewrite", [rewrite_pipeline_for_actors, rewrite_pipeline])
def test_pipelines_name_the_path_from_the_pipeline(rewrite: Callable[..., Any], ray_session: None) -> None:
    """A pipeline's model on the meta device is named by its path in the pipeline, and can be let through."""
    pipeline = Pipeline()
    with pytest.raises(ValueError, match=r"Pipeline\.stages\[0\]\['model'\].*\.0\.weight.*meta device"):
        rewrite(pipeline)
    rewrite(pipeline, allow_meta=True)


@pytest.mark.parametrize("make", [on_meta, half_loaded, lazy_in_list, buffer_only])
def test_allow_meta_shares_the_model_as_it_is(make: Callable[[], Any], ray_session: None) -> None:
    """With allow_meta=True the loaded model is the source: same shapes, same devices, lazy where it was lazy."""
    source = make()
    ref = prepare_model_for_actors(source, allow_meta=True)
    assert describe(load_model_in_actor(ref, keep_flags=True)) == describe(source)


def test_disk_offload_names_the_folder(ray_session: None, tmp_path: Path) -> None:
    """Weights that accelerate keeps in a folder are a ValueError that names weights, folder and remedy."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    accelerate.disk_offload(model, offload_dir=str(tmp_path / "offloaded"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Sequential\.0\.weight.*offloaded to disk.*offloaded, which.*without disk"):
        prepare_model_for_actors(model)


def test_disk_offload_of_one_layer(ray_session: None, tmp_path: Path) -> None:
    """A device map that puts one layer on disk is refused, and the error names this layer only."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    placed = accelerate.dispatch_model(
        model, device_map={"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    with pytest.raises(ValueError, match=r"Sequential\.1\.weight, Sequential\.1\.bias are offloaded"):
        prepare_model_for_actors(placed)


def test_cpu_offload_works(ray_session: None) -> None:
    """A model that accelerate offloaded to the CPU arrives with its weights, and they are shared."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.ones(1, 64)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    ref = prepare_model_for_actors(model)
    assert ref.nbytes > 2 * 64 * 64 * 4
    assert torch.equal(load_model_in_actor(ref)(x), expected)


# ---------------------------------------------------------------- dtype= and tensors that others depend on


class QuantState:
    """Scales of a quantized tensor, themselves quantized: as bitsandbytes keeps them for four bits."""

    def __init__(self, scales: torch.Tensor, nested: QuantState | None = None) -> None:
        self.absmax, self.state2 = scales, nested
        self.code = torch.linspace(-1, 1, 16)


class Params4bit(nn.Parameter):
    """A Parameter of packed bytes, whose scales hang on an attribute."""

    quant_state: QuantState


class ScaledParameter(nn.Parameter):
    """A Parameter whose own values are floating, and that is meant to stay in this dtype."""


class Linear4bit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        packed = torch.arange(32, dtype=torch.uint8).reshape(8, 4)
        self.weight = Params4bit(packed, requires_grad=False)
        self.weight.quant_state = QuantState(torch.rand(8), QuantState(torch.rand(2)))
        self.bias = nn.Parameter(torch.rand(8))
        self.norm = nn.LayerNorm(8)


def test_dtype_leaves_the_scales_of_a_quantized_parameter(ray_session: None) -> None:
    """`dtype=` converts the plain tensors of a model and leaves what a quantized parameter depends on."""
    source = Linear4bit()
    loaded = load_model_in_actor(prepare_model_for_actors(source), dtype=torch.bfloat16)
    state = loaded.weight.quant_state
    assert {state.absmax.dtype, state.state2.absmax.dtype, state.code.dtype} == {torch.float32}
    assert torch.equal(state.state2.absmax, source.weight.quant_state.state2.absmax)
    assert {loaded.bias.dtype, loaded.norm.weight.dtype} == {torch.bfloat16}
    assert type(loaded.weight) is Params4bit
    assert torch.equal(loaded.weight, source.weight)


def test_dtype_leaves_a_parameter_subclass(ray_session: None) -> None:
    """A Parameter subclass keeps its dtype, also where a plain module holds it beside plain parameters."""
    module = nn.Linear(4, 4)
    module.weight = ScaledParameter(torch.rand(4, 4))
    loaded = load_model_in_actor(prepare_model_for_actors(module), dtype=torch.float16)
    assert (loaded.weight.dtype, loaded.bias.dtype) == (torch.float32, torch.float16)


def test_dtype_leaves_scales_shared_with_a_buffer(ray_session: None) -> None:
    """A tensor that is both a buffer and a scale of a parameter keeps its dtype under both names."""
    module = Linear4bit()
    module.register_buffer("scales", module.weight.quant_state.absmax)
    loaded = load_model_in_actor(prepare_model_for_actors(module), dtype=torch.float16)
    assert loaded.scales is loaded.weight.quant_state.absmax
    assert loaded.scales.dtype == torch.float32


def test_freed_storages_are_refused_by_name() -> None:
    """A weight whose storage was resized, to nothing or to a part, is refused by name."""
    for nbytes in (0, 16):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight.untyped_storage().resize_(nbytes)
        with pytest.raises(ValueError, match=r"Sequential\.1\.weight is without values.*resize_"):
            prepare_model_for_actors(model)


def test_a_sparse_tensor_without_values_is_refused_by_name() -> None:
    """A sparse tensor on the meta device is refused by name."""
    model = nn.Module()
    model.links = torch.eye(4).to_sparse().to("meta")
    with pytest.raises(ValueError, match=r"Module\.links is on the meta device"):
        prepare_model_for_actors(model)
