"""Arrow columns and tensors: which share their bytes, by address, and what is said of those that cannot."""

from __future__ import annotations

import datetime
import decimal
import doctest
import gc
import io
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import DataContext
from ray.data.block import BlockAccessor
from ray.data.extensions import ArrowTensorArray, ArrowTensorTypeV2, FixedShapeTensorFormat

import ray_zerocopy.arrow
from ray_zerocopy._batch.tables import to_arrow
from ray_zerocopy.arrow import column_chunks, column_to_padded, column_to_tensor, tensor_to_column

NUMBERS = {
    pa.int8(): torch.int8,
    pa.int16(): torch.int16,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
    pa.uint8(): torch.uint8,
    pa.uint16(): torch.uint16,
    pa.uint32(): torch.uint32,
    pa.uint64(): torch.uint64,
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
}
FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]
FORMATS = [FixedShapeTensorFormat.V1, FixedShapeTensorFormat.V2, FixedShapeTensorFormat.ARROW_NATIVE]


@pytest.fixture
def ray_format() -> Iterator[DataContext]:
    """Give Ray Data's context and put its tensor format back."""
    context = DataContext.get_current()
    before = context.arrow_fixed_shape_tensor_format
    yield context
    context.arrow_fixed_shape_tensor_format = before


def ray_column(values: Any) -> pa.ChunkedArray:
    """Return the column that Ray Data makes of a batch's values."""
    return BlockAccessor.batch_to_arrow_block({"x": values}).column("x")


def table(column: Any) -> pa.Table:
    """Return a batch of one column, `x`, and another."""
    return pa.table({"other": pa.array(range(len(column))), "x": column})


def ragged(*shapes: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return rows of the shapes, counting up from 0 through all of them, as numpy holds them."""
    rows = np.empty(len(shapes), dtype=object)
    begin = 0
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        rows[number] = np.arange(begin, begin + size, dtype=np.float32).reshape(shape)
        begin += size
    return rows


def buffers(column: Any) -> list[pa.Buffer]:
    """Return all buffers of a column."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return [b for c in chunks for b in getattr(c, "storage", c).buffers() if b is not None]


@pytest.fixture(autouse=True)
def views_of_local_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tables of these tests count as memory of the store, which is not copied. See test_datasets_stay.py."""
    monkeypatch.setattr(ray_zerocopy.arrow.views, "own_memory", ray_zerocopy.arrow.views.shared_view)


def shares(tensor: torch.Tensor, column: Any) -> bool:
    """Tell whether the tensor's bytes lie within one of the column's buffers."""
    storage = tensor.untyped_storage()
    begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return any(b.address <= begin and end <= b.address + b.size for b in buffers(column))


# ---------------------------------------------------------------- shared bytes

COUNT = np.arange(48, dtype=np.float32)
COLUMNS: dict[str, tuple[Callable[[], Any], np.ndarray[Any, Any]]] = {
    "numbers": (lambda: pa.array(COUNT), COUNT),
    "ray": (lambda: ray_column(COUNT.reshape(8, 2, 3)), COUNT.reshape(8, 2, 3)),
    "ray variable, all equal": (lambda: ray_column(ragged(*[(2, 3)] * 8)), COUNT.reshape(8, 2, 3)),
    "arrow fixed_shape_tensor": (
        lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(COUNT.reshape(8, 2, 3)),
        COUNT.reshape(8, 2, 3),
    ),
    "fixed_size_list": (lambda: pa.FixedSizeListArray.from_arrays(pa.array(COUNT), 6), COUNT.reshape(8, 6)),
    "fixed_size_list twice": (
        lambda: pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(COUNT), 3), 2),
        COUNT.reshape(8, 2, 3),
    ),
    "list": (lambda: pa.array(COUNT.reshape(8, 6).tolist(), pa.list_(pa.float32())), COUNT.reshape(8, 6)),
    "large_list": (
        lambda: pa.array(COUNT.reshape(8, 6).tolist(), pa.large_list(pa.float32())),
        COUNT.reshape(8, 6),
    ),
    "list that begins late": (
        lambda: pa.ListArray.from_arrays(pa.array(range(6, 49, 6), pa.int32()), pa.array(COUNT)),
        COUNT[6:].reshape(7, 6),
    ),
    "list of fixed_size_list": (
        lambda: pa.array(COUNT.reshape(8, 2, 3).tolist(), pa.list_(pa.list_(pa.float32(), 3))),
        COUNT.reshape(8, 2, 3),
    ),
    "values that begin late": (
        lambda: pa.FixedSizeListArray.from_arrays(pa.array(COUNT).slice(6), 6),
        COUNT[6:].reshape(7, 6),
    ),
}


@pytest.fixture(params=COLUMNS)
def column(request: pytest.FixtureRequest) -> tuple[Any, np.ndarray[Any, Any]]:
    """Give each column that can be shared, and what it holds."""
    make, values = COLUMNS[request.param]
    return make(), values


def test_a_column_is_shared_and_equal(column: tuple[Any, np.ndarray[Any, Any]]) -> None:
    """A column of one chunk becomes a tensor over the column's own bytes."""
    array, values = column
    tensor = column_to_tensor(table(array), "x")
    assert shares(tensor, array)
    assert np.array_equal(tensor.numpy(), values)
    assert not shares(tensor.clone(), array)


@pytest.mark.parametrize(("offset", "length"), [(0, 3), (1, 4), (5, None), (2, 0), (100, None)])
def test_a_slice_is_shared_and_equal(
    column: tuple[Any, np.ndarray[Any, Any]], offset: int, length: int | None
) -> None:
    """A slice becomes exactly its rows, over the same bytes, and a slice of a slice too."""
    array, values = column
    batch = table(array).slice(offset, length)
    expected = values[offset:][:length]
    tensor = column_to_tensor(batch, "x")
    assert np.array_equal(tensor.numpy().reshape(expected.shape), expected)
    assert not len(tensor) or shares(tensor, array)
    again = column_to_tensor(batch.slice(1), "x")
    assert np.array_equal(again.numpy().reshape(expected[1:].shape), expected[1:])


def test_several_chunks_are_copied_once_or_not_at_all(column: tuple[Any, np.ndarray[Any, Any]]) -> None:
    """Chunks become one tensor of its own memory, or one tensor each over theirs."""
    array, values = column
    whole = table(array)
    batch = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 0), whole.slice(2)])
    tensor = column_to_tensor(batch, "x")
    assert np.array_equal(tensor.numpy(), values)
    assert not shares(tensor, array)
    chunks = list(column_chunks(batch, "x"))
    assert [len(chunk) for chunk in chunks] == [2, 0, len(values) - 2]
    assert np.array_equal(torch.cat([chunk for chunk in chunks if len(chunk)]).numpy(), values)
    assert all(shares(chunk, array) for chunk in chunks if len(chunk))


