"""`sort_by`, the sizes of micro-batches and the error column, without Ray: plain objects with the three methods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from batch_runner import batch_runner
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

from ray_zerocopy._batch.lengths import SortedBatch, row_lengths, take_rows
from ray_zerocopy._batch.options import Options, check_combinations, check_options
from ray_zerocopy._batch.sizes import PartSizes, SizeTrial
from ray_zerocopy._batch.tables import to_rows


class Texts(Options):
    """Adds to each text a vector that depends on its bytes alone, from a model over padded rows.

    Notes the shape of each call. Text with "!" fails in `preprocess`, "?" in `predict`, "#" in `postprocess`.
    """

    def __init__(self, form: str = "table", room: float = float("inf"), **options: Any) -> None:
        for option, value in options.items():
            setattr(self, option, value)
        self.form, self.room = form, room
        self.shapes: list[tuple[int, int]] = []
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(256, 8, generator=generator)

    def preprocess(self, batch: pa.Table) -> Any:
        texts = batch["text"].to_pylist()
        if any("!" in (text or "") for text in texts):
            raise ValueError("an exclamation mark")
        rows = [list((text or "").encode()) for text in texts]
        width = max(map(len, rows), default=0)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long).reshape(
            len(rows), width
        )
        return ids, torch.tensor([len(row) for row in rows])

    def predict(self, inputs: Any) -> torch.Tensor:
        ids, lengths = inputs
        if ids.numel() > self.room:
            raise torch.cuda.OutOfMemoryError(f"no room for {ids.numel()} tokens")
        if (ids == ord("?")).any():
            raise KeyError("a question mark")
        self.shapes.append(tuple(ids.shape))
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).unsqueeze(-1)
        return (self.table[ids] * mask).sum(1) / lengths.clamp(min=1).unsqueeze(-1)

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
        if any("#" in (text or "") for text in batch["text"].to_pylist()):
            raise IndexError("a hash")
        if self.form == "table":
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(outputs.numpy().ravel(), pa.float32()), 8)
            return batch.append_column("y", vectors)
        columns = {"text": batch["text"], "y": list(outputs.numpy())}
        if self.form == "dict":
            return {**columns, "y": pa.array(outputs.tolist(), pa.list_(pa.float32()))}
        return pd.DataFrame({"text": batch["text"].to_pylist(), "y": columns["y"]})


def texts(*values: str | None) -> pa.Table:
    return pa.table({"text": pa.array(values, pa.string())})


def y_of(rows: Any) -> np.ndarray:
    return np.array([np.asarray(y, dtype=np.float64) for y in pa.table(rows)["y"].to_pylist()]).reshape(-1, 8)


def by_words(batch: pa.Table) -> list[int]:
    return [len((text or "").split("a")) for text in batch["text"].to_pylist()]


words = st.one_of(st.none(), st.text("abc é", max_size=40), st.sampled_from(["", "a" * 30]))
sizes = st.sampled_from(
    [{}, {"micro_batch_size": "auto"}, {"micro_batch_size": 1}, {"micro_batch_size": 7}, {"micro_batch_tokens": 50}]
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(words, max_size=60),
    size=sizes,
    form=st.sampled_from(["table", "dict", "pandas"]),
    sort_by=st.sampled_from(["text", by_words]),
    on_error=st.sampled_from(["raise", "null"]),
)
def test_results_equal_those_of_the_unsorted_run(
    rows: list[str | None], size: dict[str, Any], form: str, sort_by: Any, on_error: str
) -> None:
    """Results stand in the rows' own order and equal those of one unsorted batch, whatever the sizes and the form."""
    batch = texts(*rows)
    expected = y_of(batch_runner("Texts").run(Texts(), batch))
    methods = Texts(form, sort_by=sort_by, on_error=on_error, **size)
    run = batch_runner("Texts")
    for _ in range(2):  # the second batch meets what the first has taught
        result = run.run(methods, batch)
        assert pa.table(result)["text"].to_pylist() == rows
        assert np.allclose(y_of(result), expected, atol=1e-5)
    if isinstance(result, pd.DataFrame):
        assert list(result.index) == list(range(len(rows)))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.one_of(words, st.sampled_from(["!", "?", "#", "a!", "bb?", "ccc#"])), max_size=40),
    size=sizes,
    preserve_order=st.booleans(),
)
def test_failed_rows_are_found_in_every_stage(
    rows: list[str | None], size: dict[str, Any], preserve_order: bool
) -> None:
    """With a row that passes, each failed row has a null and the stage of its error, and the others their results."""
    batch = texts("a", *rows)
    methods = Texts(sort_by="text", on_error="null", error_column="why", preserve_order=preserve_order, **size)
    result = batch_runner("Texts").run(methods, batch)
    found = result.to_pylist()
    if not preserve_order:
        lengths = [len(row["text"] or "") for row in found]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(row["text"] or "" for row in found) == sorted(text or "" for text in ["a", *rows])
    else:
        assert [row["text"] for row in found] == ["a", *rows]
    for row in found:
        stage = next((s for mark, s in zip("!?#", MARKS, strict=True) if mark in (row["text"] or "")), None)
        assert (row["y"] is None) == (stage is not None)
        assert row["why"] == (None if stage is None else MARKS[stage])


