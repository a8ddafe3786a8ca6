"""ZeroCopyPredictor on Ray Data: the ways to give it a model, batches in and out, and what it says when misused."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import predictors
import pyarrow as pa
import pytest
import ray
import torch
from predictors import (
    AddOne,
    Dies,
    Formats,
    Keywords,
    NoMultiplesOfSeven,
    NoPostprocess,
    NoPreprocess,
    Overridden,
    TakesModel,
    WithOptions,
)
from ray.data import ActorPoolStrategy
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from ray_zerocopy import (
    ModelLostError,
    ModelRef,
    ZeroCopyPredictor,
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._model.tensors import map_tensors


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    """Share a model that adds one."""
    return prepare_model_for_actors(predictors.adds_one())


def column(ds: Any, name: str) -> list[Any]:
    """Run the dataset and return a column, sorted."""
    return sorted(row[name] for row in ds.take_all())


POOL = {"compute": ActorPoolStrategy(size=2), "num_cpus": 0.1, "batch_size": 10}
EXPECTED = [float(x + 1) for x in range(40)]


def numbers() -> Any:
    return ray.data.range(40, override_num_blocks=4).rename_columns({"id": "x"})


def test_using_binds_the_model(model_ref: ModelRef) -> None:
    """`using(ref)` goes to map_batches as it is, and the operator shows the class's name."""
    ds = numbers().map_batches(AddOne.using(model_ref), batch_format="pyarrow", **POOL).materialize()
    assert column(ds, "y") == EXPECTED
    assert "MapBatches(AddOne)" in ds.stats()


def test_any_batch_format(model_ref: ModelRef) -> None:
    """Preprocess gets Arrow whatever the batch format, Ray Data's default among them."""
    ds = numbers()
    for batch_format in ("numpy", "pandas"):
        ds = ds.map_batches(AddOne.using(model_ref), batch_format=batch_format, **POOL)
        ds = ds.drop_columns(["x"]).rename_columns({"y": "x"})
    assert column(ds, "x") == [y + 1 for y in EXPECTED]


def test_constructor_argument(model_ref: ModelRef) -> None:
    """The model can come in fn_constructor_kwargs."""
    ds = numbers().map_batches(AddOne, fn_constructor_kwargs={"model_ref": model_ref}, **POOL)
    assert column(ds, "y") == EXPECTED


def test_options_reach_the_constructor(model_ref: ModelRef) -> None:
    """`using` binds the constructor's options, the subclass's own too, and each batch runs in inference mode."""
    bound = WithOptions.using(model_ref, factor=2.0, device="cpu", require_isolation=True)
    ds = numbers().map_batches(bound, batch_format="pyarrow", **POOL)
    assert column(ds, "y") == [2 * y for y in EXPECTED]
    assert all(column(ds, "inference"))


def test_a_constructor_that_asks_for_the_model(model_ref: ModelRef) -> None:
    """`using` gives the model to a constructor that takes it, by position or by name, and its options too."""
    bound = TakesModel.using(model_ref, threads=3)
    assert bound().threads == 3
    assert bound(model_ref).threads == 3
    assert bound(model_ref=model_ref, threads=4).threads == 4
    assert bound.using(model_ref, threads=5)().threads == 5
    assert bound.using(model_ref, threads=5)(model_ref).threads == 5
    twice = AddOne.using(model_ref).using(model_ref=model_ref)
    assert [made(BATCH).num_rows for made in (twice(), twice(model_ref), twice(model_ref=model_ref))] == [5] * 3
    assert WithOptions.using(model_ref, factor=2.0).using(model_ref)().factor == 2.0
    with pytest.raises(TypeError, match="constructor of WithOptions missing a required argument: 'factor'"):
        WithOptions.using(model_ref)


def test_one_class_with_two_models(model_ref: ModelRef) -> None:
    """A chain of one class with two models keeps them apart."""
    ten = nn.Linear(1, 1)
    nn.init.constant_(ten.weight, 10.0)
    nn.init.zeros_(ten.bias)
    other = prepare_model_for_actors(ten)
    ds = numbers().map_batches(AddOne.using(model_ref), **POOL).drop_columns(["x"]).rename_columns({"y": "x"})
    ds = ds.map_batches(AddOne.using(other), **POOL)
    assert column(ds, "y") == [10 * y for y in EXPECTED]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import pyarrow as pa, ray, torch
from ray.data import ActorPoolStrategy
from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors
from predictors import AddOne as Imported
ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200_000_000, logging_level="error")
ray.data.DataContext.get_current().enable_progress_bars = False
model = torch.nn.Linear(1, 1)
torch.nn.init.ones_(model.weight)
torch.nn.init.ones_(model.bias)
ref = prepare_model_for_actors(model)

class InMain(ZeroCopyPredictor):
    def preprocess(self, batch):
        return torch.tensor(batch["id"].to_pylist()).float()[:, None]
    def postprocess(self, outputs, batch):
        return {{"y": outputs[:, 0]}}

class WithAttribute(InMain):
    model_ref = ref

def pool(cls, **options):
    return ray.data.range(20).map_batches(cls, compute=ActorPoolStrategy(size=1), num_cpus=0.1, **options)

class Derived(Imported):
    model_ref = ref
    def preprocess(self, batch):
        return super().preprocess(batch.rename_columns(["x"]))

pools = [
    pool(InMain.using(ref)),
    pool(InMain, fn_constructor_kwargs={{"model_ref": ref}}),
    pool(WithAttribute),
    pool(Derived),
]
ds = pools[0].union(*pools[1:]).materialize()  # all at once
for name in ("InMain", "WithAttribute", "Derived"):
    assert f"MapBatches({{name}})" in ds.stats(), ds.stats()
assert sorted(row["y"] for row in ds.take_all()) == sorted([float(x + 1) for x in range(20)] * 4)

Imported.model_ref = ref
try:
    ray.data.range(20).map_batches(Imported, compute=ActorPoolStrategy(size=1), num_cpus=0.1).take_all()
except Exception as error:
    print("LOST:", error)
