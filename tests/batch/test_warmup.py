"""The option `warmup`: a batch that the constructor takes through the methods."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from predictors import AddOne, adds_one

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy._batch import warmup as warmups

TABLE = pa.table({"x": [1.0, 2.0, 3.0]})


class Counts(AddOne):
    """Counts the rows that it saw, and has a constructor that sets what `preprocess` needs."""

    def __init__(self, offset: float, **options: Any) -> None:
        super().__init__(**options)
        self.offset = offset
        self.seen = 0

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        self.seen += len(batch)
        return super().preprocess(batch) + self.offset


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    """A model that adds one."""
    return prepare_model_for_actors(adds_one())


@pytest.mark.parametrize("warmup", [TABLE, {"x": [1.0, 2.0, 3.0]}, lambda: TABLE, TABLE.to_batches()[0]])
def test_the_rows_are_not_counted(model_ref: ModelRef, warmup: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The batch runs when all constructors have returned; the totals count the rows of the dataset only."""
    caplog.set_level(logging.INFO, "ray_zerocopy")
    predictor = Counts.using(model_ref, warmup=warmup, offset=1.0)()
    assert predictor.seen == 3
    assert (predictor.totals.rows, predictor.totals.batches) == (0, 0)
    assert predictor(TABLE)["y"].to_pylist() == [3.0, 4.0, 5.0]
    assert (predictor.totals.rows, predictor.totals.batches) == (3, 1)
    lines = [record.getMessage() for record in caplog.records if "warm with 3 rows" in record.getMessage()]
    assert len(lines) == 1
    for part in ("process start", "imports", "load", "compile", "warm-up"):
        assert part in lines[0]


def test_methods_and_generators(model_ref: ModelRef) -> None:
    """`warmup` can be a method. A generator of postprocess is read to its end; compiling counts apart."""
    done: list[int] = []

    class Method(AddOne):
        sort_by = "x"

        def warmup(self) -> pa.Table:
            return TABLE

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            yield super().postprocess(outputs, batch)
            done.append(len(batch))

        preserve_order = False

    Method(model_ref)
    assert sum(done) == 3


def test_a_constructor_without_using_calls_it(model_ref: ModelRef) -> None:
    """Without `using`, a class with a constructor calls warm_up() at its end."""
    predictor = Counts(1.0, model_ref=model_ref, warmup=TABLE)
    assert predictor.seen == 0
    predictor.warm_up()
    assert predictor.seen == 3


def test_which_constructor_is_the_last(model_ref: ModelRef) -> None:
    """The classes that Ray makes do not count, and a class derived from a bound one is the last."""
    bound = Counts.using(model_ref, offset=1.0)
    of_ray = type("Wrapped", (bound,), {"__module__": "ray.data", "__init__": lambda self: None})
    derived = type("Derived", (bound,), {"__init__": lambda self: None})
    assert warmups.is_constructed_by(of_ray, bound)
    assert not warmups.is_constructed_by(derived, bound)
    assert not warmups.is_constructed_by(Counts, ZeroCopyPredictor)
    assert warmups.is_constructed_by(AddOne, ZeroCopyPredictor)


@pytest.mark.parametrize(
    ("warmup", "error", "facts"),
    [
        (3, TypeError, "AddOne.warmup is 3"),
        (lambda: None, TypeError, "AddOne.warmup returned None"),
        (TABLE[:0], ValueError, "AddOne.warmup has no rows"),
        ({}, ValueError, "AddOne.warmup has no rows"),
    ],
)
def test_what_is_no_batch(model_ref: ModelRef, warmup: Any, error: type[Exception], facts: str) -> None:
    """What is no batch, or an empty one, is an error with the class and the option."""
    with pytest.raises(error, match=facts):
        AddOne.using(model_ref, warmup=warmup)()


def test_a_failing_batch_names_the_option(model_ref: ModelRef) -> None:
    """If the batch of the warm-up fails, the error is that of the method, with a note."""
    with pytest.raises(KeyError, match="x") as caught:
        AddOne.using(model_ref, warmup={"z": [1.0]})()
    assert "warmup" in "".join(getattr(caught.value, "__notes__", ["warmup"]))


def test_failed_rows_are_no_warm_up(model_ref: ModelRef) -> None:
    """With on_error="null" a warm-up that fails is an error too, and the option holds afterwards."""
    with pytest.raises(KeyError, match="x"):
        AddOne.using(model_ref, warmup={"z": [1.0]}, on_error="null")()
    predictor = AddOne.using(model_ref, warmup={"x": [1.0]}, on_error="null")()
    assert predictor.on_error == "null"


def test_in_ray_data(model_ref: ModelRef) -> None:
    """In an actor of Ray Data the warm-up runs once, before the first batch."""
    ds = ray.data.from_arrow(TABLE).map_batches(
        Counts.using(model_ref, warmup=TABLE, offset=0.0),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.1,
    )
    assert [row["y"] for row in ds.take_all()] == [2.0, 3.0, 4.0]