MARKS = {
    "preprocess": "preprocess: ValueError: an exclamation mark",
    "predict": "predict: KeyError: 'a question mark'",
    "postprocess": "postprocess: IndexError: a hash",
}


@pytest.mark.parametrize("rows", [("!",), ("!", "a!", "bb!")])
def test_a_batch_in_which_all_rows_fail(rows: tuple[str, ...]) -> None:
    """All rows that fail in preprocess keep the job; a batch after a good one has all its columns."""
    run, methods = batch_runner("Texts"), Texts(sort_by="text", on_error="null")
    assert run.run(methods, texts(*rows))["error"].to_pylist() == [MARKS["preprocess"]] * len(rows)
    run.run(methods, texts("a"))
    failed = run.run(methods, texts(*rows))
    assert failed.column_names == ["text", "y", "error"]
    assert failed["y"].null_count == len(rows)


@pytest.mark.parametrize(("text", "error"), [("?", KeyError), ("#", IndexError)])
@pytest.mark.parametrize("options", [{}, {"sort_by": "text"}, {"micro_batch_size": 1}])
def test_a_model_that_never_works_ends_the_job(text: str, error: type[Exception], options: dict[str, Any]) -> None:
    """An error of `predict` or `postprocess` for all rows ends the job, until a row has passed."""
    methods, run = Texts(on_error="null", **options), batch_runner("Texts")
    with pytest.raises(error):
        run.run(methods, texts(text, "a" + text))
    run.run(methods, texts("a"))
    assert run.run(methods, texts(text))["error"].null_count == 0


def test_a_device_that_stopped_ends_the_job() -> None:
    """An error of the accelerator is about no row, so that it ends the job with on_error="null" too."""

    class Stops(Texts):
        def predict(self, inputs: Any) -> torch.Tensor:
            if len(self.shapes):
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().predict(inputs)

    run, methods = batch_runner("Texts"), Stops(on_error="null")
    run.run(methods, texts("a"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        run.run(methods, texts("a", "b"))


def test_no_error_column() -> None:
    """`error_column=None` writes nulls and no column, so that a column of that name can be in the batch."""
    batch = texts("a", "!").append_column("error", pa.array([1, 2]))
    result = batch_runner("Texts").run(Texts(on_error="null", error_column=None, sort_by="text"), batch)
    assert result.column_names == ["text", "error", "y"]
    assert result["y"].null_count == 1
    with pytest.raises(ValueError, match=r"column 'error' already.*error_column='error_of_row'"):
        batch_runner("Texts").run(Texts(on_error="null"), batch)


# ---------------------------------------------------------------- sizes


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("half a pair: \ud800"), r"preprocess: ValueError: half a pair: \\ud800"),
        (Unprintable(), r"preprocess: Unprintable \(its __str__ raised KeyError\)"),
    ],
    ids=["surrogate", "no text"],
)
@pytest.mark.parametrize("sort_by", [None, by_words])
def test_errors_that_are_no_text(error: Exception, said: str, sort_by: Any) -> None:
    """An error of a row whose text Arrow cannot hold, or that has none, does not end the job."""

    class Fails(Texts):
        def preprocess(self, batch: pa.Table) -> Any:
            if "bad" in batch["text"].to_pylist():
                raise error
            return super().preprocess(batch)

    predictor = Fails(on_error="null", sort_by=sort_by)
    rows = pa.table(batch_runner(type(predictor).__name__).run(predictor, texts("a", "bad", "c")))
    assert [row is None for row in rows["error"].to_pylist()] == [True, False, True]
    assert re.fullmatch(said, rows["error"][1].as_py())