ray.shutdown()
"""


def test_classes_in_main_and_a_lost_attribute(tmp_path: Path) -> None:
    """In `__main__` all three ways work; an attribute set on an imported class is an error naming the remedy."""
    script = tmp_path / "main.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lost = done.stdout[done.stdout.index("LOST:") :]
    assert "AddOne got no model" in lost
    assert "AddOne.using(model_ref)" in lost
    assert "importable module (predictors)" in lost
    loaded = [line for line in (done.stdout + done.stderr).splitlines() if "loaded in" in line]
    assert "InMain: 20 rows in " in done.stdout + done.stderr  # the totals, at the actor's end
    assert any("InMain: Linear loaded in" in line and "writes isolated" in line for line in loaded), done.stderr


def predictor(form: str, model_ref: ModelRef) -> Formats:
    return Formats(form=form, model_ref=model_ref)


BATCH = {"x": np.arange(5)}


STRANGE = {
    "complex": np.array([1j, 2, 3], np.complex64),
    "other_byte_order": np.array([1, 2, 3], ">i4"),
    "long_double": np.array([1, 2, 3], np.longdouble),
}


@pytest.mark.parametrize("column", STRANGE)
@pytest.mark.parametrize("label", ["c", 0])
def test_columns_of_pandas_that_arrow_cannot_hold(column: str, label: Any, model_ref: ModelRef) -> None:
    """A column that the model does not use passes or is dropped; others keep their nulls. Names may be numbers."""
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0], "n": pd.array([1, None, 3], "Int64"), label: STRANGE[column]})
    rows = AddOne(model_ref)(frame)
    assert rows["y"].to_pylist() == [2.0, 3.0, 4.0]
    assert rows["n"].to_pylist() == [1, None, 3]
    assert [value == STRANGE[column][i] for i, value in enumerate(rows[str(label)].to_pylist())] == [True] * 3


@pytest.mark.parametrize("form", ["record_batch", "arrays", "bf16", "bf16_list", "fp8", "gradient"])
def test_forms_of_output(form: str, model_ref: ModelRef) -> None:
    """Tables, arrays, lists, and tensors that Ray Data would refuse come out as Arrow columns, exact."""
    rows = predictor(form, model_ref)(BATCH)
    assert isinstance(rows, pa.Table)
    assert rows.column("y").to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert set(rows.column_names) == {"arrays": {"y", "name", "z"}, "bf16": {"y", "m"}}.get(form, {"y"})


def test_forms_of_output_on_ray_data(model_ref: ModelRef) -> None:
    """Ray Data takes tensor columns, data frames and generators."""
    ds = numbers()
    for form in ("bf16", "pandas", "generator"):
        ds = ds.map_batches(Formats.using(model_ref, form=form), **POOL)
        ds = ds.select_columns(["y"]).rename_columns({"y": "x"})
    assert column(ds, "x") == [y + 2 for y in EXPECTED]


@pytest.mark.parametrize(
    ("form", "error", "words"),
    [
        ("tensor", TypeError, r"Formats.postprocess returned a torch.Tensor of shape \(5, 1\).*mapping"),
        ("none", TypeError, "Formats.postprocess returned None"),
        ("unequal", ValueError, "unequal length: y has 5, short has 1"),
        ("scalar", TypeError, r"a torch.Tensor of shape \(\) as column 'y'"),
        ("bytes", TypeError, "a builtins.bytes as column 'y'"),
        ("mapping", TypeError, "a builtins.dict as column 'y'"),
        ("same_name", ValueError, "two columns named '1'"),
    ],
)
def test_wrong_outputs(form: str, error: type[Exception], words: str, model_ref: ModelRef) -> None:
    """What Ray Data could not take is an error that names the class, what it returned, and what to return."""
    with pytest.raises(error, match=words):
        predictor(form, model_ref)(BATCH)


@pytest.mark.parametrize(
    "batch", [pa.table({"x": range(5)}), pa.RecordBatch.from_pydict({"x": range(5)}), BATCH, pd.DataFrame(BATCH)]
)
def test_forms_of_input(batch: Any, model_ref: ModelRef) -> None:
    """Every batch format of Ray Data reaches preprocess as a table."""
    assert AddOne(model_ref)(batch).column("y").to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_tensor_columns_survive_as_arrow(model_ref: ModelRef) -> None:
    """A column of tensors in a numpy batch is the tensor column that Ray Data itself would make."""

    class Sees(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            assert batch["image"].combine_chunks().to_numpy_ndarray().shape == (2, 3, 4)
            return super().preprocess(batch)

    Sees(model_ref)({"x": np.arange(2), "image": np.ones((2, 3, 4), dtype=np.uint8)})


@pytest.mark.parametrize(
    "batch", [[1, 2], {"x": 3}, {"x": [1, 2], "s": "text"}, {"x": [1, 2], "y": [3]}, {"s": "t"}, 7]
)
def test_what_is_no_batch(batch: Any, model_ref: ModelRef) -> None:
    """A row, or anything else that is no batch, is a TypeError that says where the class belongs."""
    with pytest.raises(TypeError, match=r"(?s)AddOne got a .*map_batches"):
        AddOne(model_ref)(batch)


@pytest.mark.parametrize(("cls", "expected"), [(Keywords, 1.0), (Overridden, 101.0)])
def test_predict(cls: type[ZeroCopyPredictor], expected: float, model_ref: ModelRef) -> None:
    """Mappings become keyword arguments, and predict can be overridden."""
    assert cls(model_ref)({"x": np.zeros(1)}).column("y").to_pylist() == [expected]


class Pair(NamedTuple):
    """Holds a tensor beside another thing."""

    ids: torch.Tensor
    name: str


@dataclass(frozen=True)
class Held:
    """Holds tensors deeper inside."""

    inner: Any


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([ONE, (ONE, 3)], lambda x: [x[0], x[1][0]]),
        ({"a": {"b": [ONE]}, "c": "text"}, lambda x: [x["a"]["b"][0]]),
        (OrderedDict(a=ONE), lambda x: [x["a"]]),
        (UserDict(a=ONE), lambda x: [x["a"]]),
        (MappingProxyType({"a": ONE}), lambda x: [x["a"]]),
        (BatchEncoding({"a": ONE}), lambda x: [x["a"]]),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=(ONE,)), lambda x: [x[0], x.hidden_states[0]]),
        (Pair(ONE, "name"), lambda x: [x.ids]),
        (Held([ONE]), lambda x: x.inner),
        (nn.utils.rnn.pack_sequence([ONE]), lambda x: [x.data]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_tensors_are_moved_wherever_they_are(values: Any, found: Any) -> None:
    """Every tensor that preprocess or predict returns is changed, in a holder of its type, and not in the old."""
    moved = map_tensors(values, lambda tensor: tensor + 1)
    assert type(moved) is (dict if isinstance(values, MappingProxyType) else type(values))
    assert all((tensor == 2).all() for tensor in found(moved))
    assert all((tensor == 1).all() for tensor in found(values))
    assert map_tensors(values, lambda tensor: tensor) is values


def test_packed_sequences_are_moved() -> None:
    """What torch packs for an RNN goes to a device but for the sizes, which torch wants on the host."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(1), torch.ones(3)], enforce_sorted=False)
    moved = map_tensors(packed, lambda tensor: tensor.to("meta"))
    devices = [part.device.type for part in (moved.data, moved.batch_sizes, moved.sorted_indices)]
    assert devices == ["meta", "cpu", "meta"]