def test_chunks_without_rows_cost_nothing(column: tuple[Any, np.ndarray[Any, Any]]) -> None:
    """One chunk with rows among empty ones is still shared."""
    array, values = column
    whole = table(array)
    batch = pa.concat_tables([whole.slice(0, 0), whole, whole.slice(0, 0)])
    tensor = column_to_tensor(batch, "x")
    assert shares(tensor, array)
    assert np.array_equal(tensor.numpy(), values)


def test_no_chunks_at_all_is_no_rows(column: tuple[Any, np.ndarray[Any, Any]]) -> None:
    """A table without chunks gives a tensor without rows, of the column's dtype."""
    array, _ = column
    batch = pa.table({"x": pa.chunked_array([], type=array.type)})
    assert column_to_tensor(batch, "x").shape[0] == 0
    assert column_to_tensor(batch, "x").dtype == torch.float32


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_every_number_type_is_shared(kind: pa.DataType) -> None:
    """Each integer and floating type of Arrow becomes torch's own, in numbers and in lists, chunks too."""
    values = np.array([0, 1, 2, 3, 100, 127]).astype(kind.to_pandas_dtype())
    for array in (pa.array(values), pa.FixedSizeListArray.from_arrays(pa.array(values), 2)):
        tensor = column_to_tensor(table(array), "x")
        assert tensor.dtype == NUMBERS[kind]
        assert shares(tensor, array)
        assert np.array_equal(tensor.numpy().ravel(), values)
        twice = column_to_tensor(table(pa.chunked_array([array, array])), "x")
        assert np.array_equal(twice.numpy().ravel(), np.tile(values, 2))


@pytest.mark.parametrize("tensor_format", FORMATS)
def test_each_of_rays_formats_is_shared(ray_format: DataContext, tensor_format: FixedShapeTensorFormat) -> None:
    """Ray's three formats for tensor columns read alike."""
    ray_format.arrow_fixed_shape_tensor_format = tensor_format
    array = ray_column(COUNT.reshape(4, 3, 4))
    tensor = column_to_tensor(table(array), "x")
    assert shares(tensor, array)
    assert np.array_equal(tensor.numpy(), COUNT.reshape(4, 3, 4))


def test_rays_column_through_parquet_keeps_its_shape() -> None:
    """Ray's tensor column read back from Parquet is a tensor column again."""
    file = io.BytesIO()
    pq.write_table(table(ray_column(COUNT.reshape(4, 3, 4))), file)
    tensor = column_to_tensor(pq.read_table(file), "x")
    assert np.array_equal(tensor.numpy(), COUNT.reshape(4, 3, 4))


