"""Programs that are compiled once, in the driver, and opened in every worker with the weights of the store."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from torch import nn

from ray_zerocopy import (
    ModelRef,
    ZeroCopyError,
    ZeroCopyPredictor,
    ZeroCopyWarning,
    get_model,
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    prepare_model_from,
    remove_model,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy.actor import CompiledModel, compile_model
from ray_zerocopy.invoke import call_model, rewrite_pipeline

WIDTH = 256


@dataclass
class Outputs:
    """What the model returns: a dataclass with a mapping in it."""

    y: torch.Tensor
    count: torch.Tensor
    more: dict[str, Any]


torch.export.register_dataclass(Outputs, serialized_type_name="test_compiled.Outputs")


class Model(nn.Module):
    """A model with tied weights, all kinds of constants, and a buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.tied = self.a.weight
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("ones", torch.ones(WIDTH), persistent=False)
        self.plain = torch.arange(float(WIDTH))

    def forward(self, x: torch.Tensor, flag: bool = True, *, scale: torch.Tensor) -> Outputs:
        self.count.add_(1)
        y = torch.relu(self.a(x)) @ self.tied * scale + self.plain + self.ones
        return Outputs(y, self.count + 0, {"sin": torch.sin(x), "rows": x.shape[0], "none": None, "five": 5})


SCALE = torch.tensor(2.0)
ROWS = torch.export.Dim("rows", max=1024)
OPTIONS = {
    "args": (torch.zeros(4, WIDTH),),
    "kwargs": {"flag": True, "scale": SCALE},
    "dynamic_shapes": {"x": {0: ROWS}, "flag": None, "scale": None},
    "fallback": True,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


@pytest.fixture(scope="module")
def model() -> Model:
    """The source, in train mode."""
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def model_ref(ray_session: None, model: Model) -> ModelRef:
    """The model, compiled once for all tests."""
    return prepare_model_for_actors(model, compile=OPTIONS)


@pytest.fixture(scope="module")
def compiled(model_ref: ModelRef) -> CompiledModel:
    """The compiled model, loaded in the driver."""
    loaded = load_model_in_actor(model_ref)
    assert isinstance(loaded, CompiledModel)
    return loaded


def inputs(rows: int) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * WIDTH).reshape(rows, WIDTH)


def expected(model: Model, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs(rows), scale=SCALE).y


def call_twice(kept: dict[str, Any], model_ref: ModelRef) -> tuple[Outputs, Outputs, int, Any, int]:
    model = kept["model"] = load_model_in_actor(model_ref)
    before = memory.model_memory(model)
    first, second = model(inputs(3), scale=SCALE), model(scale=SCALE, x=inputs(7), flag=True)
    return first, second, before.shared, memory.location(model._constants["a.weight"]), os.getpid()


def test_workers_share_the_weights_and_write_for_themselves(
    model_ref: ModelRef, model: Model, two_actors: list[Any]
) -> None:
    """Two actors open the program over the same pages, return the dataclass, and count their own calls."""
    answers = ray.get([actor.run_kept.remote(call_twice, model_ref) for actor in two_actors])
    for first, second, shared, location, _ in answers:
        assert isinstance(first, Outputs)
        assert (first.count.item(), second.count.item()) == (1.0, 2.0)
        torch.testing.assert_close(first.y, expected(model, 3), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.y, expected(model, 7), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.more["sin"], torch.sin(inputs(7)))
        assert (second.more["rows"], second.more["none"], second.more["five"]) == (7, None, 5)
        assert shared > WIDTH * WIDTH * 4
        assert location == answers[0][3] is not None
    pool = memory.pool_memory(model_ref)
    assert sum(process.pid in {answer[4] for answer in answers} for process in pool.processes) == 2
    assert model.training


