"""`inference_mode=False`: predictors that compute gradients; async methods, which nothing awaits, are refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from predictors import AddOne, adds_one
from ray.data import ActorPoolStrategy
from torch import nn

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy.arrow import column_to_tensor

POOL: dict[str, Any] = {"compute": ActorPoolStrategy(size=1), "num_cpus": 0.1, "batch_format": "pyarrow"}


class Energy(nn.Module):
    """An energy of positions: the sum of their cubes, so that forces are -3 x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x**3).sum(1)


class Forces(ZeroCopyPredictor):
    """Computes forces in `predict`."""

    inference_mode = False

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        return column_to_tensor(batch, "x")

    def predict(self, inputs: torch.Tensor) -> Any:
        inputs.requires_grad_(True)
        energy = self.model(inputs)
        (gradient,) = torch.autograd.grad(energy.sum(), inputs)
        return energy, -gradient

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        energy, forces = outputs
        return {"energy": energy.numpy(), "forces": forces}  # of a tensor with a gradient there is no numpy()


class Saliency(Forces):
    """Backpropagates, and yields its rows."""

    def predict(self, inputs: torch.Tensor) -> Any:
        inputs.requires_grad_(True)
        energy = self.model(inputs)
        energy.sum().backward()
        return energy, -inputs.grad

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        yield super().postprocess(outputs, batch)


class Attack(Forces):
    """Changes its inputs along the gradient that an optimizer follows."""

    def predict(self, inputs: torch.Tensor) -> Any:
        moved = nn.Parameter(inputs.clone())
        optimizer = torch.optim.SGD([moved], lr=1.0)
        energy = self.model(moved)
        energy.sum().backward()
        optimizer.step()
        return energy, (moved - inputs)


class Jacobian(Forces):
    """Uses torch.autograd.functional, which returns zeros under inference mode."""

    def predict(self, inputs: torch.Tensor) -> Any:
        gradient = torch.autograd.functional.jacobian(lambda x: self.model(x).sum(), inputs)
        return self.model(inputs), -gradient


@pytest.fixture(scope="module")
def energy_ref(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(Energy())


def positions() -> pa.Table:
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float32)), 3)})


def run_predictor(cls: type[ZeroCopyPredictor], ref: ModelRef, options: dict[str, Any], batch: pa.Table) -> Any:
    """Return the rows of a predictor, as Ray Data's worker would make and call it."""
    rows = cls.using(ref, **options)()(batch)
    return [row for table in ([rows] if isinstance(rows, pa.Table) else rows) for row in pa.table(table).to_pylist()]


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("cls", [Forces, Saliency, Attack, Jacobian])
def test_gradients_in_actors(
    cls: type[ZeroCopyPredictor], options: dict[str, Any], energy_ref: ModelRef, two_actors: list[Any]
) -> None:
    """With inference_mode=False, `predict` computes gradients in a worker, and its outputs arrive without them."""
    if cls is Saliency and options:  # one goes through Ray Data
        rows = ray.data.from_arrow(positions()).map_batches(cls.using(energy_ref, **options), **POOL).take_all()
    else:
        rows = ray.get(two_actors[0].run.remote(run_predictor, cls, energy_ref, options, positions()))
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = {float(row["energy"]): np.asarray(row["forces"]) for row in rows}
    assert found.keys() == {float(value) for value in (x**3).sum(1)}
    for one in x:
        assert np.allclose(found[float((one**3).sum())], -3 * one**2)


def test_the_option_overrides_the_class(energy_ref: ModelRef) -> None:
    """The class attribute, `using` and the constructor set the option; it is True by default."""
    batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1.0], pa.float32()), 1)})

    class Asks(Forces):
        def predict(self, inputs: torch.Tensor) -> Any:
            return torch.tensor([torch.is_inference_mode_enabled()]), torch.tensor([torch.is_grad_enabled()])

        def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
            return {"inference": outputs[0], "grad": outputs[1]}

    for made, expected in (
        (Asks(energy_ref), [{"inference": False, "grad": True}]),
        (Asks.using(energy_ref, inference_mode=True)(), [{"inference": True, "grad": False}]),
        (Asks(energy_ref, inference_mode=True), [{"inference": True, "grad": False}]),
    ):
        assert made(batch).to_pylist() == expected
    assert AddOne.inference_mode is True
    with pytest.raises(TypeError, match=r"Asks\.inference_mode is None. Give True or False"):
        Asks.using(energy_ref, inference_mode=None)


class NeedsRetain(Forces):
    """Asks for a gradient that inference mode does not keep."""

    def predict(self, inputs: torch.Tensor) -> Any:
        self.model(inputs).retain_grad()


class ReusesInference(Forces):
    """Leaves inference mode for one step, with inputs that were made in it."""

    def predict(self, inputs: torch.Tensor) -> Any:
        made = inputs + 1
        with torch.inference_mode(False):
            made.requires_grad_(True)


@pytest.mark.parametrize("cls", [Forces, Saliency, Attack, NeedsRetain, ReusesInference])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}], ids=str)
def test_errors_about_gradients_name_the_option(
    cls: type[ZeroCopyPredictor], options: dict[str, Any], energy_ref: ModelRef
) -> None:
    """Under inference mode, an error of torch about gradients has a note with the option."""
    batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float32)), 3)})
    with pytest.raises(RuntimeError) as error:
        list(cls(energy_ref, inference_mode=True, **options)(batch))
    said = [*getattr(error.value, "__notes__", ()), str(error.value)]
    assert sum("using(model_ref, inference_mode=False)" in line for line in said) == 1
    if sys.version_info >= (3, 11):
        assert "inference_mode" not in str(error.value)