def test_rays_column_without_ray_is_refused(tmp_path: Any) -> None:
    """Ray's tensor column read before Ray registered its types has lost its shape, which is said."""
    pq.write_table(table(ray_column(COUNT.reshape(4, 3, 4))), tmp_path / "x.parquet")
    code = (
        "import sys, types, pyarrow.parquet as pq\n"
        "package = sys.modules['ray_zerocopy'] = types.ModuleType('ray_zerocopy')\n"
        f"package.__path__ = {list(ray_zerocopy.__path__)!r}\n"
        "from ray_zerocopy import arrow\n"
        "assert 'ray' not in sys.modules\n"
        f"arrow.column_to_tensor(pq.read_table({str(tmp_path / 'x.parquet')!r}), 'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: column 'x' (large_list<element: float>) is a tensor column of Ray" in done.stderr
    assert "Import ray.data before you read the batch." in done.stderr


@pytest.mark.parametrize("permutation", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_permuted_dimensions_are_a_view(permutation: tuple[int, ...]) -> None:
    """A permuted fixed_shape_tensor has Arrow's logical shape, as strides over the same bytes."""
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3, 4], permutation=list(permutation))
    array = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(pa.array(COUNT), 24))
    tensor = column_to_tensor(table(array), "x")
    assert shares(tensor, array)
    assert tuple(tensor.shape) == array.to_tensor().shape
    assert np.array_equal(tensor.numpy(), COUNT.reshape(2, 2, 3, 4).transpose(0, *(p + 1 for p in permutation)))


@pytest.mark.parametrize("shape", [(3, 0), (3, 0, 2), (0, 2), (0, 2, 3)])
def test_empty_shapes_survive(shape: tuple[int, ...]) -> None:
    """Shapes with a zero in them come back from the column as they were."""
    column = tensor_to_column(torch.empty(shape))
    assert tuple(column_to_tensor(table(column), "x").shape) == shape


def test_a_record_batch_is_a_batch_too() -> None:
    """A record batch is read as a table is."""
    batch = table(pa.array(COUNT)).to_batches()[0]
    assert shares(column_to_tensor(batch, "x"), batch.column("x"))


def test_the_tensor_keeps_the_bytes_alive() -> None:
    """The bytes live exactly as long as the tensor, after the batch is gone."""
    gc.collect()
    before = pa.total_allocated_bytes()
    batch = pa.table({"x": pa.array(list(range(100_000)), pa.int64())})
    tensor = column_to_tensor(batch, "x")[10:]
    del batch
    gc.collect()
    assert pa.total_allocated_bytes() - before >= 800_000
    assert tensor.sum().item() == sum(range(10, 100_000))
    del tensor
    gc.collect()
    assert pa.total_allocated_bytes() - before < 800_000


def test_read_only_memory_is_shared_without_a_warning() -> None:
    """Memory that Arrow calls read-only, as the store's is, is shared; warnings are errors here."""
    buffer = pa.py_buffer(bytes(16))
    assert not buffer.is_mutable
    array = pa.Array.from_buffers(pa.float32(), 4, [None, buffer])
    assert column_to_tensor(table(array), "x").data_ptr() == buffer.address


def test_a_write_reaches_the_batch_unless_cloned() -> None:
    """A write to the tensor is one to the batch, as the module says; a clone's is its own."""
    batch = pa.table({"x": pa.array([1, 2, 3])})
    column_to_tensor(batch, "x").clone().add_(1)
    assert batch["x"].to_pylist() == [1, 2, 3]
    column_to_tensor(batch, "x").add_(1)
    assert batch["x"].to_pylist() == [2, 3, 4]


# ---------------------------------------------------------------- what cannot be shared


class Celsius(pa.ExtensionType):
    """A type of the user's own, which pyarrow gives no hash."""

    def __init__(self) -> None:
        super().__init__(pa.float64(), "celsius")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Celsius:
        return cls()


