"""What `preprocess`, `predict` and `postprocess` of one predictor may share: a tokenizer, a connection, a setting."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.data import ActorPoolStrategy
from torch import nn

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy.arrow import column_to_tensor


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    return prepare_model_for_actors(nn.Identity())


class Cutter:
    """A tokenizer as the `tokenizers` package has it: the length is a setting, and not an argument."""

    limit = 0

    def cut(self, text: str, limit: int) -> int:
        self.limit = limit
        time.sleep(0.0001)  # lets another thread change the setting
        return min(len(text), self.limit)


class CutsTwice(ZeroCopyPredictor):
    """Cuts texts to 16 before the model and to 64 after it, with one tokenizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cutter = Cutter()

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        return torch.tensor([self.cutter.cut(text, 16) for text in batch.column("text").to_pylist()])

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        after = [self.cutter.cut(text, 64) for text in batch.column("text").to_pylist()]
        return pa.table({"before": outputs.numpy(), "after": after})


class Tokenizes(ZeroCopyPredictor):
    """The same with the `tokenizers` package."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from tokenizers import Tokenizer, models, pre_tokenizers

        self.tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def _lengths(self, batch: pa.Table, limit: int) -> list[int]:
        self.tokenizer.enable_truncation(limit)
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch(batch.column("text").to_pylist())]

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        return torch.tensor(self._lengths(batch, 16))

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        return pa.table({"before": outputs.numpy(), "after": self._lengths(batch, 64)})


@pytest.mark.parametrize("cls", [CutsTwice, Tokenizes])
@pytest.mark.parametrize("callers", [1, 3])
def test_one_tokenizer_in_two_stages(cls: type[ZeroCopyPredictor], callers: int, model_ref: ModelRef) -> None:
    """No row is cut to the other stage's length, over many micro-batches and with several calling threads."""
    if cls is Tokenizes:
        pytest.importorskip("tokenizers")
    predictor = cls(model_ref, micro_batch_size=8)
    table = pa.table({"text": ["a " * 100] * 400})
    with ThreadPoolExecutor(callers) as pool:
        for result in pool.map(predictor, [table] * callers):
            assert set(result.column("before").to_pylist()) == {16}
            assert set(result.column("after").to_pylist()) == {64}


def test_one_tokenizer_in_an_actor_pool(model_ref: ModelRef) -> None:
    """The same in Ray Data's actors."""
    dataset = ray.data.from_items([{"text": "a " * 100}] * 600, override_num_blocks=3)
    cut = dataset.map_batches(
        CutsTwice.using(model_ref, micro_batch_size=8),
        batch_size=200,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.1,
    )
    assert {(row["before"], row["after"]) for row in cut.take_all()} == {(16, 64)}


class UsesConnection(ZeroCopyPredictor):
    """Opens a sqlite connection in `preprocess`, which only this thread may use, and uses it in other methods."""

    later = ("predict", "postprocess")
    connection: Any = None

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        if self.connection is None:
            self.connection = sqlite3.connect(":memory:")
            self.local = threading.local()
            self.local.factor = 3
        return column_to_tensor(batch, "x")

    def _factor(self, method: str) -> int:
        if method not in self.later:
            return 3
        (one,) = self.connection.execute("select 1").fetchone()
        return int(one * self.local.factor)

    def predict(self, inputs: torch.Tensor) -> Any:
        return self.model(inputs) * self._factor("predict")

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        return pa.table({"y": (outputs * self._factor("postprocess")).numpy()})


class UsesConnectionOnTheHost(UsesConnection):
    later = ("postprocess",)


@pytest.mark.parametrize(("cls", "micro_batch_size"), [(UsesConnection, None), (UsesConnectionOnTheHost, 4)])
def test_objects_of_one_thread(cls: type[UsesConnection], micro_batch_size: int | None, model_ref: ModelRef) -> None:
    """A connection and a thread-local made in preprocess work in predict too; with micro-batches in postprocess."""
    predictor = cls(model_ref, micro_batch_size=micro_batch_size)
    for _ in range(2):
        assert predictor(pa.table({"x": range(10)})).column("y").to_pylist() == [9 * i for i in range(10)]


class SetsThreads(ZeroCopyPredictor):
    """Sets the number of torch's threads in one of its methods, and returns the number that `predict` sees."""

    where = ""

    def __init__(self, *args: Any, where: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.where = where
        self._set("__init__")

    def _set(self, method: str) -> None:
        if method == self.where:
            torch.set_num_threads(3)

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        self._set("preprocess")
        return column_to_tensor(batch, "x")

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full_like(inputs, torch.get_num_threads())

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        self._set("postprocess")
        return pa.table({"threads": outputs.numpy()})


@pytest.mark.parametrize("where", ["__init__", "preprocess", "postprocess"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_number_of_threads(where: str, micro_batch_size: int | None, model_ref: ModelRef) -> None:
    """The number of threads that any method sets is the number with which the model computes from then on."""
    table = pa.table({"x": range(12)})

    def run() -> list[list[int]]:
        torch.set_num_threads(1)
        predictor = SetsThreads(model_ref, where=where, micro_batch_size=micro_batch_size)
        return [predictor(table).column("threads").to_pylist() for _ in range(2)]

    with ThreadPoolExecutor(1) as pool:  # torch's setting in the thread of the tests stays
        first, second = pool.submit(run).result()
    assert set(second) == {3}
    if where != "postprocess":
        assert set(first) == {3}


class OneAtATime(ZeroCopyPredictor):
    """Fails if two calls of host methods, or two calls of `predict`, run at the same time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host, self.device_lock = threading.Lock(), threading.Lock()
        self.seen: set[str] = set()

    def _alone(self, lock: threading.Lock, value: Any) -> Any:
        if not lock.acquire(blocking=False):
            raise RuntimeError("two at once")
        time.sleep(0.002)
        self.seen.add(threading.current_thread().name)
        lock.release()
        return value

    def preprocess(self, batch: pa.Table) -> Any:
        return self._alone(self.host, column_to_tensor(batch, "x"))

    def predict(self, inputs: Any) -> Any:
        return self._alone(self.device_lock, inputs)

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        return self._alone(self.host, pa.table({"x": outputs.numpy()}))


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_calling_threads_take_turns(micro_batch_size: int | None, model_ref: ModelRef) -> None:
    """Several threads that call one predictor get their own rows, and no two stages of a kind run at once."""
    predictor = OneAtATime(model_ref, micro_batch_size=micro_batch_size)
    tables = [pa.table({"x": range(10 * i, 10 * i + 10)}) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(predictor, tables))
    assert [result.column("x").to_pylist() for result in results] == [t.column("x").to_pylist() for t in tables]
    assert len(predictor.seen) > 1