def test_other_errors_have_no_note(energy_ref: ModelRef) -> None:
    """An error that is not about gradients stays as it is."""

    class Fails(Forces):
        def predict(self, inputs: torch.Tensor) -> Any:
            raise RuntimeError("shapes do not match")

    batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1.0], pa.float32()), 1)})
    with pytest.raises(RuntimeError) as error:
        Fails(energy_ref, inference_mode=True)(batch)
    assert not getattr(error.value, "__notes__", [])


# ---------------------------------------------------------------- async methods


class AsyncPreprocess(AddOne):
    async def preprocess(self, batch: pa.Table) -> Any:
        return super().preprocess(batch)


class AsyncPredict(AddOne):
    async def predict(self, inputs: torch.Tensor) -> Any:
        return super().predict(inputs)


class AsyncPostprocess(AddOne):
    async def postprocess(self, outputs: Any, batch: pa.Table) -> AsyncIterator[Any]:
        yield super().postprocess(outputs, batch)


class AsyncStatic(AddOne):
    @staticmethod
    async def preprocess(batch: pa.Table) -> Any:
        return batch


async def fetched(self: Any, batch: pa.Table, retries: int = 0) -> Any:
    return batch


class AsyncPartial(AddOne):
    preprocess = functools.partialmethod(fetched, retries=3)  # type: ignore[assignment]


class Awaits:
    async def __call__(self, inputs: Any) -> Any:
        return inputs


class AsyncObject(AddOne):
    predict = Awaits()  # type: ignore[assignment]


class WithConstructor(AsyncPredict):
    def __init__(self, model_ref: ModelRef, **options: Any) -> None:
        super().__init__(model_ref, **options)


class SetsAsync(AddOne):
    """Replaces a method in its constructor."""

    def __init__(self, model_ref: ModelRef) -> None:
        self.predict = Awaits()  # type: ignore[method-assign]
        super().__init__(model_ref)


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(adds_one())


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (AsyncPreprocess, "preprocess"),
        (AsyncPredict, "predict"),
        (AsyncPostprocess, "postprocess"),
        (AsyncStatic, "preprocess"),
        (AsyncPartial, "preprocess"),
        (AsyncObject, "predict"),
        (WithConstructor, "predict"),
    ],
)
def test_async_methods_are_refused_where_the_class_is_bound(
    cls: type[ZeroCopyPredictor], method: str, model_ref: ModelRef
) -> None:
    """`using` and the constructor raise TypeError with the class and the async method."""
    for make in (lambda: cls.using(model_ref), lambda: cls(model_ref)):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\.{method} is an async (function|generator)"):
            make()


class YieldsInputs(AddOne):
    def preprocess(self, batch: pa.Table) -> Any:
        yield super().preprocess(batch)


class YieldsOutputs(ZeroCopyPredictor):
    def predict(self, inputs: Any) -> Any:
        yield from inputs


def yield_inputs(self: Any, batch: pa.Table, column: str) -> Any:
    yield batch[column]


class YieldsByPartial(AddOne):
    preprocess = functools.partialmethod(yield_inputs, column="x")  # type: ignore[assignment]


class YieldingObject:
    def __call__(self, batch: pa.Table) -> Any:
        yield batch


class YieldsByObject(AddOne):
    preprocess = YieldingObject()  # type: ignore[assignment]


class ReadsGenerator(YieldsInputs):
    """Yields, and reads what it yields."""

    def predict(self, inputs: Any) -> Any:
        return super().predict(next(inputs))


def test_generators_that_nothing_reads_are_refused(model_ref: ModelRef) -> None:
    """A generator in the place of inputs or outputs is a TypeError, unless the next method of the class reads it."""
    for cls in (YieldsInputs, YieldsByPartial, YieldsByObject):
        for make in (cls.using, cls):
            with pytest.raises(TypeError, match=rf"{cls.__name__}\.preprocess is a generator, and predict cannot"):
                make(model_ref)
    options = {"input_columns": "x", "output_column": "y"}
    for make in (YieldsOutputs.using, YieldsOutputs):
        with pytest.raises(TypeError, match=r"YieldsOutputs\.predict is a generator, and postprocess cannot use one"):
            make(model_ref, **options)
    assert ReadsGenerator(model_ref)(pa.table({"x": [1.0]}))["y"].to_pylist() == [2.0]


def test_async_methods_of_an_instance(model_ref: ModelRef) -> None:
    """An async method that a constructor sets is refused by the constructor."""
    with pytest.raises(TypeError, match=r"SetsAsync\.predict is an async function"):
        SetsAsync(model_ref)


class Runs(AddOne):
    """Runs a coroutine itself, behind a decorator."""

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        import asyncio

        return asyncio.run(self.fetch(batch))

    async def fetch(self, batch: pa.Table) -> torch.Tensor:
        return AddOne.preprocess(self, batch)


def test_a_method_that_runs_a_coroutine_works(model_ref: ModelRef) -> None:
    """A class may have other async methods and run them."""
    rows = ray.data.from_items([{"x": 1.0}]).map_batches(Runs.using(model_ref), **POOL).take_all()
    assert rows == [{"x": 1.0, "y": 2.0}]