def test_no_model(ray_session: None) -> None:
    """A predictor without a model names the three ways to give it one."""
    with pytest.raises(TypeError, match=r"AddOne got no model.*using\(model_ref\).*fn_constructor_kwargs"):
        AddOne()
    here = type("Here", (AddOne,), {"__module__": "__main__"})
    with pytest.raises(TypeError, match=r"fn_constructor_kwargs={[^}]*}\.$"):  # its attributes do reach the workers
        here()


def test_a_constructor_that_loads_no_model(model_ref: ModelRef) -> None:
    """A constructor that does not call the base class's is named with what to write in it."""

    class Forgets(AddOne):
        def __init__(self) -> None:
            self.words = ["no", "yes"]

    with pytest.raises(TypeError, match=r"Forgets.__init__ loaded no model. Call super\(\).__init__\(model_ref\)"):
        Forgets.using(model_ref)()(BATCH)


def test_a_preprocess_that_returns_nothing(model_ref: ModelRef) -> None:
    """A forgotten `return` is said of the method that lacks it, not of the model."""

    class Forgets(AddOne):
        def preprocess(self, batch: pa.Table) -> None:
            super().preprocess(batch)

    with pytest.raises(TypeError, match=r"Forgets.preprocess returned None"):
        Forgets(model_ref)(BATCH)


@pytest.mark.parametrize(("cls", "method"), [(NoPostprocess, "postprocess"), (NoPreprocess, "preprocess")])
def test_unwritten_methods(cls: type[ZeroCopyPredictor], method: str, model_ref: ModelRef) -> None:
    """A method not written is said in the driver by `using`, and by the constructor."""
    for make in (lambda: cls.using(model_ref), lambda: cls(model_ref)):
        with pytest.raises(TypeError, match=rf"{cls.__name__}.{method} is not written"):
            make()


def test_using_leaves_a_constructor_to_complete_the_class(model_ref: ModelRef) -> None:
    """A constructor that gives the missing options to `super().__init__` is not refused in the driver."""

    class Completes(ZeroCopyPredictor):
        def __init__(self, ref: ModelRef | None = None) -> None:
            super().__init__(ref, input_columns=["x"], output_column="y")

    rows = Completes.using(model_ref)()(pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1.0]), 1)}))
    assert rows.column_names == ["x", "y"]
    with pytest.raises(TypeError, match="preprocess is not written"):
        NoPreprocess.using(model_ref, input_columns=["x"]).using(model_ref, input_columns=None)


def test_using_checks_its_arguments(model_ref: ModelRef) -> None:
    """`using` refuses what is no handle and options that the constructor does not have, in the driver."""
    with pytest.raises(TypeError, match=r"a ModelRef is needed to load a model, not torch.*Linear"):
        AddOne.using(nn.Linear(1, 1))
    for made in (AddOne, AddOne.using(model_ref)):
        with pytest.raises(TypeError, match=r"constructor of AddOne.*num_gpus.*takes model_ref, device.*map_batches"):
            made.using(model_ref, num_gpus=1)
    with pytest.raises(ModelLostError, match="from another Ray session"):
        AddOne.using(dataclasses.replace(model_ref, session="of yesterday"))


def test_an_instance_is_not_sent(model_ref: ModelRef) -> None:
    """An instance where Ray Data wants the class is refused with what to write."""
    with pytest.raises(TypeError, match=r"an instance of AddOne.*ds.map_batches\(AddOne.using\(model_ref\)\)"):
        ray.put(AddOne(model_ref))


# ---------------------------------------------------------------- the options that stand for methods


class Two(nn.Module):
    """Takes two inputs and returns two outputs, and says of which dtypes the inputs and the product were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        assert a.dtype == self.linear.weight.dtype
        product = self.linear(a)
        self.said = product.dtype
        return {"sum": product.sum(-1) + b, "product": product}


@pytest.fixture(scope="module")
def two(ray_session: None) -> tuple[Two, ModelRef]:
    """Share a model of two inputs."""
    model = Two().eval()
    return model, prepare_model_for_actors(model)


A = torch.arange(10.0).reshape(5, 2)
PAIRS = pa.table(
    {
        "a": pa.FixedSizeListArray.from_arrays(pa.array(A.double().flatten().numpy()), 2),  # as Ray Data reads floats
        "b": pa.array(range(5)),
        "name": list("vwxyz"),
    }
)


def test_defaults_on_ray_data(model_ref: ModelRef) -> None:
    """The base class itself, with two options, is a predictor for map_batches."""
    bound = ZeroCopyPredictor.using(model_ref, input_columns=["x"], output_column="y", keep_columns=False)
    ds = numbers().map_batches(lambda batch: {"x": batch["x"].astype(np.float32)[:, None]})
    ds = ds.map_batches(bound, batch_format="pyarrow", **POOL)
    rows = ds.take_all()
    assert sorted(float(row["y"][0]) for row in rows) == EXPECTED
    assert {tuple(row) for row in rows} == {("y",)}


@pytest.mark.parametrize("columns", [["a", "b"], {"b": "b", "a": "a"}], ids=["positional", "keywords"])
def test_input_columns(columns: Any, two: tuple[Two, ModelRef]) -> None:
    """Columns reach the model by position or by name, cast to the weights' dtype, and fields become columns."""
    model, ref = two
    outputs = {"product": "p", "sum": "s"}
    rows = ZeroCopyPredictor(ref, input_columns=columns, output_column=outputs)(PAIRS)
    with torch.inference_mode():
        expected = model(A, torch.arange(5))
    assert rows.column_names == ["a", "b", "name", "p", "s"]
    assert rows.column("s").to_pylist() == expected["sum"].tolist()
    assert (rows["p"].combine_chunks().to_numpy_ndarray() == expected["product"].numpy()).all()


def test_input_columns_with_a_preprocess_on_top(two: tuple[Two, ModelRef]) -> None:
    """A subclass that goes on from the default inputs has them cast to the weights' dtype all the same."""

    class Halved(ZeroCopyPredictor):
        input_columns = ("a", "b")
        output_column: Any = {"sum": "s"}  # noqa: RUF012

        def preprocess(self, batch: pa.Table) -> dict[str, torch.Tensor]:
            a, b = super().preprocess(batch)
            return {"a": a / 2, "b": b}

    model, ref = two
    with torch.inference_mode():
        expected = model(A / 2, torch.arange(5))["sum"]
    assert Halved(ref)(PAIRS)["s"].to_pylist() == expected.tolist()


@pytest.mark.parametrize(
    ("keep", "names"),
    [(True, ["a", "b", "name"]), (False, []), ((), []), (["name"], ["name"]), ("b", ["b"])],
)
def test_keep_columns(keep: Any, names: list[str], two: tuple[Two, ModelRef]) -> None:
    """The columns of the batch that go on are all, none, or those named."""
    _, ref = two

    class Named(ZeroCopyPredictor):
        input_columns = ("a", "b")
        output_column: Any = {"sum": "s"}  # noqa: RUF012
        keep_columns = keep

    assert Named(ref)(PAIRS).column_names == [*names, "s"]
    assert Named(ref, keep_columns=["b", "a"])(PAIRS).column_names == ["b", "a", "s"]


