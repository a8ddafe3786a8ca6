"""Objects whose class intercepts attribute access travel: wrappers that delegate, with and without slots."""

from __future__ import annotations

import dataclasses
import threading
import types
from collections import OrderedDict
from typing import Any

import pytest
import ray
import torch
from torch import nn

from ray_zerocopy import (
    load_model_in_actor,
    load_pipeline_in_actor,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy.invoke import call_model

X = torch.ones(2, 4)


class Delegates:
    """Asks the wrapped object for what it lacks."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.label = "outer"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class Slotted:
    """Keeps the wrapped object in a private slot, and passes on what is set as well."""

    __slots__ = ("__wrapped", "label", "unset")

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "_Slotted__wrapped", wrapped)
        object.__setattr__(self, "label", "outer")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped, name, value)


class SlotsAndDict(Slotted):
    """Has slots, and attributes beside them."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self.__dict__["wrapped"] = wrapped


class Keys(dict):  # type: ignore[type-arg]
    """Answers attributes from its keys, and raises KeyError for others."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped=wrapped)
        self.__dict__["label"] = "outer"

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self or name.startswith("_") else getattr(self["wrapped"], name)


class Everything:
    """Looks every attribute up by itself."""

    def __init__(self, wrapped: Any) -> None:
        self.parts = {"wrapped": wrapped, "label": "outer"}

    def __getattribute__(self, name: str) -> Any:
        parts = object.__getattribute__(self, "__dict__")["parts"]
        return parts[name] if name in parts else getattr(parts["wrapped"], name)


class Frozen:
    """Refuses to be changed, and has slots."""

    __slots__ = ("label", "weight")

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "weight", wrapped.weight)
        object.__setattr__(self, "label", "outer")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be set")


class Disguised(Delegates):
    """Says that it is of the wrapped object's class."""

    @property
    def __class__(self) -> Any:
        return type(self.wrapped)


class WithState(Delegates):
    """Delegates, and says what its state is."""

    def __getstate__(self) -> Any:
        return {"inner": self.wrapped}

    def __setstate__(self, state: Any) -> None:
        self.wrapped = state["inner"]
        self.label = "outer"


class SlottedModule(nn.Module):
    """A module with a slot, which torch's own pickle loses, that delegates to a part."""

    __slots__ = ("label",)

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.label = "outer"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


class RefusesToBeAsked:
    """A wrapped object with a way of its own to be pickled."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __getnewargs__(self) -> Any:
        raise AssertionError("the wrapped object was asked through the wrapper")

    def __reduce__(self) -> Any:
        return types.SimpleNamespace, (), {"weight": self.weight}


class LocalOfThread(threading.local):
    """Has a state in each thread, which no pickle has."""

    def __init__(self) -> None:
        self.count = 1


KINDS = [Delegates, Slotted, SlotsAndDict, Keys, Everything, Frozen, Disguised, WithState, SlottedModule]


def look(ref: Any) -> Any:
    loaded = load_model_in_actor(ref)
    return loaded.label, loaded.weight.clone(), type(loaded).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_arrives(kind: Any, two_actors: list[Any]) -> None:
    """The wrapper that a worker loads has the state that was shared."""
    inner = nn.Linear(4, 4)
    label, weight, name = ray.get(two_actors[0].run.remote(look, prepare_model_for_actors(kind(inner))))
    assert (label, name) == ("outer", kind.__name__)
    assert torch.equal(weight, inner.weight)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not SlottedModule])
def test_a_wrapper_in_a_pipeline_arrives(kind: Any, two_actors: list[Any]) -> None:
    """A wrapper around a model inside a pipeline, beside the model itself, is the same there."""
    inner = nn.Linear(4, 4)

    def look_at(skeleton: Any, refs: Any) -> Any:
        loaded = load_pipeline_in_actor(skeleton, refs)
        return loaded.outer.weight is loaded.inner.weight, loaded.outer.label

    pipeline = types.SimpleNamespace(inner=inner, outer=kind(inner))
    assert ray.get(two_actors[0].run.remote(look_at, *rewrite_pipeline_for_actors(pipeline))) == (True, "outer")


def test_a_wrapper_of_a_script(two_actors: list[Any]) -> None:
    """A class that workers cannot import travels by value, and delegates there."""

    class Local(Delegates):
        pass

    Local.__module__ = "__main__"
    inner = nn.Linear(4, 4)
    label, weight, _ = ray.get(two_actors[0].run.remote(look, prepare_model_for_actors(Local(inner))))
    assert label == "outer"
    assert torch.equal(weight, inner.weight)


@pytest.mark.parametrize("kind", [Delegates, Slotted, WithState])
def test_the_wrapped_object_is_not_asked(kind: Any, two_actors: list[Any]) -> None:
    """Pickling a wrapper never runs a method of the wrapped object through it."""
    weight = torch.randn(4, 4)
    outer = kind(RefusesToBeAsked(weight))
    label, found, _ = ray.get(two_actors[0].run.remote(look, prepare_model_for_actors(outer)))
    assert label == "outer"
    assert torch.equal(found, weight)


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """An output as that of a model: an OrderedDict with required fields."""

    sample: Any
    hidden: Any = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class Named(OrderedDict):  # type: ignore[type-arg]
    """An OrderedDict with a slot, and a constructor that needs its name."""

    __slots__ = ("name",)

    def __init__(self, name: str, sample: Any) -> None:
        super().__init__(sample=sample)
        self.name = name

    @property
    def sample(self) -> Any:
        return self["sample"]


class Returns(nn.Module):
    """Returns such an output."""

    def __init__(self, kind: Any, count: int) -> None:
        super().__init__()
        self.kind = kind
        self.count = count

    def forward(self) -> Any:
        sample = torch.ones(self.count)
        return Named("x", sample) if self.kind is Named else self.kind(sample=sample)


@pytest.mark.parametrize("count", [4, 100_000])
@pytest.mark.parametrize("kind", [Output, Named])
def test_an_ordered_dict_that_needs_arguments(kind: Any, count: int, two_actors: list[Any]) -> None:
    """An OrderedDict whose class needs arguments travels with a model and as the result of a call."""
    ref = prepare_model_for_actors(Returns(kind, count))
    found = ray.get(call_model.options(num_cpus=0.1).remote(ref))
    assert type(found) is kind
    assert list(found) == ["sample"]
    assert found.sample is found["sample"]
    assert float(found.sample.sum()) == count
    held = {"held": Named("x", torch.ones(count)) if kind is Named else kind(sample=torch.ones(count))}

    def look_at(ref: Any) -> Any:
        loaded = load_model_in_actor(ref)["held"]
        return float(loaded.sample.sum()), list(loaded), getattr(loaded, "name", "x")

    ref = prepare_model_for_actors(held)
    assert ray.get(two_actors[0].run.remote(look_at, ref)) == (count, ["sample"], "x")


def test_objects_that_cannot_be_pickled_still_say_so(ray_session: None) -> None:
    """A wrapper of something that does not pickle is an error with the path, as before."""
    with pytest.raises(TypeError, match=r"Delegates\.wrapped is a .*LocalOfThread"):
        prepare_model_for_actors(Delegates(LocalOfThread()))