def test_cells_that_are_matrices() -> None:
    """Rows of a DataFrame whose cells have two dimensions are put back in order, and may fail."""

    class Matrices(Texts):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            whole = [np.full((2, 2), len(text)) for text in batch["text"].to_pylist()]
            frame = pd.DataFrame({"text": batch["text"].to_pylist(), "m": whole})
            return (
                frame
                if len(batch) % 2
                else pa.table({"text": batch["text"], "m": ArrowTensorArray.from_numpy(whole)})
            )

    batch = texts("a", "bbbb", "!", "cc")
    for options in ({"on_error": "null"}, {"on_error": "null", "sort_by": "text", "micro_batch_tokens": 4}):
        predictor = Matrices(**options)
        rows = batch_runner(type(predictor).__name__).run(predictor, batch)
        assert [rows["text"][row].as_py() for row in (0, 1, 3)] == ["a", "bbbb", "cc"]
        cells = [np.asarray(cell) for chunk in rows["m"].chunks for cell in chunk.to_numpy()]
        assert [int(cell.flat[0]) for row, cell in enumerate(cells) if row != 2] == [1, 4, 2]


@pytest.mark.parametrize("options", [{"on_error": "null"}, {"sort_by": "text"}])
@pytest.mark.parametrize("form", ["table", "frame"])
def test_two_columns_of_one_name(options: dict[str, Any], form: str) -> None:
    """Two columns of one name are an error that names the column, where rows are moved."""

    class Twice(Texts):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            table = batch.append_column("text", batch["text"])
            return table if form == "table" else pd.concat([batch.to_pandas()] * 2, axis=1)

    predictor = Twice(**options)
    with pytest.raises(ValueError, match="returned two columns named 'text'"):
        batch_runner(type(predictor).__name__).run(predictor, texts("a", "b"))


def test_columns_of_pandas_with_nulls() -> None:
    """A Series of a type of pandas that has nulls is a column with nulls."""
    rows = to_rows({"x": pd.Series([1, None], dtype="Int64"), "s": pd.Series(["a", None], dtype="string")}, "Texts")
    assert rows.to_pydict() == {"x": [1, None], "s": ["a", None]}


def test_rows_of_similar_length_go_together() -> None:
    """A budget gives few long rows and many short ones, longest first, and pads little."""
    methods = Texts(sort_by="text", micro_batch_tokens=64)
    rows = ["x" * length for length in (1, 64, 2, 8, 8, 8, 8, 8, 8, 8, 8, 32, 32, 1, 1)]
    batch_runner("Texts").run(methods, texts(*rows))
    assert methods.shapes == [(1, 64), (2, 32), (8, 8), (4, 2)]


