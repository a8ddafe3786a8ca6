"""Arrow extension types over lists that are not Ray's, such as those of Hugging Face datasets, are tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.data import ActorPoolStrategy
from torch import nn

from ray_zerocopy import ZeroCopyPredictor, memory, prepare_model_for_actors
from ray_zerocopy.arrow import column_chunks, column_to_padded, column_to_tensor


class ArrayXD(pa.ExtensionType):
    """A type as that of datasets' Array2D and Array3D: nested lists under a name, with a shape."""

    def __init__(self, shape: tuple[int | None, ...], value_type: Any, fixed: bool = False) -> None:
        self.shape = shape
        self.fixed = fixed
        stored = value_type
        for size in reversed(shape):
            stored = pa.list_(stored, size) if fixed and size is not None else pa.list_(stored)
        super().__init__(stored, f"tests.Array{len(shape)}D")

    def __arrow_ext_serialize__(self) -> bytes:
        return repr(self.shape).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Any:
        while hasattr(storage_type, "value_type"):
            storage_type = storage_type.value_type
        return cls(eval(serialized), storage_type)


class Named(pa.ExtensionType):
    """An extension over another type."""

    def __init__(self, stored: Any, name: str) -> None:
        super().__init__(stored, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Any:
        return cls(storage_type, "tests.Named")


def column(values: list[Any], kind: Any) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


@pytest.mark.parametrize(
    ("shape", "value_type", "dtype", "fixed"),
    [
        ((3, 4), pa.float32(), torch.float32, False),
        ((3, 4), pa.float32(), torch.float32, True),
        ((None, 4), pa.int64(), torch.int64, True),
        ((2, 3, 4), pa.uint8(), torch.uint8, False),
        ((2, 2, 2, 2), pa.float64(), torch.float64, False),
        ((5,), pa.float16(), torch.float16, False),
    ],
    ids=str,
)
def test_array_types_are_tensors(shape: Any, value_type: Any, dtype: torch.dtype, fixed: bool) -> None:
    """Columns of 1 to 4 dimensions are one tensor, also sliced and in chunks."""
    sizes = tuple(3 if size is None else size for size in shape)
    values = np.arange(6 * np.prod(sizes)).reshape(6, *sizes) % 100
    values = values.astype(value_type.to_pandas_dtype())
    kind = ArrayXD(shape, value_type, fixed)
    array = column(values.tolist() if value_type != pa.float16() else [list(row) for row in values], kind)
    batch = pa.table({"x": array})
    expected = torch.from_numpy(values)
    found = column_to_tensor(batch, "x")
    assert found.dtype is dtype
    assert torch.equal(found, expected)
    assert torch.equal(column_to_tensor(batch.slice(2, 3), "x"), expected[2:5])
    chunked = pa.table({"x": pa.chunked_array([array.slice(0, 4), array.slice(4)])})
    assert torch.equal(column_to_tensor(chunked, "x"), expected)
    assert [len(chunk) for chunk in column_chunks(chunked, "x")] == [4, 2]
    assert len(column_to_tensor(batch.slice(0, 0), "x")) == 0


def test_ragged_arrays_are_padded() -> None:
    """Rows of a dynamic first dimension are padded, and column_to_tensor says so with the column's own type."""
    kind = ArrayXD((None, 2), pa.float32())
    batch = pa.table({"x": column([[[1, 2]], [[3, 4], [5, 6]]], kind)})
    padded, lengths = column_to_padded(batch, "x")
    assert padded.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert lengths.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"column 'x' \(extension<tests\.Array2D.*column_to_padded"):
        column_to_tensor(batch, "x")


def test_extensions_within_and_around() -> None:
    """An extension inside a list, and one around another, are read too."""
    kind = ArrayXD((2, 2), pa.int32())
    inner = column([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], kind)
    listed = pa.FixedSizeListArray.from_arrays(inner, 2)
    assert column_to_tensor(pa.table({"x": listed}), "x").tolist() == [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]]
    around = pa.ExtensionArray.from_storage(Named(pa.list_(pa.int64()), "tests.Named"), pa.array([[1, 2], [3, 4]]))
    assert column_to_tensor(pa.table({"x": around}), "x").tolist() == [[1, 2], [3, 4]]


def test_nulls_and_other_extensions_are_named() -> None:
    """Nulls in rows and values, lists of text, and extensions that are not over lists are errors as before."""
    kind = ArrayXD((2,), pa.float32())
    with pytest.raises(ValueError, match="1 nulls in 2 rows"):
        column_to_tensor(pa.table({"x": column([[1.0, 2.0], None], kind)}), "x")
    with pytest.raises(ValueError, match="nulls within its rows"):
        column_to_tensor(pa.table({"x": column([[1.0, None]], kind)}), "x")
    with pytest.raises(TypeError, match="holds type string"):
        column_to_tensor(pa.table({"x": column([["a", "b"]], ArrayXD((2,), pa.string()))}), "x")
    numbers = pa.ExtensionArray.from_storage(Named(pa.int64(), "tests.Numbers"), pa.array([1, 2]))
    with pytest.raises(TypeError, match=r"storage_type"):
        column_to_tensor(pa.table({"x": numbers}), "x")


def test_a_column_in_the_store_is_not_copied(ray_session: None) -> None:
    """Two tensors over a column in the store are views of the same pages."""
    stored = ray.put(pa.table({"x": column(np.zeros((100, 30, 40)).tolist(), ArrayXD((30, 40), pa.float32()))}))
    one, two = (column_to_tensor(ray.get(stored), "x") for _ in range(2))
    assert memory.location(one) is not None
    assert memory.location(one) == memory.location(two)


def test_an_array_column_in_actors(ray_session: None) -> None:
    """A predictor of Ray Data reads such a column with input_columns, whose type workers do not know."""
    ref = prepare_model_for_actors(nn.Flatten())
    table = pa.table({"x": column(np.arange(24.0).reshape(4, 2, 3).tolist(), ArrayXD((2, 3), pa.float32()))})
    bound = ZeroCopyPredictor.using(ref, input_columns="x", output_column="y", keep_columns=False)
    ds = ray.data.from_arrow(table)
    rows = ds.map_batches(bound, batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=0.1).take_all()
    assert sorted(np.asarray(row["y"]).tolist() for row in rows) == np.arange(24.0).reshape(4, 6).tolist()