def test_outputs_by_position_and_attribute(two: tuple[Two, ModelRef]) -> None:
    """Outputs are named by position or attribute, Hugging Face's by either; a list of tensors is a ragged column."""
    _, ref = two

    class Returns(ZeroCopyPredictor):
        input_columns = "b"
        keep_columns = False

        def predict(self, inputs: torch.Tensor) -> Any:
            parts = [torch.arange(int(n)) for n in inputs]
            return self.form(inputs, parts)

        def form(self, inputs: torch.Tensor, parts: Any) -> Any:
            return inputs, parts

    class Attributes(Returns):
        def form(self, inputs: torch.Tensor, parts: Any) -> Any:
            return SimpleNamespace(real=inputs)

    class HuggingFace(Returns):
        def form(self, inputs: torch.Tensor, parts: Any) -> Any:
            return BaseModelOutput(last_hidden_state=inputs)

    assert Returns(ref, output_column={0: "n", -1: "parts"})(PAIRS).to_pylist()[2] == {"n": 2, "parts": [0, 1]}
    assert Attributes(ref, output_column={"real": "n"})(PAIRS)["n"].to_pylist() == [0, 1, 2, 3, 4]
    for field in (0, "last_hidden_state"):
        assert HuggingFace(ref, output_column={field: "n"})(PAIRS)["n"].to_pylist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("outputs", "option", "error", "words"),
    [
        (lambda x: (x, x * 2), "y", TypeError, r"a builtins.tuple.*output_column=\{0: \.\.\., 1: \.\.\.\}"),
        (lambda x: tuple(x), {0: "n", 1: "y"}, None, ""),
        (lambda x: x, {"T": "y"}, TypeError, "which has no output 'T'"),
        (lambda x: x.sum(), "y", ValueError, r"Returns.output_column: .*of shape \(\).*Or write postprocess"),
        (lambda x: list(x), "y", None, ""),
        (lambda x: [], "y", ValueError, "Returns.output_column: .*builtins.list.*Or write postprocess"),
        (lambda x: list(x[:, None]), "y", None, ""),
        *(
            (lambda x, layout=layout: torch.nested.as_nested_tensor([x[:1], x], layout=layout), "y", TypeError, words)
            for layout in (torch.strided, torch.jagged)
            for words in [r"torch.*nested.*list\(tensor.unbind\(\)\)"]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_outputs_that_are_no_column(
    outputs: Any, option: Any, error: Any, words: str, two: tuple[Two, ModelRef]
) -> None:
    """A tuple asks for names also where it has as many items as there are rows; other errors name the option too."""

    class Returns(ZeroCopyPredictor):
        input_columns = "b"

        def predict(self, inputs: torch.Tensor) -> Any:
            return outputs(inputs)

    predictor = Returns(two[1], output_column=option)
    if error is not None:
        with pytest.raises(error, match=words):
            predictor(PAIRS.slice(0, 2))
    elif isinstance(option, str):
        assert np.ravel(predictor(PAIRS.slice(0, 2))["y"].to_pylist()).tolist() == [0, 1]
    else:
        with pytest.raises(ValueError, match=r"shape \(\)"):
            predictor(PAIRS.slice(0, 2))


def test_a_list_of_no_rows(two: tuple[Two, ModelRef]) -> None:
    """An empty batch's empty list of outputs is an empty column."""

    class Listed(ZeroCopyPredictor):
        input_columns = "b"
        output_column = "y"

        def predict(self, inputs: torch.Tensor) -> Any:
            return list(inputs)

    assert len(Listed(two[1])(PAIRS.slice(0, 0))["y"]) == 0


def test_names_given_twice(model_ref: ModelRef) -> None:
    """Two outputs for one column, or two columns for one argument, are refused at once."""
    for options in ({"output_column": {0: "y", 1: "y"}}, {"input_columns": {"a": "x", "b": "x"}}):
        with pytest.raises(ValueError, match=f"ZeroCopyPredictor.{next(iter(options))} names '[xy]' twice"):
            ZeroCopyPredictor.using(model_ref, **{"input_columns": "x", "output_column": "y"} | options)


def test_numpy_integers_and_handles_of_pipelines(model_ref: ModelRef) -> None:
    """A size may be numpy's integer; a pipeline's handle is refused with the way to load it."""
    assert AddOne(model_ref, micro_batch_size=np.int64(2))(BATCH)["y"].to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    _, refs = rewrite_pipeline_for_actors(SimpleNamespace(a=nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="load_pipeline_in_actor"):
        AddOne(refs)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"input_columns": ["a", "c"]}, ValueError, r"Wrong.input_columns: the batch has no column 'c'. It has 'a'"),
        ({"input_columns": ["name"]}, TypeError, r"Wrong.input_columns: column 'name' \(string\).*tokenizer"),
        (
            {"output_column": "y"},
            TypeError,
            r"outputs, a builtins.dict, cannot become column 'y'.*\{'sum': \.\.\., 'pro",
        ),
        ({"output_column": {"logits": "y"}}, TypeError, r"has no output 'logits'. Name the outputs: output_column="),
        ({"output_column": {"sum": "name"}}, ValueError, r"already has a column 'name'.*keep_columns"),
        ({"keep_columns": ["z"]}, ValueError, r"Wrong.keep_columns names 'z', .* It has 'a', 'b', 'name'\."),
        ({"rows": 3}, ValueError, r"shape \(3,\), have 3 rows for a batch of 5.*Write postprocess"),
    ],
)
def test_wrong_batches_and_outputs(
    options: dict[str, Any], error: type[Exception], words: str, two: tuple[Two, ModelRef]
) -> None:
    """What a batch or the model's outputs lack is an error of the user's class, with the option and the remedy."""

    class Wrong(ZeroCopyPredictor):
        input_columns = ("a", "b")
        output_column: Any = {"sum": "s"}  # noqa: RUF012
        rows = options.pop("rows", 5)

        def predict(self, inputs: Any) -> Any:
            return {key: value[: self.rows] for key, value in super().predict(inputs).items()}

    with pytest.raises(error, match=words):
        Wrong(two[1], **options)(PAIRS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("input_columns", 3),
        ("input_columns", []),
        ("input_columns", {1: "a"}),
        ("output_column", ["y"]),
        ("output_column", {"sum": 1}),
        ("keep_columns", [1]),
        ("compile", "eager"),
        ("micro_batch_size", 0),
        ("micro_batch_size", True),
        ("on_error", "ignore"),
        ("dtype", "bfloat16"),
        ("dtype", torch.int8),
    ],
)
def test_options_of_the_wrong_kind(option: str, value: Any, model_ref: ModelRef) -> None:
    """An option of the wrong kind is said with the class and the option, by `using` in the driver too."""
    given = {"input_columns": "x", "output_column": "y"} | {option: value}
    with pytest.raises(TypeError, match=f"ZeroCopyPredictor.{option} is "):
        ZeroCopyPredictor.using(model_ref, **given)
    with pytest.raises(TypeError, match=f"ZeroCopyPredictor.{option} is "):
        ZeroCopyPredictor(model_ref, **given)