BAD_TYPES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "bool": (lambda: pa.array([True]), "(bool) has type bool", r"batch['x'].cast(pa.uint8())"),
    "ray bool": (lambda: ray_column(np.ones((2, 3), bool)), "holds type bool", "values of type uint8"),
    "list of bool": (lambda: pa.array([[True]]), "(list<item: bool>) holds type bool", "values of type uint8"),
    "decimal": (lambda: pa.array([decimal.Decimal("1.5")]), "decimal128(2, 1)", r"cast(pa.float64())"),
    "string": (lambda: pa.array(["a"]), "(string) has type string", "tokenizer"),
    "string view": (lambda: pa.array(["a"], pa.string_view()), "string_view", "tokenizer"),
    "binary": (lambda: pa.array([b"a"]), "binary", "to_pylist()"),
    "list of string": (lambda: pa.array([["a"]]), "holds type string", "tokenizer"),
    "timestamp": (lambda: pa.array([datetime.datetime(2020, 1, 1)]), "timestamp[us]", r"cast(pa.int64())"),
    "date": (lambda: pa.array([datetime.date(2020, 1, 1)]), "date32", r"cast(pa.int32())"),
    "dictionary": (lambda: pa.array(["a", "b"]).dictionary_encode(), "dictionary<", "Decode it"),
    "struct": (lambda: pa.array([{"a": 1}]), "struct<a: int64>", "struct_field(batch['x'], ...)"),
    "list view": (lambda: pa.array([[1]], pa.list_view(pa.int64())), "list_view", "pa.list_("),
    "null": (lambda: pa.nulls(2), "null", "Give the column a type"),
    "ray objects": (lambda: ray_column(ragged((1, 2), (3,))), "arrow_pickled_object", "one number of dimensions"),
    "ray objects, null": (
        lambda: to_arrow({"x": np.array([np.ones(2), None], dtype=object)}, "A")["x"],
        "arrow_pickled_object",
        "batch_format='pyarrow'",
    ),
    "map": (lambda: pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "map<", "to_pylist()"),
    "extension": (
        lambda: pa.array([1, 0], pa.int8()).cast(pa.bool8()),
        "arrow.bool8",
        "cast(batch['x'].type.storage_type)",
    ),
    "a user's extension": (
        lambda: pa.ExtensionArray.from_storage(Celsius(), pa.array([1.5])),
        "extension<celsius",
        "cast(batch['x'].type.storage_type)",
    ),
    **{
        # What helps a column of these does not help a column of lists of them.
        f"list of {kind}": (
            lambda kind=kind: pa.array([[]], pa.list_(kind)),
            f"holds type {kind}",
            "from batch['x'].to",
        )
        for kind in (pa.struct({"a": pa.int64()}), pa.dictionary(pa.int8(), pa.int64()), pa.list_view(pa.int64()))
    },
}


@pytest.mark.parametrize("case", BAD_TYPES)
@pytest.mark.parametrize("read", [column_to_tensor, column_chunks])
def test_a_type_without_tensor_form_says_the_remedy(case: str, read: Callable[..., Any]) -> None:
    """A type that torch does not have is named, with its column and what to do; rows or no rows."""
    make, fact, remedy = BAD_TYPES[case]
    for batch in (table(make()), table(make()).slice(0, 0)):
        with pytest.raises(TypeError) as caught:
            read(batch, "x")
        assert "column 'x'" in str(caught.value)
        assert fact in str(caught.value)
        assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("array", "to"),
    [
        (pa.array([True, False]), pa.uint8()),
        (pa.array([decimal.Decimal("1.5")]), pa.float64()),
        (pa.array([datetime.datetime(2020, 1, 1)]), pa.int64()),
        (pa.array([datetime.date(2020, 1, 1)]), pa.int32()),
        (pa.array([1, 0], pa.int8()).cast(pa.bool8()), pa.int8()),
        (pa.array([1.5, 2.5]).dictionary_encode(), pa.float64()),
    ],
)
def test_the_casts_that_errors_name_work(array: Any, to: pa.DataType) -> None:
    """What the errors advise leads to a tensor."""
    batch = table(array)
    cast = batch.set_column(1, "x", batch["x"].cast(to))
    assert len(column_to_tensor(cast, "x")) == len(array)


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[1, 2], [3, 4]], pa.list_view(pa.int64())),
        pa.array([[1, 2], [3, 4]], pa.large_list_view(pa.int64())),
        pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
        pa.array([b"ab", b"cd"]),
        pa.array([b"ab", b"cd"], pa.binary(2)),
    ],
    ids=str,
)
def test_the_remedies_work_as_typed(array: Any) -> None:
    """The expression in the error, evaluated as it stands there, leads to a tensor with the values."""
    batch = table(array)
    with pytest.raises(TypeError) as caught:
        column_to_tensor(batch, "x")
    words = str(caught.value)
    found = eval(words[words.index("pa.array" if "pa.array" in words else "torch.stack") : -1])
    values = found if isinstance(found, torch.Tensor) else column_to_tensor(pa.table({"x": found}), "x")
    expected = [list(row) if isinstance(row, bytes) else row for row in array.to_pylist()]
    assert values.tolist() == [[v[1] if isinstance(v, tuple) else v for v in row] for row in expected]


NULLS: dict[str, Callable[[], Any]] = {
    "numbers": lambda: pa.array([1, None, 3]),
    "list": lambda: pa.array([[1.0], None, [3.0]]),
    "fixed_size_list": lambda: pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float64(), 2)),
    "ray": lambda: ArrowTensorTypeV2((2,), pa.float32()).wrap_array(
        pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.large_list(pa.float32()))
    ),
}


