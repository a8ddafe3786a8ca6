"""Options of a call: streams, gradients, isolation; and which options are refused where they are given."""

from __future__ import annotations

import os
import pickle
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray
import torch
from no_proc import can_mount, hide_proc
from torch import nn

from ray_zerocopy import ModelRef, ZeroCopyError, prepare_model_for_actors
from ray_zerocopy.invoke import call_model, rewrite_pipeline

X = torch.arange(6.0).reshape(2, 3)


class Net(nn.Module):
    """A model with methods of many kinds; its energy is the sum of cubes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x**3

    def tokens(self, count: int) -> Iterator[torch.Tensor]:
        """Yield the scale, which changes from step to step."""
        for _ in range(count):
            self.scale.data.add_(1)
            yield self.scale * torch.ones(1)

    def large(self, count: int) -> Iterator[torch.Tensor]:
        for number in range(count):
            yield torch.full((100_000,), float(number))

    def waits(self, path: str) -> Iterator[int]:
        """Yield once before the file is there, and once after."""
        yield 1
        while not os.path.exists(path):
            pass
        yield 2

    def fails_late(self) -> Iterator[int]:
        yield 1
        raise KeyError("no second item")

    def as_iterator(self) -> Any:
        return map(str, [1, 2])

    def mode(self) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def modes(self) -> Iterator[tuple[bool, bool]]:
        for _ in range(2):
            yield self.mode()

    def forces(self, x: torch.Tensor) -> dict[str, Any]:
        x = x.clone().requires_grad_(True)
        energy = self(x).sum()
        (gradient,) = torch.autograd.grad(energy, x)
        return {"energy": energy, "forces": [-gradient], "graph": self(x) * torch.ones(1)}

    def stream_forces(self, x: torch.Tensor) -> Iterator[Any]:
        for row in x:
            yield self.forces(row)

    async def answer(self) -> int:
        return 42

    async def answers(self) -> AsyncIterator[int]:
        yield 42


@pytest.fixture(scope="module")
def ref(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(Net())


def items(stream: Any) -> list[Any]:
    return [ray.get(reference) for reference in stream]


# ---------------------------------------------------------------- streams


STREAM = call_model.options(num_returns="streaming", num_cpus=0.1)


def test_a_generator_streams(ref: ModelRef, tmp_path: Any) -> None:
    """The first item is there while the method still runs; the generator is Ray's."""
    path = tmp_path / "go"
    stream = STREAM.remote(ref, (str(path),), method_name="waits")
    assert isinstance(stream, ray.ObjectRefGenerator)
    assert ray.get(next(stream), timeout=60) == 1
    path.touch()
    assert items(stream) == [2]


def test_streams_start_from_the_shared_values(ref: ModelRef) -> None:
    """Each stream has a model of its own for its whole length, and what it writes goes with it."""
    for _ in range(2):
        found = items(STREAM.remote(ref, (3,), method_name="tokens"))
        assert [float(item[0]) for item in found] == [2.0, 3.0, 4.0]
    assert float(ray.get(call_model.remote(ref, (torch.ones(3),)))[0]) == 1.0


def test_large_items_are_views(ref: ModelRef) -> None:
    """Large items of a stream arrive with their values, writable and private."""
    found = items(STREAM.remote(ref, (4,), method_name="large"))
    for number, item in enumerate(found):
        item.add_(1)
        assert float(item.mean()) == number + 1


def test_streams_of_other_iterators_and_options(ref: ModelRef) -> None:
    """Any iterator streams, with Ray's other options and with a method that yields nothing."""
    assert items(STREAM.remote(ref, method_name="as_iterator")) == ["1", "2"]
    limited = STREAM.options(_generator_backpressure_num_objects=1, max_retries=0)
    assert len(items(limited.remote(ref, (5,), method_name="tokens"))) == 5
    assert items(STREAM.remote(ref, (0,), method_name="tokens")) == []
    assert pickle.loads(ray.cloudpickle.dumps(STREAM)).remote(ref, (1,), method_name="tokens")


def test_errors_of_streams(ref: ModelRef) -> None:
    """An error ends the stream after the items before it; a method that is no generator is named."""
    stream = STREAM.remote(ref, method_name="fails_late")
    assert ray.get(next(stream)) == 1
    with pytest.raises(KeyError, match="no second item"):
        ray.get(next(stream))
    with pytest.raises(TypeError, match=r"Net\.mode returned a tuple.*num_returns"):
        items(STREAM.remote(ref, method_name="mode"))


def test_inference_mode_of_streams(ref: ModelRef) -> None:
    """Each step of a stream runs in the mode that the options say."""
    assert items(STREAM.remote(ref, method_name="modes")) == [(True, False)] * 2
    free = STREAM.options(inference_mode=False)
    assert items(free.remote(ref, method_name="modes")) == [(False, True)] * 2
    forces = items(free.remote(ref, (X,), method_name="stream_forces"))
    assert torch.equal(torch.stack([item["forces"][0] for item in forces]), -3 * X**2)
    assert not any(item["graph"].requires_grad for item in forces)