def test_options_of_a_class_with_its_own_constructor(model_ref: ModelRef) -> None:
    """`using` gives this class's options to a subclass whose constructor knows nothing of them."""
    bound = TakesModel.using(model_ref, threads=3, dtype=torch.bfloat16)
    assert bound().threads == 3
    assert bound().dtype is torch.bfloat16
    assert TakesModel(model_ref).dtype is None


# ---------------------------------------------------------------- dtype and compile


def test_dtype_by_autocast(two: tuple[Two, ModelRef]) -> None:
    """Weights of another dtype stay as they are, shared, and the forward runs under autocast."""
    predictor = ZeroCopyPredictor(
        two[1], input_columns=["a", "b"], output_column={"product": "y"}, dtype=torch.bfloat16
    )
    predictor(PAIRS)
    assert predictor.model.said == torch.bfloat16
    assert predictor.model.linear.weight.dtype == torch.float32
    assert memory.model_memory(predictor.model).private == 0
    assert not torch.is_autocast_enabled("cpu")


def test_dtype_cast_before_sharing(ray_session: None) -> None:
    """Weights cast before sharing get floating inputs of their dtype, from a method of one's own too."""
    ref = prepare_model_for_actors(Two().to(torch.bfloat16))

    class Own(ZeroCopyPredictor):
        output_column: Any = {"product": "y"}  # noqa: RUF012

        def preprocess(self, batch: pa.Table) -> dict[str, torch.Tensor]:
            return {"a": A, "b": torch.arange(5)}

    predictor = Own(ref, dtype=torch.bfloat16)
    assert predictor(PAIRS)["y"].combine_chunks().to_numpy_ndarray().dtype == np.float32
    assert predictor.model.said == torch.bfloat16
    assert predictor._runner._work._autocast is None


def test_dtype_that_would_copy_the_weights(two: tuple[Two, ModelRef]) -> None:
    """A dtype that only casting could give is refused, with the way to cast before sharing."""
    with pytest.raises(ValueError, match=r"model.to\(torch.float64\)"):
        ZeroCopyPredictor(two[1], input_columns="a", output_column="y", dtype=torch.float64)


def large_tensors(nbytes: int) -> set[int]:
    """Return where the tensors of this process are whose storage is of that size."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    return {t.data_ptr() for t in found if t.layout is torch.strided and t.untyped_storage().nbytes() == nbytes}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch, of itself
def test_compile_keeps_the_weights_shared(ray_session: None) -> None:
    """A model compiled by inductor gives the same, on the shared weights, with no second copy of them."""
    from torch._dynamo.utils import counters  # takes seconds to import, in each worker that imports this file

    model = nn.Sequential(nn.Linear(64, 517), nn.ReLU(), nn.Linear(517, 3)).eval()
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(640, np.float32)), 64)})
    predictor = ZeroCopyPredictor(
        prepare_model_for_actors(model), input_columns="x", output_column="y", compile={"dynamic": True}
    )
    before = large_tensors(4 * 64 * 517)
    torch._dynamo.reset()
    counters.clear()
    rows = predictor(table)
    with torch.inference_mode():
        expected = model(torch.ones(10, 64))
    torch.testing.assert_close(torch.from_numpy(rows["y"].combine_chunks().to_numpy_ndarray().copy()), expected)
    assert counters["stats"] == {"calls_captured": 3, "unique_graphs": 1}
    assert large_tensors(4 * 64 * 517) == before  # the model's, and the source's
    assert memory.model_memory(predictor.model).private == 0


def test_compile_does_not_compile_without_end(two: tuple[Two, ModelRef]) -> None:
    """Batches of many sizes compile a model two times, or three, not once a size."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    class Sizes(ZeroCopyPredictor):
        input_columns = ("a", "b")
        output_column: Any = {"product": "y"}  # noqa: RUF012

    torch._dynamo.reset()
    predictor = Sizes(two[1], compile={"backend": backend})
    large = pa.concat_tables([PAIRS] * 8)
    for size in (32, 16, 7, 40, 1, 2, 3, 31):
        predictor(large.slice(0, size))
    assert 1 <= len(compiled) <= 3


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch, of itself
def test_compile_refuses_what_is_compiled(ray_session: None) -> None:
    """TorchScript is not for torch.compile, and the error says so."""
    ref = prepare_model_for_actors(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)))
    with pytest.raises(TypeError, match=r"ZeroCopyPredictor.compile is set.*RecursiveScriptModule"):
        ZeroCopyPredictor(ref, input_columns="x", output_column="y", compile=True)


# ---------------------------------------------------------------- rows that fail


class ByValue(AddOne):
    """Sorts by a method, and notes the values of each micro-batch."""

    micro_batch_size = 3

    def sort_by(self, batch: pa.Table) -> list[float]:
        return [abs(x) for x in batch["x"].to_pylist()]

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        largest = pa.array([max(batch["x"].to_pylist())] * len(batch))
        return super().postprocess(outputs, batch).append_column("largest", largest)


@pytest.mark.parametrize("way", ["column", "function", "method"])
def test_sort_by_on_ray_data(way: str, model_ref: ModelRef) -> None:
    """A column, a function and a method sort the rows of a batch, and the rows come back in their own order."""
    if way == "method":
        bound: Any = ByValue.using(model_ref)
    else:
        sort_by: Any = "x" if way == "column" else lambda batch: batch["x"].to_pylist()
        bound = AddOne.using(model_ref, sort_by=sort_by, micro_batch_tokens=60)
    ds = numbers().map_batches(bound, batch_format="pyarrow", **POOL)
    rows = ds.take_all()
    assert sorted(row["y"] for row in rows) == EXPECTED
    assert all(row["y"] == row["x"] + 1 for row in rows)
    if way == "method":
        assert all(row["largest"] - row["x"] in (0, 1, 2) for row in rows)


def test_sort_by_that_takes_no_batch(model_ref: ModelRef) -> None:
    """A lambda in a class body would become a method without arguments; the error says what to write."""

    class Wrong(AddOne):
        sort_by = lambda batch: [1] * len(batch)  # noqa: E731

    with pytest.raises(TypeError, match=r"Wrong.sort_by does not take one argument.*staticmethod"):
        Wrong(model_ref)
    with pytest.raises(ValueError, match=r"AddOne.micro_batch_tokens is 9.*sort_by"):
        AddOne.using(model_ref, micro_batch_tokens=9)