@pytest.mark.parametrize("case", NULLS)
def test_null_rows_are_counted_and_dropping_them_works(case: str) -> None:
    """Null rows are an error with their number; the filter that it names leads to a tensor."""
    batch = table(NULLS[case]())
    with pytest.raises(
        ValueError, match=r"column 'x' .* has 1 nulls in 3 rows.* batch.filter\(pc.is_valid"
    ) as caught:
        column_to_tensor(batch, "x")
    assert ("fill_null" in str(caught.value)) == (case == "numbers")
    assert len(column_to_tensor(batch.filter(pc.is_valid(batch["x"])), "x")) == 2
    assert len(column_to_tensor(batch.slice(0, 1), "x")) == 1  # the null is outside of the slice


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[1, None], [3, 4]]),
        pa.array([[1, None], [3, 4]], pa.list_(pa.int64(), 2)),
        pa.array([[[1], None], [[3], [4]]]),
    ],
)
def test_nulls_within_rows_are_refused(array: Any) -> None:
    """Nulls among a row's values are an error as well, unless they are outside of the slice."""
    with pytest.raises(ValueError, match=r"column 'x' \(.*\) has 1 nulls within its rows"):
        column_to_tensor(table(array), "x")
    assert len(column_to_tensor(table(array).slice(1), "x")) == 1


@pytest.mark.parametrize(
    ("array", "fact"),
    [
        (pa.array([[1], [2, 3], []]), "its rows have 0 to 2 values. Use column_to_padded"),
        (pa.array([[[1], [2]], [[3], [4, 5]]]), "its rows have 1 to 2 values. Pad the inner lists"),
        (pa.chunked_array([[[1], [2]], [[3, 4]]]), r"the rows of its chunks have shapes [(1,), (2,)]. Use"),
    ],
)
def test_ragged_lists_are_refused(array: Any, fact: str) -> None:
    """Rows of different lengths are an error that names the way to pad them."""
    with pytest.raises(ValueError, match=r"column 'x' .* is ragged") as caught:
        column_to_tensor(table(array), "x")
    assert fact in str(caught.value)


def test_rays_variable_shapes_are_refused() -> None:
    """Ray's rows of different shapes are an error that names the shapes."""
    with pytest.raises(ValueError, match=r"is ragged: its rows have shapes 1\.\.3 x 2\.\.4\. Use column_to_padded"):
        column_to_tensor(table(ray_column(ragged((1, 4), (3, 2)))), "x")


def test_the_wrong_name_says_what_there_is() -> None:
    """A name that no column has, or that two have, is an error with the names there are."""
    with pytest.raises(ValueError, match=r"the batch has no column 'y'. It has 'other', 'x'"):
        column_to_tensor(table(pa.array([1])), "y")
    with pytest.raises(ValueError, match="the batch has 2 columns 'a'"):
        column_chunks(pa.table([[1], [2]], names=["a", "a"]), "a")
    with pytest.raises(TypeError, match=r"is a str, not a list. It has 'other', 'x'\."):
        column_to_tensor(table(pa.array([1])), ["x"])


def test_a_wide_table_names_its_first_columns() -> None:
    """An error about a table of many columns stays readable."""
    with pytest.raises(ValueError, match=r"It has 'c0', .* 'c19' and 2980 more\.$"):
        column_to_tensor(pa.table({f"c{number}": [1] for number in range(3000)}), "x")


def test_another_batch_format_says_so() -> None:
    """A batch of numpy arrays is refused with Ray Data's option."""
    with pytest.raises(TypeError, match=r"is a builtins.dict.*batch_format='pyarrow'"):
        column_to_tensor({"x": np.ones(3)}, "x")


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int32())], ids=str)
def test_ragged_lists_are_padded(kind: pa.DataType) -> None:
    """Lists become a padded tensor and their lengths, over slices and chunks, without touching the batch."""
    rows = [[9, 9], [1, 2, 3], [], [4], [5, 6]]
    whole = table(pa.array(rows, kind))
    batch = pa.concat_tables([whole.slice(1, 2), whole.slice(0, 0), whole.slice(3)])
    padded, lengths = column_to_padded(batch, "x", fill=-1)
    assert padded.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1], [5, 6, -1]]
    assert padded.dtype == torch.int32
    assert lengths.tolist() == [3, 0, 1, 2]
    assert lengths.dtype == torch.int64
    padded.zero_()
    lengths.zero_()
    assert whole["x"].to_pylist() == rows


def test_lists_of_vectors_are_padded() -> None:
    """A list of fixed-size items is padded in its first dimension only."""
    array = pa.array([[[1, 2]], [[3, 4], [5, 6]]], pa.list_(pa.list_(pa.int64(), 2)))
    padded, lengths = column_to_padded(table(array), "x")
    assert padded.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert lengths.tolist() == [1, 2]


