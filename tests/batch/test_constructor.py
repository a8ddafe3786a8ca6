"""`using` refuses an option that no constructor of the class takes, also behind `**kwargs`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ray
from predictors import AddOne, WithOptions, adds_one
from ray.data import ActorPoolStrategy

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(adds_one())


class Reads(AddOne):
    """Reads options of its own from its keyword arguments."""

    def __init__(self, **kwargs: Any) -> None:
        self.threshold = kwargs.pop("threshold", 0.5)
        self.labels = None
        if "labels" in kwargs:
            self.labels = kwargs["labels"]
            del kwargs["labels"]
        super().__init__(**kwargs)


class Temperature:
    """A mixin that takes one argument and passes on the rest."""

    def __init__(self, *args: Any, temperature: float = 1.0, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.temperature = temperature


class Mixed(Temperature, Reads):
    """Has the constructors of both bases."""


class Explicit(Reads):
    """Calls the constructor of its base by name."""

    def __init__(self, top_k: int = 1, **options: Any) -> None:
        Reads.__init__(self, **options)
        self.top_k = top_k


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Decorated(AddOne):
    """Has a constructor in a decorator."""

    @logged
    def __init__(self, size: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.size = size


class Stores(AddOne):
    """Keeps its keyword arguments: they may mean anything."""

    def __init__(self, model_ref: ModelRef, **options: Any) -> None:
        super().__init__(model_ref)
        self.given = options


class Forwards(AddOne):
    """Passes its keyword arguments to another function."""

    def __init__(self, model_ref: ModelRef, **options: Any) -> None:
        super().__init__(model_ref)
        self.given = dict(**options)


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (WithOptions, {"factor": 2.0}),
        (Reads, {"threshold": 0.1, "labels": ["a"]}),
        (Mixed, {"temperature": 2.0, "threshold": 0.1}),
        (Explicit, {"top_k": 3, "labels": ["a"], "device": "cpu"}),
        (Decorated, {"size": 2, "require_isolation": True}),
        (AddOne, {"micro_batch_size": 4}),
    ],
)
def test_an_unknown_option_is_refused_where_it_is_given(
    cls: type[ZeroCopyPredictor], given: dict[str, Any], model_ref: ModelRef
) -> None:
    """Known options make a predictor, and one more that nobody takes is a TypeError with its name."""
    predictor = cls.using(model_ref, **given)()
    assert predictor.model is not None
    for made in (cls, cls.using(model_ref, **given)):
        with pytest.raises(TypeError, match=rf"{cls.__name__} .*'micro_batch_sise'.*Did you mean 'micro_batch_size'"):
            made.using(model_ref, **given, micro_batch_sise=4)


@pytest.mark.parametrize("cls", [Stores, Forwards])
def test_what_may_be_known_passes(cls: type[Any], model_ref: ModelRef) -> None:
    """Keyword arguments that the constructor keeps or passes to another function are not refused."""
    assert cls.using(model_ref, anything=1)().given == {"anything": 1}


def test_a_constructor_without_source(model_ref: ModelRef) -> None:
    """A constructor whose source is not there is not refused anything."""
    namespace = {"AddOne": AddOne}
    exec(
        "class Made(AddOne):\n    def __init__(self, model_ref, **rest):\n        AddOne.__init__(self, model_ref)\n"
        "        self.rest = rest",
        namespace,
    )
    made: Any = namespace["Made"]
    assert made.using(model_ref, anything=1)().rest == {"anything": 1}


def test_bound_options_reach_the_workers(model_ref: ModelRef) -> None:
    """What `using` accepts behind `**kwargs` works in an actor of Ray Data."""
    bound = Explicit.using(model_ref, top_k=3, threshold=0.1)
    ds = ray.data.range(8, override_num_blocks=2).rename_columns({"id": "x"})
    rows = ds.map_batches(bound, batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=0.1).take_all()
    assert sorted(row["y"] for row in rows) == [x + 1.0 for x in range(8)]