def test_a_row_longer_than_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    """A row over the budget goes alone, which the log says once."""
    run, methods = batch_runner("Texts"), Texts(sort_by="text", micro_batch_tokens=10)
    for _ in range(2):
        run.run(methods, texts("a" * 30, "b" * 20, "c" * 5, "d" * 5))
    assert methods.shapes[:3] == [(1, 30), (1, 20), (2, 5)]
    said = [record for record in caplog.records if "longer than micro_batch_tokens=10" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "length 30" in said[0].message


def test_few_shapes_for_a_compiled_model() -> None:
    """The numbers of rows are powers of two for a compiled model, and multiples of eight otherwise."""
    rows = texts(*["x" * 3] * 100)
    for few_shapes, size in ((True, 16), (False, 24)):
        methods = Texts(sort_by="text", micro_batch_tokens=90)
        batch_runner("Texts", few_shapes=few_shapes).run(methods, rows)
        assert {shape[0] for shape in methods.shapes[:-1]} == {size}


@pytest.mark.parametrize("sort_by", [None, "text"])
def test_auto_chooses_once(sort_by: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """With "auto" the runner tries sizes on the first batches, and logs its choice once."""
    caplog.set_level("INFO")
    run, methods = batch_runner("Texts"), Texts(sort_by=sort_by, micro_batch_size="auto")
    batch = texts(*["x" * (1 + n % 9) for n in range(400)])
    for _ in range(6):
        assert run.run(methods, batch)["text"].to_pylist() == batch["text"].to_pylist()
    option = "micro_batch_size" if sort_by is None else "micro_batch_tokens"
    said = [record.message for record in caplog.records if "'auto' chose" in record.message]
    assert len(said) == 1
    assert f"chose {option}=" in said[0]
    assert not run._sizes.is_trying(methods)


def test_auto_with_small_and_with_longer_batches() -> None:
    """Small batches start no trial, and rows that are much longer than those of the trial start another."""
    run, methods = batch_runner("Texts"), Texts(sort_by="text", micro_batch_size="auto")
    for _ in range(9):
        run.run(methods, texts("short"))
    assert run._sizes._trial is None
    run.run(methods, texts(*["x" * 20] * 40))
    assert max(rows for rows, _ in methods.shapes) == 32
    for letters, sizes in ((5, [40, 80]), (20, [160, 320]), (4, [160, 320])):
        run.run(methods, texts(*["x" * letters] * 80))
        assert run._sizes._trial is not None
        assert run._sizes._trial.sizes[:2] == sizes


def test_the_fastest_size_is_chosen() -> None:
    """The trial takes the size with the most tokens per second, and a smaller one if both are about as fast."""
    for fastest, expected in ((32, 32), (64, 64), (None, 8)):
        trial = SizeTrial(np.ones(64), cuda=False)
        assert trial.sizes == [8, 16, 32, 64]
        while trial.chosen is None:
            size = trial.size()
            trial.note(size, size / (2.0 if size == fastest else 1.0))
        assert trial.chosen == trial.size() == expected


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 400}, {"micro_batch_size": "auto"}])
def test_memory_errors_halve_the_budget(options: dict[str, Any]) -> None:
    """The longest rows come first, so a budget that is too large fails at once, and the size that fits is kept."""
    run, methods = batch_runner("Texts"), Texts(sort_by="text", room=100, **options)
    batch = texts(*["x" * (1 + n % 20) for n in range(100)])
    expected = y_of(batch_runner("Texts").run(Texts(), batch))
    assert np.allclose(y_of(run.run(methods, batch)), expected, atol=1e-5)
    assert max(rows * length for rows, length in methods.shapes) <= 100
    for _ in range(3):
        run.run(methods, batch)
    retries = run._totals.retries
    run.run(methods, batch)
    assert run._totals.retries == retries > 0


def test_part_sizes_cover_each_row_once() -> None:
    """Every row is in one part, whatever the options and the limit."""
    lengths = np.sort(np.random.default_rng(0).integers(0, 50, 200).astype(float))[::-1]
    for options in ({}, {"micro_batch_size": 9}, {"micro_batch_tokens": 77}):
        for limit in (float("inf"), 30.0):
            parts = list(PartSizes("Texts", cuda=False, few_shapes=False).parts(Texts(**options), lengths, 0, limit))
            assert [row for part in parts for row in part] == list(range(200))