def test_rays_variable_shapes_are_padded() -> None:
    """Ray's rows of several dimensions are padded in each, and their lengths are their shapes."""
    whole = table(ray_column(ragged((5, 1), (1, 3), (2, 1), (0, 2))))
    padded, lengths = column_to_padded(whole.slice(1), "x", fill=float("nan"))
    nan = float("nan")
    expected = torch.tensor([[[5, 6, 7], [nan, nan, nan]], [[8, nan, nan], [9, nan, nan]], [[nan] * 3] * 2])
    assert torch.equal(padded.nan_to_num(-1), expected.nan_to_num(-1))
    assert lengths.tolist() == [[1, 3], [2, 1], [0, 2]]
    padded, lengths = column_to_padded(table(ray_column(ragged((3,), (1,)))), "x")
    assert padded.tolist() == [[0, 1, 2], [3, 0, 0]]
    assert lengths.tolist() == [3, 1]


def test_no_rows_are_padded_to_nothing() -> None:
    """A ragged column without rows gives empty tensors of the right dimensions."""
    padded, lengths = column_to_padded(table(pa.array([], pa.list_(pa.float16()))), "x")
    assert (padded.shape, padded.dtype, lengths.shape) == ((0, 0), torch.float16, (0,))
    padded, lengths = column_to_padded(table(ray_column(ragged((1, 3), (2, 1)))).slice(2), "x")
    assert (padded.shape, lengths.shape) == ((0, 0, 0), (0, 2))


@pytest.mark.parametrize(
    ("fill", "kind"), [(-1, pa.uint8()), (0.5, pa.int64()), (float("nan"), pa.int32()), (-1e9, pa.float16())]
)
def test_a_fill_that_the_column_cannot_hold_is_refused(fill: float, kind: pa.DataType) -> None:
    """A fill that would turn into another number is an error."""
    words = "numbers" if pa.types.is_floating(kind) else "whole numbers"
    with pytest.raises(ValueError, match=rf"cannot hold fill=.* values are {words} from"):
        column_to_padded(table(pa.array([[1], [1, 2]], pa.list_(kind))), "x", fill=fill)


@pytest.mark.parametrize("fill", [None, "0"])
def test_a_fill_that_is_no_number_is_refused(fill: Any) -> None:
    """A fill such as the `pad_token_id` that a tokenizer does not have is named."""
    with pytest.raises(TypeError, match=rf"column 'x' .* cannot be filled with {fill!r}: fill is a number"):
        column_to_padded(table(pa.array([[1], [1, 2]])), "x", fill=fill)


@pytest.mark.parametrize(
    ("array", "error", "fact"),
    [
        (pa.array([1, 2]), TypeError, "nothing to pad. Use column_to_tensor"),
        (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), TypeError, "nothing to pad"),
        (pa.array([[1], None]), ValueError, "1 nulls in 2 rows"),
        (pa.array([[1], [2, None]]), ValueError, "1 nulls within its rows"),
        (pa.array([["a"]]), TypeError, "holds type string"),
        (pa.array([[[1], [2, 3]]]), ValueError, "is ragged: its rows have 1 to 2 values. Pad the inner lists"),
        (pa.chunked_array([[[[1]]], [[[1, 2]]]]), ValueError, "the items of its lists have shapes"),
        (
            pa.chunked_array([ray_column(ragged((1,), (3,))).chunk(0), ray_column(ragged((1, 2), (2, 2))).chunk(0)]),
            ValueError,
            "has rows of 1 and 2 dimensions",
        ),
    ],
)
def test_what_cannot_be_padded_says_why(array: Any, error: type[Exception], fact: str) -> None:
    """Padding mends different lengths, and nothing else."""
    with pytest.raises(error, match=fact):
        column_to_padded(table(array), "x")


# ---------------------------------------------------------------- tensors to columns


@pytest.mark.parametrize("dtype", NUMBERS.values(), ids=str)
@pytest.mark.parametrize("shape", [(6,), (3, 2), (1, 2, 3)])
@pytest.mark.parametrize("tensor_format", FORMATS)
def test_a_tensor_is_shared_with_its_column(
    ray_format: DataContext, dtype: torch.dtype, shape: tuple[int, ...], tensor_format: FixedShapeTensorFormat
) -> None:
    """A contiguous CPU tensor and its column are the same bytes, and so is the tensor back from it."""
    ray_format.arrow_fixed_shape_tensor_format = tensor_format
    tensor = torch.arange(6).to(dtype).reshape(shape)
    column = tensor_to_column(tensor)
    assert shares(tensor, column)
    assert not shares(tensor.clone(), column)
    back = column_to_tensor(table(column), "x")
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_the_column_is_what_ray_data_makes(shape: tuple[int, ...]) -> None:
    """A tensor's column has the type that Ray Data gives to the same values, and Ray reads them back."""
    values = torch.rand(shape)
    column = tensor_to_column(values)
    assert column.type == ray_column(values.numpy()).type
    batch = BlockAccessor.for_block(table(column)).to_batch_format("numpy")
    assert np.array_equal(batch["x"], values.numpy())