def test_the_order_of_memory_does_not_matter(compiled: CompiledModel, model: Model) -> None:
    """A transposed input gives the numbers of a contiguous one: compiled code assumes strides."""
    transposed = inputs(7).T.contiguous().T
    result = compiled(transposed, flag=True, scale=SCALE)
    torch.testing.assert_close(result.y, expected(model, 7), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.more["sin"], torch.sin(inputs(7)))


@pytest.mark.parametrize(
    ("error", "facts", "args", "kwargs"),
    [
        (ValueError, r"x has the size \(2000, 256\).* to 1024", (inputs(2000),), {"scale": SCALE}),
        (ValueError, r"x has the size \(2, 3\)", (torch.zeros(2, 3),), {"scale": SCALE}),
        (ValueError, r"x has the size \(256,\)", (torch.zeros(256),), {"scale": SCALE}),
        (ValueError, "x is of torch.float64.*torch.float32", (inputs(2).double(),), {"scale": SCALE}),
        (ValueError, "x is on meta, and the program on cpu", (inputs(2).to("meta"),), {"scale": SCALE}),
        (ValueError, "flag is False.*exported with True", (inputs(2),), {"scale": SCALE, "flag": False}),
        (ValueError, "flag is a tensor.*exported with True", (inputs(2),), {"scale": SCALE, "flag": SCALE}),
        (TypeError, "no argument scale.*x, flag, scale", (inputs(2),), {}),
        (TypeError, "argument mask too", (inputs(2),), {"scale": SCALE, "mask": 1}),
        (TypeError, "argument x twice", (inputs(2),), {"scale": SCALE, "x": 1}),
        (TypeError, "2 positional arguments and takes 1", (inputs(2), SCALE), {}),
        (TypeError, "x is a list", ([1.0],), {"scale": SCALE}),
    ],
)
def test_arguments_are_those_of_the_export(
    compiled: CompiledModel, error: type[Exception], facts: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Arguments that the compiled code would misread are refused, with their name and the sizes."""
    with pytest.raises(error, match=facts):
        compiled(*args, **kwargs)


class Predictor(ZeroCopyPredictor):
    def preprocess(self, batch: pa.Table) -> dict[str, Any]:
        return {"x": inputs(len(batch)), "scale": SCALE}

    def postprocess(self, outputs: Outputs, batch: pa.Table) -> pa.Table:
        return batch.append_column("y", pa.array(outputs.y.sum(1).numpy()))


def test_predictors_tasks_and_pipelines_call_it(compiled: CompiledModel, model_ref: ModelRef, model: Model) -> None:
    """A compiled model works in a predictor, in call_model, and as a part of both kinds of pipelines."""
    numbers = expected(model, 5)
    with pytest.raises(ValueError, match=r"Predictor.dtype is torch.bfloat16.*torch.float32"):
        Predictor.using(model_ref, dtype=torch.bfloat16)()
    rows = Predictor.using(model_ref, dtype=torch.float32)()(pa.table({"id": range(5)}))
    torch.testing.assert_close(torch.tensor(rows["y"].to_pylist()), numbers.sum(1), rtol=1e-3, atol=1e-2)
    for _ in range(2):  # the second call reuses the pages, and finds the buffer as it was shared
        result = ray.get(call_model.remote(model_ref, (inputs(5),), {"scale": SCALE}))
        torch.testing.assert_close(result.y, numbers, rtol=1e-4, atol=1e-4)
        assert result.count.item() == 1.0
    pipeline = {"encoder": compiled, "source": model}
    skeleton, refs = rewrite_pipeline_for_actors(pipeline)
    loaded = load_pipeline_in_actor(skeleton, refs)
    torch.testing.assert_close(loaded["encoder"](inputs(5), scale=SCALE).y, numbers, rtol=1e-4, atol=1e-4)
    rewritten = rewrite_pipeline({"encoder": compiled})
    torch.testing.assert_close(rewritten["encoder"](inputs(5), scale=SCALE).y, numbers, rtol=1e-4, atol=1e-4)


def same(value: Any) -> Any:
    return value


def test_names_and_loaders_carry_it(compiled: CompiledModel, model: Model) -> None:
    """A compiled model can have a name, and a loader can return one."""
    first = prepare_model_for_actors(compiled, name="compiled")
    again = prepare_model_for_actors(model, name="compiled", get_if_exists=True, compile=True)  # compiles nothing
    loaded_by = prepare_model_from(functools.partial(same, compiled))
    for handle in (first, get_model("compiled"), again, loaded_by):
        result = load_model_in_actor(handle)(inputs(2), scale=SCALE)
        torch.testing.assert_close(result.y, expected(model, 2), rtol=1e-4, atol=1e-4)
    remove_model("compiled")


# ---------------------------------------------------------------- other workers


def changed(compiled: CompiledModel, *, fallback: Any, **facts: Any) -> CompiledModel:
    """Return the model as if it had been compiled elsewhere."""
    other = object.__new__(CompiledModel)
    other.__dict__.update(compiled.__dict__, _built=compiled._built._replace(**facts), _fallback=fallback)
    return other


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"torch": "2.0.1"}, rf"torch is 2\.0\.1, and here it is {torch.__version__[:4]}"),
        ({"machine": "Linux vax"}, "the machine is Linux vax, and here it is Linux"),
        ({"device": "cuda"}, "the device is cuda, and here it is cpu"),
        ({"features": frozenset({"avx9"})}, "a CPU with avx9.*has no avx9"),
    ],
)
def test_other_workers_get_an_error_or_the_program(
    compiled: CompiledModel, model: Model, facts: dict[str, Any], message: str
) -> None:
    """A worker that cannot run the code says both facts; with fallback=True it warns and runs the program."""
    if "features" in facts and not compiled._built.features:
        pytest.skip("this system does not list the features of its CPU")
    with pytest.raises(ZeroCopyError, match=message):
        load_model_in_actor(prepare_model_for_actors(changed(compiled, fallback=None, **facts)))
    model_ref = prepare_model_for_actors(changed(compiled, fallback=compiled._fallback, **facts))
    with pytest.warns(ZeroCopyWarning, match=message):
        program = load_model_in_actor(model_ref)
    torch.testing.assert_close(program(inputs(2), flag=True, scale=SCALE).y, expected(model, 2))


# ---------------------------------------------------------------- what cannot be compiled


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("error", "facts", "model", "compile"),
    [
        (TypeError, "Linear without example inputs", nn.Linear(2, 2), True),
        (TypeError, "model is a dict", {}, True),
        (TypeError, "compile is 'yes'", nn.Linear(2, 2), "yes"),
        (ValueError, "cannot export Branches", Branches(), {"args": (torch.ones(2),)}),
        (ValueError, "gaps or overlaps", nn.Linear(2, 2), {"args": (torch.ones(1).expand(2, 2),)}),
        (
            ZeroCopyError,
            "no working C[+][+] compiler",
            nn.Linear(2, 2),
            {"args": (torch.ones(2, 2),), "cpp.cxx": ("/no/g++",)},
        ),
        (ValueError, "nonsense", nn.Linear(2, 2), {"args": (torch.ones(2, 2),), "nonsense": 1}),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    ray_session: None, error: type[Exception], facts: str, model: Any, compile: Any
) -> None:
    """Nothing is shared if the program cannot be compiled here, and the error says why."""
    with pytest.raises(error, match=facts):
        prepare_model_for_actors(model, compile=compile)


def test_a_program_has_its_inputs(ray_session: None) -> None:
    """An ExportedProgram takes no example inputs, and needs those of its export."""
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),))
    with pytest.raises(TypeError, match="has its inputs"):
        compile_model(program, args=(torch.ones(2, 2),))
    program.example_inputs = None
    with pytest.raises(ValueError, match="no example inputs"):
        compile_model(program)