def seven(x: int) -> str | None:
    return f"preprocess: ValueError: {x} is a multiple of seven" if x % 7 == 0 else None


def test_on_error_null_on_ray_data(model_ref: ModelRef) -> None:
    """Rows that preprocess cannot take become nulls with what it said, in order, and the job goes on."""
    ds = numbers().map_batches(
        NoMultiplesOfSeven.using(model_ref, on_error="null", micro_batch_size=4), batch_format="pyarrow", **POOL
    )
    rows = ds.take_all()
    expected = [{"x": x, "y": None if seven(x) else x + 1.0, "error": seven(x)} for x in range(40)]
    assert sorted(rows, key=lambda row: row["x"]) == expected


@pytest.mark.parametrize("size", [None, 1, 3, 40])
def test_on_error_null_has_one_schema(size: int | None, model_ref: ModelRef) -> None:
    """Batches with errors and without have one schema, and failed rows are counted once, whatever the parts."""
    predictor = NoMultiplesOfSeven(model_ref, on_error="null", micro_batch_size=size)
    without = predictor({"x": np.arange(1, 7)})
    assert without["error"].to_pylist() == [None] * 6
    rows = predictor({"x": np.arange(30)})
    assert rows.schema == without.schema
    assert rows["x"].to_pylist() == list(range(30))
    assert rows["error"].to_pylist() == [seven(x) for x in range(30)]
    assert rows["y"].to_pylist() == [None if seven(x) else x + 1.0 for x in range(30)]
    assert (predictor.totals.rows, predictor.totals.failed_rows) == (36, 5)
    all_failed = predictor({"x": np.array([7, 14])})
    assert all_failed.schema == without.schema
    assert all_failed["x"].to_pylist() == [7, 14]
    assert all_failed["y"].null_count == 2


def test_on_error_null_with_the_defaults(ray_session: None) -> None:
    """The default postprocess gives nulls in tensor columns, and what is known where no row was good yet."""

    class Decodes(ZeroCopyPredictor):
        output_column = "y"
        keep_columns = ("text", "score")
        on_error = "null"

        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            return torch.tensor([[float(text)] for text in batch["text"].to_pylist()])

    model = nn.Linear(1, 2)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    ref = prepare_model_for_actors(model)
    predictor = Decodes(ref)
    first = predictor(pa.table({"text": ["a", "b"], "score": [float("nan")] * 2, "other": [1, 2]}))
    assert first.column_names == ["text", "score", "error"]
    assert first["error"][0].as_py() == "preprocess: ValueError: could not convert string to float: 'a'"
    rows = predictor(pa.table({"text": ["1", "b", "3"], "score": [float("nan")] * 3, "other": [1, 2, 3]}))
    assert rows["text"].to_pylist() == ["1", "b", "3"]
    assert rows["score"].null_count == 0  # kept as it was, also where it is NaN
    np.testing.assert_array_equal(np.stack(rows["y"].to_pylist()), [[1, 1], [np.nan] * 2, [3, 3]])
    split = Decodes(ref, micro_batch_size=1)
    table = split(pa.table({"text": ["a", "2"], "score": [1.0, 2.0]}))
    assert table.column_names == ["text", "score", "y", "error"]
    np.testing.assert_array_equal(np.stack(table["y"].to_pylist()), [[np.nan] * 2, [2, 2]])


class EvenTensors(ZeroCopyPredictor):
    """Makes tensor columns, of which odd rows fail."""

    on_error = "null"
    native = False

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        x = torch.tensor(batch["id"].to_pylist())
        if (x % 2 == 1).any():
            raise ValueError("odd")
        return x[:, None].float()

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
        x = outputs - 1
        columns = {"float": x.expand(-1, 2), "int": x.long().expand(-1, 2), "void": torch.empty(len(x), 0)}
        if not self.native:  # Arrow's own tensors hold no bools and no text
            columns["bool"] = x.expand(-1, 2) > 1
            columns["text"] = np.array([["yes", "no"]] * len(x))
        return {"id": batch["id"], **columns, "varied": [row[None].expand(2, int(row) + 1) for row in x]}


NO_VALUE = {
    "void": [],
    "float": [np.nan] * 2,
    "int": [0, 0],
    "bool": [False] * 2,
    "text": [""] * 2,
    "varied": np.zeros((0, 0)),
}