def test_bools_are_packed_as_ray_data_does() -> None:
    """Bools become Arrow's own, packed, in numbers, tensors and lists."""
    values = torch.tensor([[True, False, True], [False, False, True]])
    assert tensor_to_column(values[0]).equals(pa.array([True, False, True]))
    assert tensor_to_column(values).type == ray_column(values.numpy()).type
    assert np.array_equal(tensor_to_column(values).to_numpy(), values.numpy())
    assert tensor_to_column([values[0], values[1][:1]]).to_pylist() == [[True, False, True], [False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_small_floats_become_float32_exactly(dtype: torch.dtype) -> None:
    """Every bit pattern of bfloat16 and float8 goes to float32 and back; a NaN stays one."""
    bits = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    values = bits.view(dtype)
    for tensor in (values, values.reshape(16, -1)):
        column = tensor_to_column(tensor)
        read = column_to_tensor(table(column), "x")
        assert read.dtype == torch.float32
        back = read.to(dtype)
        there = ~tensor.float().isnan()
        assert torch.equal(back.float().isnan(), ~there)
        assert torch.equal(back.view(bits.dtype)[there], tensor.view(bits.dtype)[there])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.arange(3.0).expand(2, 3),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch._neg_view(torch.arange(4.0)),
        torch.nn.Parameter(torch.arange(4.0)),
        torch.arange(4.0, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "negated part", "negated", "parameter", "with gradient"],
)
def test_views_and_gradients_come_out_right(tensor: torch.Tensor) -> None:
    """Strides, lazy negation and gradients do not reach the column; the values do."""
    back = column_to_tensor(table(tensor_to_column(tensor)), "x")
    assert torch.equal(back, tensor.detach().clone())
    assert not back.requires_grad


def test_a_parameter_is_shared() -> None:
    """A gradient is no reason to copy."""
    parameter = torch.nn.Parameter(torch.arange(4.0))
    assert shares(parameter, tensor_to_column(parameter))


def test_inference_tensors_are_shared() -> None:
    """What a predictor computes under inference_mode becomes a column like any other, and is read like any other."""
    with torch.inference_mode():
        tensor = torch.arange(6.0).reshape(3, 2) * 2
        column = tensor_to_column(tensor)
        assert shares(tensor, column)
        assert shares(column_to_tensor(table(column), "x"), column)


@pytest.mark.parametrize("lengths", [[3, 0, 1], [2, 2], [0]])
def test_rows_become_lists(lengths: list[int]) -> None:
    """A list of 1-d tensors is a list column, also of equal lengths, and padding is its inverse."""
    rows = [torch.arange(length, dtype=torch.int16) for length in lengths]
    column = tensor_to_column(rows)
    assert column.type == pa.list_(pa.int16())
    assert column.to_pylist() == [row.tolist() for row in rows]
    padded, sizes = column_to_padded(table(column), "x")
    back = [row[:size] for row, size in zip(padded, sizes.tolist(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(back, rows, strict=True))
    assert tensor_to_column(back).equals(column)


@pytest.mark.parametrize("shapes", [[(1, 3), (2, 2)], [(2, 2), (2, 2)], [(1, 2, 3)], [(0, 2), (1, 2)]])
def test_rows_of_several_dimensions_become_rays_variable_shapes(shapes: list[tuple[int, ...]]) -> None:
    """A list of n-d tensors is Ray's variable-shaped column, also of equal shapes, and Ray reads it."""
    rows = [torch.rand(shape) for shape in shapes]
    column = tensor_to_column(rows)
    assert column.type.extension_name == "ray.data.arrow_variable_shaped_tensor"
    read = BlockAccessor.for_block(table(column)).to_batch_format("numpy")["x"]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(read, rows, strict=True))
    padded, lengths = column_to_padded(table(column), "x")
    for row, there, shape in zip(rows, padded, lengths.tolist(), strict=True):
        assert torch.equal(there[tuple(slice(size) for size in shape)], row)


def test_small_floats_in_rows_become_float32() -> None:
    """Rows of bfloat16 become lists of float32."""
    assert tensor_to_column([torch.ones(2, dtype=torch.bfloat16)]).type == pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("values", "error", "fact"),
    [
        (lambda: torch.tensor(1.0), ValueError, r"of shape \(\) has no rows.*reshape\(1\)"),
        (lambda: torch.ones(2, dtype=torch.complex64), TypeError, r"complex64.*view_as_real"),
        (lambda: torch.eye(2).to_sparse(), TypeError, r"sparse_coo.*to_dense"),
        (lambda: torch.ones(2, device="meta"), TypeError, "meta device"),
        (list, ValueError, "an empty list gives a column no type"),
        (lambda: None, TypeError, "list with one tensor per row, not of a builtins.NoneType"),
        (lambda: {"y": torch.ones(2)}, TypeError, "not of a builtins.dict"),
        (lambda: "text", TypeError, "not of a builtins.str"),
        (lambda: [torch.ones(1), np.ones(2)], TypeError, "row 1 is a numpy.ndarray, not a tensor"),
        (lambda: [torch.ones(1), torch.ones(2).int()], TypeError, r"torch.float32 and torch.int32.*Cast"),
        (lambda: [torch.ones(1), torch.ones(2, 2)], ValueError, "of 1 and 2 dimensions"),
        (lambda: [torch.tensor(1), torch.tensor(2)], ValueError, "torch.stack"),
        (lambda: [torch.ones(2, dtype=torch.complex64)], TypeError, "row 0 is torch.complex64"),
    ],
)
def test_what_has_no_column_says_the_remedy(values: Callable[[], Any], error: type[Exception], fact: str) -> None:
    """What Arrow has no column for is an error with the fact and what to do."""
    with pytest.raises(error, match=fact):
        tensor_to_column(values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_tensors_come_to_the_host(dtype: torch.dtype) -> None:
    """A tensor on a GPU becomes a column of its values."""
    tensor = torch.arange(6, device="cuda").to(dtype).reshape(3, 2)
    assert torch.equal(column_to_tensor(table(tensor_to_column(tensor)), "x"), tensor.cpu().float())


# ---------------------------------------------------------------- any dtype, shape, slice and chunks


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(list(NUMBERS.values())),
    rows=st.integers(0, 12),
    row_shape=st.lists(st.integers(0, 4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    window=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 2**16),
)
def test_any_tensor_comes_back(
    dtype: torch.dtype,
    rows: int,
    row_shape: list[int],
    cuts: list[int],
    window: tuple[int, int],
    seed: int,
) -> None:
    """A tensor of any dtype and shape comes back from its column, however that is cut and sliced."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 120, (rows, *row_shape), generator=generator).to(dtype)
    whole = table(tensor_to_column(tensor))
    places = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    batch = pa.concat_tables(whole.slice(a, b - a) for a, b in itertools.pairwise(places))
    batch = batch.slice(*window)
    expected = tensor[window[0] :][: window[1]]
    read = column_to_tensor(batch, "x")
    assert read.dtype == dtype
    assert torch.equal(read, expected)
    chunks = list(column_chunks(batch, "x"))
    assert all(shares(chunk, whole["x"]) for chunk in chunks if chunk.numel())
    assert torch.equal(torch.cat(chunks), expected)
    if sum(map(len, chunks)) and sum(bool(len(chunk)) for chunk in chunks) == 1 and read.numel():
        assert shares(read, whole["x"])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(NUMBERS)),
    large=st.booleans(),
    rows=st.lists(st.lists(st.integers(0, 120), max_size=5), max_size=10),
    cuts=st.lists(st.integers(0, 10), max_size=3),
    window=st.tuples(st.integers(0, 10), st.integers(0, 10)),
)
def test_any_list_column_comes_back(
    kind: pa.DataType, large: bool, rows: list[list[int]], cuts: list[int], window: tuple[int, int]
) -> None:
    """A list column of any type and lengths comes back from its padded tensor, however it is cut and sliced."""
    values = [np.array(row).astype(kind.to_pandas_dtype()) for row in rows]
    whole = table(pa.array(values, pa.large_list(kind) if large else pa.list_(kind)))
    places = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    batch = pa.concat_tables(whole.slice(a, b - a) for a, b in itertools.pairwise(places))
    batch = batch.slice(*window)
    expected = rows[window[0] :][: window[1]]
    padded, lengths = column_to_padded(batch, "x")
    assert lengths.tolist() == [len(row) for row in expected]
    back = [row[:size] for row, size in zip(padded, lengths.tolist(), strict=True)]
    assert [row.tolist() for row in back] == expected
    if expected:
        assert tensor_to_column(back).to_pylist() == batch["x"].to_pylist()
    if len({len(row) for row in expected}) == 1:
        assert column_to_tensor(batch, "x").tolist() == expected


def test_the_examples_run() -> None:
    """The examples in the docstrings give what they say."""
    result = doctest.testmod(ray_zerocopy.arrow)
    assert result.attempted >= 8
    assert not result.failed


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0, 3.0]]])
def test_tensor_types_of_earlier_rays(rows: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's tensor columns are read where its types have no hash and no value_type, as in Ray 2.44."""
    column = ArrowTensorArray.from_numpy([np.array(row, dtype=np.float32) for row in rows])
    monkeypatch.setattr(type(column.type), "__hash__", None)
    for kind in type(column.type).__mro__:
        if kind.__module__.startswith("ray.") and "value_type" in kind.__dict__:
            monkeypatch.delattr(kind, "value_type")
    table = pa.table({"x": column})
    if len(rows[0]) == len(rows[1]):
        assert column_to_tensor(table, "x").tolist() == rows
    else:
        assert column_to_padded(table, "x")[0].tolist() == [[1.0, 0.0], [2.0, 3.0]]