# ---------------------------------------------------------------- lengths, and rows put back


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["añ", None, ""]), [2, 0, 0]),
        (pa.array(["añ", None, ""], pa.large_string()), [2, 0, 0]),
        (pa.array(["añ", None, ""], pa.string_view()), [2, 0, 0]),
        (pa.array(["abc", None, "d"]).dictionary_encode(), [3, 0, 1]),
        (pa.array([b"abc", None, b""]), [3, 0, 0]),
        (pa.array([b"abc", None], pa.binary_view()), [3, 0]),
        (pa.array([[1, 2], None, []]), [2, 0, 0]),
        (pa.array([[1, 2], [3]], pa.large_list(pa.int8())), [2, 1]),
        (pa.array([3, None, 1], pa.int8()), [3, 0, 1]),
        (pa.array([3.5, 0.0]), [3.5, 0]),
        (pa.nulls(2), [0, 0]),
        (ArrowTensorArray.from_numpy(np.zeros((2, 3, 4))), [12, 12]),
        (ArrowVariableShapedTensorArray.from_numpy([np.zeros((2, 3)), np.zeros((1, 1))]), [6, 1]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_lengths_of_columns(column: Any, expected: list[float]) -> None:
    """A column's length is its text, bytes, items or numbers, in one chunk and in several; nulls have length 0."""
    assert row_lengths(pa.table({"c": column}), "c", "Texts").tolist() == expected
    chunked = pa.chunked_array([column.slice(0, 1), column.slice(1)])
    assert row_lengths(pa.table({"c": chunked}), "c", "Texts").tolist() == expected


@pytest.mark.parametrize(
    "returned",
    [
        [3, 1],
        (3, 1),
        np.array([3, 1]),
        torch.tensor([3, 1]),
        pa.array([3, 1]),
        pd.Series([3, 1]),
        pd.Series([3, 1], dtype="Int64"),
        torch.tensor([3, 1], dtype=torch.bfloat16),
        torch.tensor([3.0, 1.0], requires_grad=True),
        range(3, -1, -2),
        pa.chunked_array([[3], [1]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lengths_of_functions(returned: Any) -> None:
    """A function may return any list or array of numbers."""
    assert row_lengths(texts("a", "b"), lambda batch: returned, "Texts").tolist() == [3, 1]
    assert row_lengths(texts("a", "b"), lambda batch: [None, 2], "Texts").tolist() == [0, 2]
    missing = [pd.Series([None, 2.0]), pd.Series([None, 2], dtype="Int64"), pd.Series([float("nan"), 2])]
    assert [row_lengths(texts("a", "b"), lambda batch, x=x: x, "Texts").tolist() for x in missing] == [[0, 2]] * 3
    assert row_lengths(texts("a"), lambda batch: [2**60 + 1], "Texts").tolist() == [2.0**60]


@pytest.mark.parametrize(
    ("sort_by", "error", "facts"),
    [
        ("no", ValueError, "no column 'no'.*'text'"),
        ("struct", TypeError, r"column 'struct' \(struct.*has no length.*function"),
        ("bool", TypeError, r"column 'bool' \(bool\) has no length"),
        ("negative", ValueError, r"column 'negative' gives row 1 the length -2 \(1 of 2 rows\)"),
        ("nan", ValueError, r"column 'nan' gives row 0 the length nan"),
        (lambda batch: [1], ValueError, "returned 1 lengths for 2 rows"),
        (lambda batch: [1, float("inf")], ValueError, "row 1 the length inf"),
        (lambda batch: ["a", "b"], ValueError, "list with values of type string.*one number for each row"),
        (lambda batch: [True, False], ValueError, "values of type bool"),
        (lambda batch: None, ValueError, "returned None"),
        (lambda batch: 3, ValueError, "returned a builtins.int"),
        (lambda batch: [[1], 2], ValueError, "returned a builtins.list"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "null"])
def test_wrong_lengths(sort_by: Any, error: type[Exception], facts: str, on_error: str) -> None:
    """A column that is not there or has no length, and lengths that are none, end the job with name and remedy."""
    batch = pa.table(
        {
            "text": ["a", "b"],
            "struct": [{"a": 1}] * 2,
            "bool": [True, False],
            "negative": [1, -2],
            "nan": [float("nan"), 1.0],
        }
    )
    with pytest.raises(error, match=f"(?s)Texts.sort_by.*{facts}"):
        batch_runner("Texts").run(Texts(sort_by=sort_by, on_error=on_error), batch)


def test_a_function_that_fails_for_a_row(caplog: pytest.LogCaptureFixture) -> None:
    """With on_error="null" such a row has length 0 and goes on; otherwise the error ends the job."""
    caplog.set_level("INFO")

    def lengths(batch: pa.Table) -> list[int]:
        return [len(text) for text in batch["text"].to_pylist()]

    batch = texts("a", None, "ccc")
    with pytest.raises(TypeError, match="NoneType"):
        batch_runner("Texts").run(Texts(sort_by=lengths), batch)
    run = batch_runner("Texts")
    for _ in range(2):
        result = run.run(Texts(sort_by=lengths, on_error="null"), batch)
        assert result["text"].to_pylist() == ["a", None, "ccc"]
        assert result["error"].null_count == 3
    assert sum("sort_by failed" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"sort_by": 3}, TypeError, "sort_by is 3.*name of a column"),
        ({"sort_by": ["a", "b"]}, TypeError, "sort_by is"),
        ({"sort_by": lambda: [1]}, TypeError, r"does not take one argument.*def sort_by\(self, batch\)"),
        ({"micro_batch_size": "many"}, TypeError, "micro_batch_size is 'many'.*'auto'"),
        ({"micro_batch_tokens": 0, "sort_by": "text"}, TypeError, "micro_batch_tokens is 0"),
        ({"micro_batch_tokens": 1.5, "sort_by": "text"}, TypeError, "micro_batch_tokens is 1.5"),
        ({"micro_batch_tokens": 9}, ValueError, "needs the lengths.*sort_by="),
        ({"micro_batch_tokens": 9, "micro_batch_size": "auto", "sort_by": "t"}, ValueError, "one of the two"),
        ({"preserve_order": None}, TypeError, "preserve_order is None"),
        ({"error_column": 3}, TypeError, "error_column is 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], facts: str) -> None:
    """An option of the wrong kind, or two that contradict, are an error with the option and the remedy."""
    methods = Texts(**options)

    def check() -> None:
        check_options(methods, "Texts")
        check_combinations(methods, "Texts")

    with pytest.raises(error, match=f"(?s){facts}"):
        check()


def test_other_numbers_of_rows() -> None:
    """Results that cannot be put back are refused with the reason, and pass with preserve_order=False."""

    class Words(Texts):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return {"word": [word for text in batch["text"].to_pylist() for word in text.split()]}

    class Yields(Texts):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Iterator[Any]:
            yield {"word": [text.split()[0] for text in batch["text"].to_pylist()]}

    batch = texts("a", "bb bb", "ccc ccc ccc")
    with pytest.raises(ValueError, match=r"returned 6 rows for 3.*preserve_order=False"):
        batch_runner("Texts").run(Words(sort_by="text"), batch)
    with pytest.raises(TypeError, match=r"generator.*preserve_order=False"):
        batch_runner("Texts").run(Yields(sort_by="text"), batch)
    free = {"sort_by": "text", "preserve_order": False, "micro_batch_size": 1}
    assert batch_runner("Texts").run(Words(**free), batch)["word"].to_pylist() == [
        "ccc",
        "ccc",
        "ccc",
        "bb",
        "bb",
        "a",
    ]
    parts = batch_runner("Texts").run(Yields(**free), batch)
    assert [word for part in parts for word in part["word"].to_pylist()] == ["ccc", "bb", "a"]


def test_an_error_names_the_rows_of_the_batch() -> None:
    """The note of an error in a sorted batch has the rows' own numbers."""
    methods = Texts(sort_by="text", micro_batch_size=2)
    with pytest.raises(ValueError, match="exclamation") as error:
        batch_runner("Texts").run(methods, texts("a", "bb!", "ccc", "dddd", "e"))
    notes = [*getattr(error.value, "__notes__", ()), str(error.value.__cause__)]
    assert "in rows 1, 3 of the batch" in notes


def test_a_token_each() -> None:
    """Tensor columns of different widths in the parts come back in order as rows of different shapes."""

    class PerToken(Texts):
        def preprocess(self, batch: pa.Table) -> Any:
            return super().preprocess(batch)[0]

        def predict(self, inputs: Any) -> torch.Tensor:
            return self.table[inputs]

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return {"y": outputs}

    rows = ["a", "bbb", "cc", "dddd"]
    methods = PerToken(sort_by="text", micro_batch_size=2)
    table = batch_runner("Texts").run(methods, texts(*rows))
    shapes = [np.asarray(y).shape for chunk in table["y"].chunks for y in chunk.to_numpy()]
    assert shapes == [(2, 8), (4, 8), (2, 8), (4, 8)]


def test_columns_that_pass_through_are_the_batch_itself() -> None:
    """A column that postprocess passes on is the batch's own memory again; only new columns were moved."""
    batch = texts("a", "bb", "ccc")
    for options in ({}, {"micro_batch_size": 1}, {"on_error": "null"}):
        result = batch_runner("Texts").run(Texts(sort_by="text", **options), batch)
        assert result["text"].chunk(0).buffers()[2].address == batch["text"].chunk(0).buffers()[2].address


def test_rows_of_types_without_take() -> None:
    """Arrow cannot reorder string views; such a column comes back in order all the same."""
    table = pa.table({"v": pa.array(["a", "bb", None, "ccc"], pa.string_view())})
    assert take_rows(table, np.array([3, 2, 0])).to_pydict() == {"v": ["ccc", None, "a"]}
    batch = SortedBatch(table, row_lengths(table, "v", "Texts"))
    assert batch.table["v"].to_pylist() == ["ccc", "bb", "a", None]
    assert (
        batch.put_back([(range(4), batch.table.rename_columns(["w"]))], "Texts")["w"].to_pylist()
        == table["v"].to_pylist()
    )