@pytest.mark.parametrize("form", ["V1", "V2", "ARROW_NATIVE"])
def test_on_error_null_leaves_tensors_in_their_rows(
    form: str, model_ref: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reader of Ray Data finds each row's own tensor beside and behind rows that failed, in all types."""
    context = ray.data.DataContext.get_current()
    formats = type(context.arrow_fixed_shape_tensor_format)
    monkeypatch.setattr(context, "arrow_fixed_shape_tensor_format", formats[form])
    predictor = EvenTensors(model_ref)
    predictor.native = form == "ARROW_NATIVE"
    good = predictor(pa.table({"id": [0, 2]}))
    tables = [predictor(pa.table({"id": ids})) for ids in ([0, 1, 2, 3, 4, 5, 6, 8], [7, 9], [11, 10])]
    assert all(table.schema == good.schema for table in tables)

    def check(rows: Any) -> None:
        rows = list(rows)
        assert len(rows) == 12
        for row in rows:
            x = int(row["id"])
            expected = {
                "void": [],
                "float": [x] * 2,
                "int": [x] * 2,
                "bool": [x > 1] * 2,
                "varied": np.full((2, x + 1), x),
            }
            for name in set(expected) & set(good.column_names):
                value = (NO_VALUE if x % 2 else expected)[name]
                np.testing.assert_array_equal(np.asarray(row[name]), value)

    def rows_of(batch: Any) -> Any:
        return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    ds = ray.data.from_arrow(tables).materialize()
    check(ds.take_all())
    check(row for batch in ds.iter_batches(batch_size=5) for row in rows_of(batch))
    check(row for batch in ds.iter_batches(batch_size=5, batch_format="pandas") for _, row in batch.iterrows())
    check(ds.to_pandas().to_dict("records"))
    moved = ds if predictor.native else ds.sort("id", descending=True)  # Ray 2.60 cannot sort beside Arrow's tensors
    check(moved.map_batches(lambda batch: batch, batch_size=5).take_all())


def test_on_error_null_keeps_only_what_was_passed_on(model_ref: ModelRef) -> None:
    """A column that equals the input's by chance is null where a row failed, and inputs never stand for outputs."""

    class Overwrites(NoMultiplesOfSeven):
        on_error = "null"

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return batch.set_column(2, "s", pa.array([0.0] * len(batch)))

    def batch(*x: int) -> pa.Table:
        fields = [
            pa.field("x", pa.int64(), False),
            pa.field("kept", pa.int64(), False, {"a": "b"}),
            pa.field("s", pa.float64()),
        ]
        return pa.table([x, x, [0.0] * len(x)], schema=pa.schema(fields))

    predictor = Overwrites(model_ref)
    unknown = predictor(batch(7, 14))
    assert unknown.column_names == ["x", "kept", "s", "error"]  # the rows can be found and run again
    assert unknown["x"].to_pylist() == [7, 14]
    assert unknown["error"].null_count == 0
    good, mixed, failed = predictor(batch(1, 2)), predictor(batch(1, 7)), predictor(batch(14, 7))
    assert mixed.to_pydict() == {"x": [1, 7], "s": [0.0, None], "kept": [1, 7], "error": [None, seven(7)]}
    assert failed.drop_columns("error").to_pydict() == {"x": [14, 7], "s": [None, None], "kept": [14, 7]}
    for table in (mixed, failed):
        assert table.schema.equals(good.schema, check_metadata=True)
    assert [field.nullable for field in good.schema] == [False, False, True, True]


@pytest.mark.parametrize("size", [None, 1, 2])
def test_on_error_null_when_the_first_part_fails(
    size: int | None, model_ref: ModelRef, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts that fail wholly before the columns are known keep what was passed on, as the whole batch does."""
    predictor = NoMultiplesOfSeven(model_ref, on_error="null", micro_batch_size=size)
    rows = predictor({"x": np.array([7, 14, 1, 2])})
    assert rows.column_names == ["x", "y", "error"]
    assert rows["x"].to_pylist() == [7, 14, 1, 2]
    assert rows["y"].to_pylist() == [None, None, 2.0, 3.0]
    assert rows["error"].to_pylist() == [seven(7), seven(14), None, None]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_on_error_null_after_an_empty_batch(model_ref: ModelRef) -> None:
    """A batch without rows does not make the input's values stand for outputs of the same name."""

    class Overwrites(NoMultiplesOfSeven):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return batch.set_column(1, "s", pa.array([0.0] * len(batch), pa.float64()))

    predictor = Overwrites(model_ref, on_error="null")
    for x in ([1, 2], []):
        predictor(pa.table({"x": pa.array(x, pa.int64()), "s": pa.array([5.0] * len(x), pa.float64())}))
    assert predictor(pa.table({"x": [7], "s": [5.0]}))["s"].to_pylist() == [None]


def test_on_error_null_keeps_columns_of_another_type(model_ref: ModelRef) -> None:
    """Blocks may differ in the type of a column: what is passed on is kept also where every row of a batch fails."""
    predictor = NoMultiplesOfSeven(model_ref, on_error="null")
    predictor(pa.table({"x": [1, 2], "s": [1, 2]}))
    assert predictor(pa.table({"x": [7, 14], "s": [0.5, 1.5]}))["s"].to_pylist() == [0.5, 1.5]


def test_on_error_null_takes_text_as_views(model_ref: ModelRef) -> None:
    """Text as polars writes it to Parquet, which Arrow cannot filter, is kept, and made, like any other."""

    class Shouts(NoMultiplesOfSeven):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            loud = pa.array([text.upper() for text in batch["text"].to_pylist()], pa.string_view())
            return batch.append_column("loud", loud)

    x = [7, 14, 1, 2, 21, 3]
    batch = pa.table({"x": x, "text": pa.array([f"number {n}" for n in x], pa.string_view())})
    predictor = Shouts(model_ref, on_error="null")
    good, mixed = predictor(batch.slice(2, 2)), predictor(batch)
    assert mixed.schema == good.schema
    assert mixed["text"].to_pylist() == batch["text"].to_pylist()
    assert mixed["loud"].to_pylist() == [None if seven(n) else f"NUMBER {n}" for n in x]


def test_on_error_null_tells_dictionaries_apart(model_ref: ModelRef) -> None:
    """A column of the same codes with other words is an output, and comes out as postprocess made it."""

    class Translates(NoMultiplesOfSeven):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            codes = batch["word"].chunk(0).indices
            return batch.set_column(1, "word", pa.DictionaryArray.from_arrays(codes, ["oui", "non"]))

    words = pa.array(["yes", "no", "no"]).dictionary_encode()
    predictor = Translates(model_ref, on_error="null")
    assert predictor(pa.table({"x": [1, 2, 3], "word": words}))["word"].to_pylist() == ["oui", "non", "non"]
    assert predictor(pa.table({"x": [1, 7, 3], "word": words}))["word"].to_pylist() == ["oui", None, "non"]


def test_on_error_null_when_all_rows_fail_first(model_ref: ModelRef, caplog: pytest.LogCaptureFixture) -> None:
    """A first batch that fails wholly warns of the columns it lacks, and an error column of the user's is refused."""

    class Never(ZeroCopyPredictor):
        on_error = "null"
        output_column = "y"

        def preprocess(self, batch: pa.Table) -> Any:
            raise ValueError("never")

    assert Never(model_ref)({"x": np.arange(2)}).column_names == ["x", "error"]
    assert any("only the columns 'x', 'error'" in r.message and r.levelname == "WARNING" for r in caplog.records)
    with pytest.raises(ValueError, match="a column 'error' already"):
        Never(model_ref)({"error": np.arange(2)})
    with pytest.raises(ValueError, match="never"):
        Never(model_ref)(pa.table({"x": pa.array([], pa.int64())}))


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (lambda y: {"y": y[:1]}, ValueError, "postprocess returned 1 rows for 4, so on_error='null' cannot tell"),
        (lambda y: ({"y": part} for part in y), TypeError, "postprocess returned a builtins.generator"),
        (lambda y: {"error": y}, ValueError, "a column 'error' already"),
    ],
)
def test_on_error_null_needs_a_row_for_each(
    result: Any, error: type[Exception], words: str, model_ref: ModelRef
) -> None:
    """A postprocess whose rows cannot be told apart is an error, also for a batch in which nothing failed."""

    class Changes(NoMultiplesOfSeven):
        on_error = "null"

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return result(outputs[:, 0])

    for x in ([1, 2, 3, 4], [7, 1, 2, 3, 4]):
        with pytest.raises(error, match=words):
            Changes(model_ref)({"x": np.array(x)})


def test_on_error_null_is_for_rows(model_ref: ModelRef) -> None:
    """An error that no row has by itself, or that comes from the model, still ends the job."""

    class Together(AddOne):
        on_error = "null"

        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            if len(batch) > 3:
                raise RuntimeError("too many together")
            return super().preprocess(batch)

        def predict(self, inputs: torch.Tensor) -> torch.Tensor:
            raise KeyError("of the model")

    with pytest.raises(RuntimeError, match="too many together"):
        Together(model_ref)({"x": np.arange(5)})
    with pytest.raises(KeyError, match="of the model"):
        Together(model_ref)({"x": np.arange(3)})


