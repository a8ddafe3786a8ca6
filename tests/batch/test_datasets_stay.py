"""The dataset is not the model's to write to: what runs in place changes its own inputs and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.data.extensions import ArrowTensorArray
from torch import nn

from ray_zerocopy import ZeroCopyPredictor, memory, prepare_model_for_actors
from ray_zerocopy._pages import regions
from ray_zerocopy.arrow import column_chunks, column_to_tensor

ROWS = 4000  # of 256 bytes: blocks far above 100 KiB, which lie in the store


class AddsInPlace(nn.Module):
    """Writes to its inputs, as `x.add_(1)` and `ReLU(inplace=True)` do."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([nn.functional.relu(x.add_(1.0), inplace=True).sum(1) for x in inputs], 1)


class Shift(nn.Module):
    """Writes to its first input, and adds the second."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.add_(100.0) + y


KINDS = ["tensor", "list", "fixed"]


def dataset() -> Any:
    rows = np.arange(ROWS * 64, dtype=np.float32).reshape(ROWS, 64)
    flat = pa.array(rows.reshape(-1))
    columns = {
        "tensor": ArrowTensorArray.from_numpy(rows),
        "list": pa.ListArray.from_arrays(pa.array(range(0, ROWS * 64 + 1, 64), pa.int32()), flat),
        "fixed": pa.FixedSizeListArray.from_arrays(flat, 64),
    }
    return ray.data.from_arrow(pa.table(columns)).materialize()


def contents(ds: Any) -> Any:
    return np.stack([[np.asarray(row[kind]) for kind in KINDS] for row in ds.take_all()])


@pytest.mark.parametrize("batch_format", ["pyarrow", "numpy"])
def test_a_model_that_writes_to_its_input(batch_format: str, ray_session: None) -> None:
    """A materialized dataset is the same after a model wrote to its inputs, and a second pass gives the same."""
    ds = dataset()
    before = contents(ds)
    ref = prepare_model_for_actors(AddsInPlace())
    options: Any = {"batch_size": None, "batch_format": batch_format, "num_cpus": 0.1}
    bound = ZeroCopyPredictor.using(ref, input_columns=KINDS, output_column="y", keep_columns=False)
    out = ds.union(ds).map_batches(bound, compute=ActorPoolStrategy(size=1), **options)
    found = np.stack([np.asarray(row["y"]) for row in out.take_all()])
    assert np.array_equal(contents(ds), before)
    expected = (before + 1).sum(2)
    found = found[np.lexsort(found.T)]
    assert np.array_equal(found[0::2], found[1::2])  # each row of both passes
    assert np.allclose(found[0::2], expected, rtol=1e-4)


def test_a_write_to_a_tensor_of_a_column(ray_session: None) -> None:
    """Tensors of columns read the store's own pages until they are written to, and a write stays in the tensor."""
    table = pa.table({"x": np.ones(1_000_000, dtype=np.float32)})
    block = ray.get(ray.put(table))
    address = block["x"].chunks[0].buffers()[1].address
    shared = regions.locate(address)
    assert shared is not None
    one, (two,) = column_to_tensor(block, "x"), list(column_chunks(block, "x"))
    assert memory.location(one) == memory.location(two) == shared
    one[0] = 7.0
    two.mul_(3.0)
    assert memory.location(one) is None
    assert one[0] == 7.0
    assert float(two.sum()) == 3_000_000.0
    assert float(column_to_tensor(block, "x").sum()) == 1_000_000.0
    assert float(one[100_000:].sum()) == 900_000.0


def test_a_slice_and_several_chunks(ray_session: None) -> None:
    """Slices and columns of several chunks are protected too."""
    table = pa.table({"x": np.arange(1_000_000, dtype=np.int64)})
    block = ray.get(ray.put(pa.concat_tables([table, table])))
    column_to_tensor(block.slice(5, 100), "x").zero_()
    column_to_tensor(block, "x").zero_()
    for chunk in column_chunks(block, "x"):
        chunk.zero_()
    assert block.slice(5, 3)["x"].to_pylist() == [5, 6, 7]


@pytest.mark.parametrize("rows", [64, 20_000])
@pytest.mark.parametrize("fused", [False, True])
def test_kept_columns_stay(rows: int, fused: bool, ray_session: None) -> None:
    """A kept column has its values also if the batch is small, or was made by an operator of the same process."""
    ds = ray.data.range(rows, override_num_blocks=1)
    ds = ds.map_batches(lambda batch: {"x": batch["id"].astype("float32")})
    ds = ds if fused else ds.materialize()
    bound = ZeroCopyPredictor.using(
        prepare_model_for_actors(Shift()), input_columns=["x", "x"], output_column="y", keep_columns=True
    )
    out = ds.map_batches(
        bound, batch_format="pyarrow", batch_size=None, compute=ActorPoolStrategy(size=1), num_cpus=0.1
    ).take_all()
    out.sort(key=lambda row: row["x"])
    assert [row["x"] for row in out] == list(range(rows))
    assert [row["y"] for row in out] == [2.0 * i + 100 for i in range(rows)]


def test_small_blocks_stay(ray_session: None) -> None:
    """A small materialized block, and a small result of a task, are the same after a write to their tensors."""
    ds = ray.data.range(64, override_num_blocks=1).materialize()

    def total() -> float:
        (batch,) = ds.iter_batches(batch_format="pyarrow", batch_size=None)
        return float(column_to_tensor(batch, "id").add_(1).sum())

    assert total() == total() == 64 * 65 / 2
    made = ray.remote(num_cpus=0.1)(lambda: pa.table({"x": [0, 1, 2, 3]})).remote()
    column_to_tensor(ray.get(made), "x").add_(1)
    assert ray.get(made)["x"].to_pylist() == [0, 1, 2, 3]
