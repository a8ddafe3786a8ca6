"""A stand-in answers what the model answers without its weights: properties, parts, attributes of the class."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from typing import Any

import pytest
import ray
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from ray_zerocopy.invoke import RemoteModel, rewrite_pipeline


class Config(types.SimpleNamespace):
    """A configuration, as an object."""


class Unet(nn.Module):
    """A model as those of diffusers: its config is a property, and old attributes are looked up in it."""

    main_input_name = "sample"
    counts_of_loads = 0

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self._internal = {"width": width, "in_channels": 4}
        self.settings = Config(eps=1e-5)
        self.down = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 2 * width)])
        self.embedding = nn.ModuleDict({"time": nn.Linear(4, width)})
        self.register_buffer("sigmas", torch.linspace(0, 1, width))
        self.function = torch.nn.functional.silu

    def __getattr__(self, name: str) -> Any:
        if "_internal" in self.__dict__ and name in self.__dict__["_internal"]:
            return self.__dict__["_internal"][name]
        return super().__getattr__(name)

    @property
    def config(self) -> Config:
        return Config(**self._internal, eps=self.settings.eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.sigmas.dtype

    @property
    def device(self) -> torch.device:
        return self.sigmas.device

    @property
    def number_of_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @functools.cached_property
    def sizes(self) -> list[int]:
        return [layer.out_features for layer in self.down]

    @property
    def norm(self) -> float:
        return float(self.down[0].weight.norm())

    @property
    def first(self) -> torch.Tensor:
        return self.down[0].weight

    @property
    def time_layer(self) -> nn.Module:
        return self.embedding["time"]

    @property
    def broken(self) -> int:
        raise ValueError("this property is broken")

    @classmethod
    def name_of_class(cls) -> str:
        return cls.__name__

    def method(self) -> int:
        return 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down[0](x)


@pytest.fixture(scope="module")
def unet(ray_session: None) -> Any:
    return rewrite_pipeline(types.SimpleNamespace(unet=Unet().bfloat16(), guidance=7.5)).unet


def ask(standin: Any) -> dict[str, Any]:
    """Ask a stand-in for everything that needs no weights."""
    return {
        "config": vars(standin.config),
        "main_input_name": standin.main_input_name,
        "dtype": standin.dtype,
        "device": standin.device,
        "number_of_weights": standin.number_of_weights,
        "sizes": standin.sizes,
        "in_channels": standin.in_channels,
        "settings": standin.settings.eps,
        "layers": len(standin.down),
        "features": [layer.out_features for layer in standin.down],
        "part": (standin.down[1].in_features, standin.embedding["time"].in_features, standin.time_layer.out_features),
        "class": standin.name_of_class(),
        "function": standin.function is torch.nn.functional.silu,
    }


EXPECTED = {
    "config": {"width": 8, "in_channels": 4, "eps": 1e-5},
    "main_input_name": "sample",
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "number_of_weights": 8 * 8 + 8 + 8 * 16 + 16 + 4 * 8 + 8,
    "sizes": [8, 16],
    "in_channels": 4,
    "settings": 1e-5,
    "layers": 2,
    "features": [8, 16],
    "part": (8, 4, 8),
    "class": "Unet",
    "function": True,
}


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_answers_without_weights(unet: Any, two_actors: list[Any]) -> None:
    """Properties, parts and attributes are answered here, in an actor, and by a copy of the stand-in."""
    assert ask(unet) == EXPECTED
    assert ray.get(two_actors[0].run.remote(ask, unet)) == EXPECTED
    assert ask(copy.deepcopy(unet)) == EXPECTED
    assert ask(ray.cloudpickle.loads(ray.cloudpickle.dumps(copy.deepcopy(unet)))) == EXPECTED


@pytest.mark.parametrize("name", ["norm", "first", "sigmas", "broken", "method", "state_dict", "_parameters"])
def test_what_needs_weights_says_so(name: str, unet: Any, two_actors: list[Any]) -> None:
    """Tensors, properties that read them, and methods are an AttributeError that says how to get the model."""
    assert not hasattr(unet, name)
    for where in (lambda: getattr(unet, name), lambda: ray.get(two_actors[0].run.remote(getattr, unet, name))):
        with pytest.raises(AttributeError, match=rf"{name}.*(load_model_in_actor|method_names)"):
            where()


def test_parts_of_a_stand_in(unet: Any) -> None:
    """A part answers as the stand-in does, is named by its path, and cannot be called."""
    assert repr(unet.down[0]) == "RemoteModel(Unet).down[0] without weights"
    assert unet.down[0]
    with pytest.raises(AttributeError, match=r"RemoteModel\(Unet\)\.down\[0\]\.weight needs the weights"):
        unet.down[0].weight
    with pytest.raises(TypeError, match=r"RemoteModel\(Unet\)\.down\[0\] cannot be called"):
        unet.down[0](torch.ones(8))
    with pytest.raises(AttributeError, match="no 'nothing'"):
        unet.nothing


def test_attributes_are_copies(ray_session: None) -> None:
    """Writing to an attribute of a stand-in changes what its properties say, and not the model."""
    source = Unet()
    standin = rewrite_pipeline(source)
    twin = copy.deepcopy(standin)
    standin.settings.eps = 1.0
    assert standin.config.eps == 1.0
    assert (source.config.eps, twin.config.eps) == (1e-5, 1e-5)


def test_nothing_keeps_the_weights(ray_session: None) -> None:
    """The copy holds no tensor of the model: it goes as soon as its owner lets it go."""
    source = Unet()
    source.hook = functools.partial(lambda model, x: model.down(x), source)
    reference = weakref.ref(source.down[0].weight)
    standin = rewrite_pipeline(source)
    del source
    gc.collect()
    assert reference() is None
    assert standin.config.width == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertModel(
            BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        ),
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=100)),
    ],
)
def test_models_of_transformers(make: Any, ray_session: None, two_actors: list[Any]) -> None:
    """What transformers' pipelines ask of a model is answered as the model itself answers it."""
    model = make().eval()
    standin = rewrite_pipeline(model, num_cpus=0.1)

    def look(it: Any) -> list[Any]:
        names = (
            "main_input_name",
            "dtype",
            "base_model_prefix",
            "name_or_path",
            "loss_type",
        )
        found = [(name, getattr(it, name, None)) for name in names]
        return [*found, it.config.to_dict(), type(it.generation_config) if hasattr(it, "generation_config") else None]

    assert look(standin) == look(model) == ray.get(two_actors[0].run.remote(look, standin))
    assert standin.device == torch.device("cpu")


class Heavy(Unet):
    """Has an attribute that is too large to travel with a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.words = [str(number) for number in range(1_000_000)]


class BuiltFromWeights(Unet):
    """Cannot be built without its weights."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.scale = float(self.sigmas.sum())


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
@pytest.mark.parametrize("kind", [Heavy, BuiltFromWeights])
def test_models_without_a_copy(kind: Any, ray_session: None) -> None:
    """Where no copy is possible, plain attributes are answered, and a property says that it needs the model."""
    standin = rewrite_pipeline(kind())
    assert isinstance(standin, RemoteModel)
    assert standin.settings.eps == 1e-5
    assert standin.main_input_name == "sample"
    assert standin.dtype is torch.float32
    with pytest.raises(AttributeError, match=r"no 'config'.*load_model_in_actor"):
        standin.config
    assert len(ray.cloudpickle.dumps(standin)) < 100_000