def test_on_error_null_is_not_for_columns(model_ref: ModelRef) -> None:
    """With `input_columns` a null is its row's failure, a column that is absent or no numbers is the job's."""
    predictor = ZeroCopyPredictor(model_ref, input_columns="x", output_column="y", on_error="null")
    values = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0]), 1)
    rows = predictor(pa.table({"x": values.take(pa.array([0, None, 1]))}))
    assert [said is None for said in rows["error"].to_pylist()] == [True, False, True]
    for nothing in (pa.array([[], []]), pa.array([[[None]], None]), pa.nulls(2)):  # as Ray Data reads such a block
        only_nulls = predictor(pa.table({"x": nothing}))
        assert only_nulls.schema.remove(0) == rows.schema.remove(0)
        assert only_nulls["error"].null_count == 0
    assert only_nulls["x"].type == rows["x"].type
    with pytest.raises(ValueError, match=r"ZeroCopyPredictor.input_columns: the batch has no column 'x'"):
        predictor(pa.table({"z": values}))
    with pytest.raises(TypeError, match="no tensor form"):
        predictor(pa.table({"x": ["a", "b"]}))


# ---------------------------------------------------------------- where the time went


def test_totals(model_ref: ModelRef) -> None:
    """The totals say how long each stage took and how long no batch was there, none twice, and print as one line."""

    class Slow(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            time.sleep(0.02)
            return super().preprocess(batch)

        def predict(self, inputs: torch.Tensor) -> torch.Tensor:
            time.sleep(0.04)
            return super().predict(inputs)

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            for _ in range(3):
                time.sleep(0.02)
                yield {"y": outputs[:, 0]}

    predictor = Slow(model_ref)
    begin = time.perf_counter()
    for _ in range(2):
        assert len(list(predictor(BATCH))) == 3
        time.sleep(0.1)
    elapsed = time.perf_counter() - begin
    seconds = predictor.totals.seconds
    assert seconds["preprocess"] >= 0.04
    assert seconds["predict"] >= 0.08
    assert seconds["postprocess"] >= 0.12
    assert seconds["waiting"] >= 0.1
    assert sum(seconds.values()) <= elapsed
    assert "Slow: 10 rows in 2 batches" in str(predictor.totals)
    assert all(f"{stage} 0." in str(predictor.totals) for stage in seconds)


def test_totals_are_logged(
    model_ref: ModelRef, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is logged after the first batch, once a period, and when the predictor goes; not without news."""
    caplog.set_level("INFO")

    def lines() -> int:
        return sum("batches and" in record.message for record in caplog.records)

    predictor = AddOne(model_ref)
    for expected in (1, 1):  # after the first batch, and not after each
        predictor(BATCH)
        assert lines() == expected
    del predictor
    gc.collect()
    assert lines() == 2
    assert "10 rows in 2 batches" in caplog.records[-1].message
    monkeypatch.setattr("ray_zerocopy._batch.totals.SUMMARY_SECONDS", 0.0)
    predictor = AddOne(model_ref)
    predictor(BATCH)
    predictor(BATCH)
    assert lines() == 4
    del predictor
    gc.collect()
    assert lines() == 4  # nothing new to say
    idle = AddOne(model_ref)
    del idle
    gc.collect()
    assert lines() == 4


def test_metrics(model_ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's metrics get load seconds, bytes, seconds by stage, rows, failed rows and retries, with the class."""
    recorded: list[tuple[str, float, dict[str, str]]] = []
    record = ray.util.metrics.Metric._record

    def seen(self: Any, value: float, tags: Any = None) -> None:
        record(self, value, tags)
        recorded.append((self.info["name"], value, tags))

    monkeypatch.setattr(ray.util.metrics.Metric, "_record", seen)

    class Small(NoMultiplesOfSeven):
        def predict(self, inputs: torch.Tensor) -> torch.Tensor:
            if len(inputs) > 4:
                raise torch.OutOfMemoryError
            return super().predict(inputs)

    predictor = Small(model_ref, on_error="null")
    predictor({"x": np.arange(8)})
    values = {name: value for name, value, _ in recorded}
    assert values["zerocopy_load_seconds"] == predictor.loaded.seconds
    assert values["zerocopy_bytes_shared"] == predictor.loaded.shared == 128
    assert values["zerocopy_bytes_private"] == predictor.loaded.private + model_ref.carried_nbytes > 0
    assert values["zerocopy_memory_retries"] == 1
    assert sum(value for name, value, _ in recorded if name == "zerocopy_rows") == 8
    assert sum(value for name, value, _ in recorded if name == "zerocopy_failed_rows") == 2
    stages = {tags["stage"] for name, _, tags in recorded if name == "zerocopy_stage_seconds"}
    assert stages == {"waiting", "preprocess", "predict", "postprocess"}
    assert {tags["predictor"] for _, _, tags in recorded} == {"Small"}


@pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated")  # there is no other way to say it yet
def test_a_worker_that_dies_ends_the_job(model_ref: ModelRef) -> None:
    """With Ray Data's limits on restarts, a row that kills its process ends the job instead of running forever."""
    limits = {"max_restarts": 1, "max_task_retries": 1}
    ds = ray.data.range(20, override_num_blocks=2).rename_columns({"id": "x"})
    ds = ds.map_batches(Dies.using(model_ref), compute=ActorPoolStrategy(size=1), num_cpus=0.1, **limits)
    with pytest.raises(ray.exceptions.RayError, match="died"):
        ds.take_all()


# ---------------------------------------------------------------- errors


def test_an_error_in_a_method_is_the_users_own(model_ref: ModelRef) -> None:
    """What preprocess raises arrives as itself."""

    class Fails(AddOne):
        def preprocess(self, batch: pa.Table) -> Any:
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        Fails(model_ref)(BATCH)


def test_the_wrong_handle_fails_the_job(ray_session: None) -> None:
    """A handle of the wrong type given to map_batches ends the job with its message."""
    ds = numbers().map_batches(AddOne, fn_constructor_kwargs={"model_ref": "model"}, **POOL)
    with pytest.raises(Exception, match=r"a ModelRef is needed to load a model, not builtins.str"):
        ds.take_all()


def test_ray_datas_own_inference_class_can_load(model_ref: ModelRef) -> None:
    """A plain callable class of the user's own loads the model in its constructor."""

    class Own:
        def __init__(self, ref: ModelRef) -> None:
            self.model = load_model_in_actor(ref)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                return {"y": self.model(torch.from_numpy(batch["x"]).float()[:, None])[:, 0].numpy()}

    assert column(numbers().map_batches(Own, fn_constructor_args=[model_ref], **POOL), "y") == EXPECTED