# ---------------------------------------------------------------- gradients


def check_forces(found: Any) -> None:
    assert torch.equal(found["forces"][0], -3 * X**2)
    assert not found["energy"].requires_grad
    assert not found["graph"].requires_grad


def test_gradients_in_calls(ref: ModelRef) -> None:
    """With inference_mode=False a method computes gradients in the task, and the result has none."""
    free = call_model.options(inference_mode=False, num_cpus=0.1)
    check_forces(ray.get(free.remote(ref, (X,), method_name="forces")))
    assert ray.get(free.remote(ref, method_name="mode")) == (False, True)
    assert ray.get(call_model.remote(ref, method_name="mode")) == (True, False)


def test_gradients_of_stand_ins(ray_session: None) -> None:
    """rewrite_pipeline takes the option for all its calls."""
    pipeline = types.SimpleNamespace(model=Net())
    free = rewrite_pipeline(pipeline, ("__call__", "forces", "mode"), inference_mode=False, num_cpus=0.1)
    check_forces(free.model.forces(X))
    check_forces(ray.get(free.model.forces.remote(X)))
    assert not free.model(X).requires_grad
    assert rewrite_pipeline(pipeline, "mode", num_cpus=0.1).model.mode() == (True, False)


def test_errors_about_gradients_name_the_option(ref: ModelRef) -> None:
    """Under inference mode, an error about gradients arrives with a note that names the option."""
    with pytest.raises(RuntimeError) as error:
        ray.get(call_model.remote(ref, (X,), method_name="forces"))
    said = [str(error.value), *getattr(error.value, "__notes__", ())]
    assert any("call_model.options(inference_mode=False)" in line for line in said)


# ---------------------------------------------------------------- async methods


def test_async_methods_are_named(ref: ModelRef) -> None:
    """A coroutine or an async generator is a TypeError with the method, in calls and streams."""
    for call, method in ((call_model, "answer"), (call_model, "answers"), (STREAM, "answer"), (STREAM, "answers")):
        started = call.remote(ref, method_name=method)
        failed = started if call is call_model else next(started)
        with pytest.raises(TypeError, match=rf"Net\.{method} is async"):
            ray.get(failed)


# ---------------------------------------------------------------- wrong options


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"inference_mode": "no"}, TypeError, "inference_mode is 'no'. Give True or False"),
        ({"require_isolation": 1}, TypeError, "require_isolation is 1"),
        ({"inference_mod": False}, ValueError, "inference_mod"),
        ({"num_returns": "stream"}, ValueError, "num_returns is 'stream'"),
        ({"num_returns": "dynamic"}, ValueError, "num_returns is 'dynamic'"),
        ({"num_returns": -1}, ValueError, "num_returns is -1"),
        ({"max_calls": 1}, ValueError, "max_calls"),
    ],
)
def test_wrong_options_are_refused_where_they_are_given(
    options: dict[str, Any], error: type[Exception], words: str, ray_session: None
) -> None:
    """call_model.options and rewrite_pipeline raise with the name of a wrong option."""
    for give in (call_model.options, lambda **given: rewrite_pipeline(nn.Linear(2, 2), **given)):
        with pytest.raises(error, match=words):
            give(**options)


def test_a_pipeline_does_not_stream(ray_session: None) -> None:
    """rewrite_pipeline says that single calls stream."""
    with pytest.raises(ValueError, match=r"num_returns='streaming'.*call_model\.options"):
        rewrite_pipeline(nn.Linear(2, 2), num_returns="streaming")


# ---------------------------------------------------------------- isolation


def run_call(required: bool, ref: ModelRef, blind: bool, method: str = "mode") -> Any:
    """Run what a task runs, in a process that may not see /proc."""
    from ray_zerocopy._task import call

    if blind:
        hide_proc()
    wanted = call.Call(ref, None, method, require_isolation=required)
    return call._model_call(wanted).value


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("required", [False, True])
def test_require_isolation(blind: bool, required: bool, ref: ModelRef) -> None:
    """With require_isolation a call is refused where no private view is possible, and only there."""
    if blind and not can_mount():
        pytest.skip("needs the right to mount file systems")
    task = ray.remote(num_cpus=0.1, max_calls=1, max_retries=0)(run_call)
    if blind and required:
        with pytest.raises(ZeroCopyError, match=r"no /proc file system.*copy the weights for each call"):
            ray.get(task.remote(required, ref, blind))
    else:
        assert ray.get(task.remote(required, ref, blind)) == (True, False)


def test_require_isolation_in_calls(ref: ModelRef) -> None:
    """Calls, streams and stand-ins take the option."""
    required = call_model.options(require_isolation=True, num_cpus=0.1)
    assert torch.equal(ray.get(required.remote(ref, (X,))), X**3)
    assert len(items(required.options(num_returns="streaming").remote(ref, (2,), method_name="tokens"))) == 2
    assert torch.equal(rewrite_pipeline(Net(), require_isolation=True, num_cpus=0.1)(X), X**3)
