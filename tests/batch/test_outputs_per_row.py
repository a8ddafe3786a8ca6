"""Outputs that are a list with one mapping for each row, as those of detectors, become columns."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.data import ActorPoolStrategy
from torch import nn

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors

POOL: dict[str, Any] = {"compute": ActorPoolStrategy(size=1), "num_cpus": 0.1, "batch_format": "pyarrow"}
Found = namedtuple("Found", ["boxes", "scores", "label"])


class Detector(nn.Module):
    """Finds as many boxes as a row's number says, in the form that it was made with."""

    def __init__(self, form: str = "mappings") -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, counts: torch.Tensor) -> Any:
        rows = [
            {
                "boxes": torch.full((int(n), 4), float(n)) * self.scale,
                "scores": torch.arange(int(n)) * self.scale,
                "label": f"{int(n)} boxes",
                "count": int(n),
                "best": torch.tensor(float(n)),
                "mask": np.ones((int(n), 2, 2), dtype=np.uint8),
            }
            for n in counts
        ]
        match self.form:
            case "objects":
                return [SimpleNamespace(**row) for row in rows]
            case "tuple":
                return tuple(rows)
            case "namedtuples":
                return [Found(row["boxes"], row["scores"], row["label"]) for row in rows]
        return rows


COLUMNS = {"boxes": "boxes", "scores": "scores", "label": "label"}
BATCH = pa.table({"n": pa.array([2.0, 0.0, 3.0, 1.0], pa.float32())})


@pytest.fixture(scope="module")
def detector(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(Detector())


def check_rows(rows: list[dict[str, Any]], counts: list[int]) -> None:
    assert [row["label"] for row in rows] == [f"{n} boxes" for n in counts]
    for row, n in zip(rows, counts, strict=True):
        assert np.asarray(row["boxes"]).shape == (n, 4)
        assert (np.asarray(row["boxes"]) == n).all()
        assert list(row["scores"]) == list(range(n))


def run_predictor(ref: ModelRef, options: dict[str, Any], batch: pa.Table) -> Any:
    """Return the rows of a predictor, as Ray Data's worker would make and call it."""
    return ZeroCopyPredictor.using(ref, input_columns="n", output_column=COLUMNS, **options)()(batch)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"sort_by": "n"}], ids=str)
def test_detections_in_actors(options: dict[str, Any], detector: ModelRef, two_actors: list[Any]) -> None:
    """Ragged columns of a detector come out of a worker, whole and in micro-batches, row by row."""
    if "micro_batch_size" in options:  # one goes through Ray Data
        bound = ZeroCopyPredictor.using(detector, input_columns="n", output_column=COLUMNS, **options)
        rows = ray.data.from_arrow(BATCH).map_batches(bound, **POOL).take_all()
    else:
        rows = ray.get(two_actors[0].run.remote(run_predictor, detector, options, BATCH)).to_pylist()
    check_rows(rows, [2, 0, 3, 1])
    assert [row["n"] for row in rows] == [2, 0, 3, 1]


@pytest.mark.parametrize("form", ["objects", "tuple", "namedtuples"])
def test_other_forms_of_rows(form: str, two_actors: list[Any]) -> None:
    """Rows may be objects with attributes, named tuples, and in a tuple."""
    call = two_actors[0].run.remote(
        run_predictor, prepare_model_for_actors(Detector(form)), {"keep_columns": False}, BATCH
    )
    check_rows(ray.get(call).to_pylist(), [2, 0, 3, 1])


def test_values_of_rows(detector: ModelRef) -> None:
    """Numbers, texts, tensors of one number and numpy arrays are values of a row."""
    names = {"count": "count", "best": "best", "mask": "mask", "label": "label"}
    table = ZeroCopyPredictor(detector, input_columns="n", output_column=names, keep_columns=False)(BATCH)
    assert table.schema.field("count").type == pa.int64()
    assert table.schema.field("label").type == pa.string()
    assert table["best"].to_pylist() == [2.0, 0.0, 3.0, 1.0]
    assert [np.asarray(mask).shape for mask in table["mask"].to_pylist()] == [
        (2, 2, 2),
        (0, 2, 2),
        (3, 2, 2),
        (1, 2, 2),
    ]


def test_a_column_of_texts(ray_session: None) -> None:
    """A list of texts is a column too."""

    class Says(ZeroCopyPredictor):
        def predict(self, inputs: torch.Tensor) -> Any:
            return [f"{int(n)}" for n in inputs]

    ref = prepare_model_for_actors(nn.Identity())
    assert Says(ref, input_columns="n", output_column="y")(BATCH)["y"].to_pylist() == ["2", "0", "3", "1"]


def test_failed_rows_beside_detections(detector: ModelRef) -> None:
    """With on_error="null" a failed row has no boxes, and the others have theirs."""

    class Refuses(ZeroCopyPredictor):
        input_columns = "n"
        output_column = COLUMNS

        def preprocess(self, batch: pa.Table) -> Any:
            if 0.0 in batch["n"].to_pylist():
                raise ValueError("no boxes")
            return super().preprocess(batch)

    rows = Refuses(detector, on_error="null")(BATCH).to_pylist()
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    assert [row["label"] for row in rows] == ["2 boxes", None, "3 boxes", "1 boxes"]
    assert [len(row["boxes"]) for row in rows if row["error"] is None] == [2, 3, 1]


def test_batches_without_rows(detector: ModelRef) -> None:
    """A batch without rows has the columns."""
    made = ZeroCopyPredictor(detector, input_columns="n", output_column=COLUMNS)
    assert made(BATCH.slice(0, 0)).column_names == ["n", "boxes", "scores", "label"]


@pytest.mark.parametrize(
    ("outputs", "option", "words"),
    [
        (lambda n: [{"a": one} for one in n], "y", r"output_column=\{'a': \.\.\.\}"),
        (lambda n: [{"a": one} for one in n], {"b": "y"}, r"no output 'b'.*output_column=\{'a': \.\.\.\}"),
        (lambda n: [{"a": n[0], "b": n[0]}] + [{"a": one} for one in n[1:]], {"b": "y"}, r"row 1 has no output 'b'"),
        (lambda n: [{"a": {"x": 1}} for _ in n], {"a": "y"}, r"'a'.*cannot become column 'y'"),
        (lambda n: [{"a": one} for one in n[1:]], {"a": "y"}, r"3 rows for a batch of 4"),
    ],
)
def test_outputs_that_are_no_columns(outputs: Any, option: Any, words: str, detector: ModelRef) -> None:
    """An error names the output, the row that lacks it, and which outputs there are."""

    class Returns(ZeroCopyPredictor):
        input_columns = "n"

        def predict(self, inputs: torch.Tensor) -> Any:
            return outputs(inputs)

    with pytest.raises((TypeError, ValueError), match=words):
        Returns(detector, output_column=option)(BATCH)
