"""Micro-batches: three stages at once, in order, with errors, memory and threads as promised."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import predictors
import pyarrow as pa
import pytest
import ray
import torch
from predictors import AddOne, Formats
from ray.data import ActorPoolStrategy
from torch import nn

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy._batch.stages import DEPTH, RowsOfBatch, Stages, add_cause, add_note


def parts(count: int) -> Iterator[range]:
    """Return parts of two rows."""
    return (range(row, row + 2) for row in range(0, 2 * count, 2))


def start(part: range) -> int:
    return part.start


def same(value: Any) -> Any:
    return value


def ours() -> list[threading.Thread]:
    """Return the threads of all predictors in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ray_zerocopy")]


def all_ended(threads: list[threading.Thread]) -> bool:
    """Say whether the threads end within seconds, once nothing holds them."""
    gc.collect()
    for thread in threads:
        thread.join(5)
    return not any(thread.is_alive() for thread in threads)


# ---------------------------------------------------------------- the stages alone


def test_three_stages_run_at_once() -> None:
    """With `concurrent`, one part's preprocess, the model on another and postprocess of a third meet at a barrier."""
    barrier = threading.Barrier(3)

    def meet(number: int, first: int, last: int) -> int:
        if first <= number <= last:
            barrier.wait(20)
        return number

    results = Stages(concurrent=True).overlap(
        parts(8),
        lambda part: meet(part.start // 2, 2, 7),
        lambda number: meet(number, 1, 6),
        lambda number: meet(number, 0, 5),
    )
    assert [result for _, result in results] == list(range(8))


def test_the_model_runs_beside_the_host_stages() -> None:
    """The model works on one part while preprocess works on the next, and while postprocess works on the last."""
    first, second = threading.Barrier(2), threading.Barrier(2)

    def before(part: range) -> int:
        if part.start == 2:
            first.wait(20)
        return part.start

    def model(number: int) -> int:
        if number == 0:
            first.wait(20)
        if number == 2:
            second.wait(20)
        return number

    def after(number: int) -> int:
        if number == 0:
            second.wait(20)
        return number

    assert [result for _, result in Stages().overlap(parts(4), before, model, after)] == [0, 2, 4, 6]


@pytest.mark.parametrize("callers", [1, 4])
def test_host_stages_take_turns(callers: int) -> None:
    """Whatever the number of calls, no two host stages run at once, and no two calls of the model."""
    stages = Stages()
    inside: dict[str, int] = {"host": 0, "model": 0}
    most = dict(inside)

    def work(kind: str, value: int) -> int:
        inside[kind] += 1
        most[kind] = max(most[kind], inside[kind])
        time.sleep(0.002)
        inside[kind] -= 1
        return value

    def call(number: int) -> list[int]:
        run = stages.overlap(
            parts(5),
            lambda part: work("host", part.start),
            lambda value: work("model", value),
            lambda value: work("host", value),
        )
        overlapped = [result for _, result in run]
        alone = stages.one_by_one(
            [range(1)],
            lambda _: work("host", 7),
            lambda value: work("model", value),
            lambda value: work("host", value),
        )
        return [*overlapped, *(result for _, result in alone)]

    with ThreadPoolExecutor(callers) as pool:
        assert list(pool.map(call, range(4))) == [[0, 2, 4, 6, 8, 7]] * 4
    assert most == {"host": 1, "model": 1}


def test_host_stages_run_in_the_calling_thread() -> None:
    """Without micro-batches all stages run in the calling thread; with them all but the model."""
    seen: list[int] = []

    def note(value: Any) -> Any:
        seen.append(threading.get_ident())
        return value

    here = threading.get_ident()
    list(Stages().one_by_one(parts(1), note, note, note))
    assert seen == [here] * 3
    seen.clear()
    list(Stages().overlap(parts(1), note, note, note))
    assert [thread == here for thread in seen] == [True, False, True]


def test_results_come_in_order() -> None:
    """Whatever the stages take, parts come out in order, each with its own result."""
    random = np.random.default_rng(0)

    def slowly(value: Any) -> Any:
        time.sleep(random.random() / 200)
        return value

    results = list(Stages().overlap(parts(20), lambda part: slowly(part.start), slowly, slowly))
    assert results == [(range(n, n + 2), n) for n in range(0, 40, 2)]


def test_memory_is_bounded() -> None:
    """However slow the caller, no more than `DEPTH` parts are begun beyond those that it took."""
    begun: list[range] = []
    results = Stages().overlap(parts(30), lambda part: begun.append(part), same, same)
    for taken, _ in enumerate(results):
        time.sleep(0.005)
        assert len(begun) <= taken + DEPTH


class CustomError(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


def explode(_: Any) -> Any:
    raise CustomError(7, "of the user's own")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_is_itself_and_stops_the_rest(stage: int) -> None:
    """An exception of any stage arrives as the same object, with its rows, after the parts before it, and alone."""
    seen: list[list[int]] = [[], [], []]
    raised: list[CustomError] = []

    def work(number: int) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            value = value.start if isinstance(value, range) else value
            if number == stage and value == 6:
                try:
                    explode(value)
                except CustomError as error:
                    raised.append(error)
                    raise
            seen[number].append(value)
            return value

        return run

    results = Stages().overlap(parts(40), work(0), work(1), work(2))
    taken = []
    with pytest.raises(CustomError, match="of the user's own") as caught:
        taken.extend(result for _, result in results)
    assert caught.value is raised[0]
    assert caught.value.code == 7
    text = "".join(traceback.format_exception(caught.value))
    assert "in explode" in text
    assert "in rows 6 to 7 of the batch" in text
    assert seen[2] == [0, 2, 4]  # no later part is finished
    assert max(seen[0]) <= 6 + 2 * DEPTH  # and few are begun
    assert taken == [0, 2, 4]


def test_an_error_stops_what_is_behind_it_at_once() -> None:
    """Parts behind one that failed are not begun, also while the parts before it are still in the model."""
    begun = []
    go_on = threading.Event()

    def before(part: range) -> int:
        begun.append(part.start)
        if part.start == 6:
            threading.Timer(0.05, go_on.set).start()
            raise ValueError("at 6")
        return part.start

    def model(number: int) -> int:
        assert number < 2 or go_on.wait(20)
        return number

    with pytest.raises(ValueError, match="at 6"):
        list(Stages().overlap(parts(100), before, model, same))
    assert begun == [0, 2, 4, 6]


def test_the_first_rows_that_fail_are_the_ones_named() -> None:
    """If several parts fail, the error is that of the first, also where a later one fails sooner."""
    later = threading.Event()

    def before(part: range) -> int:
        if part.start == 4:
            later.set()
            raise ValueError("sooner, but later rows")
        return part.start

    def after(number: int) -> int:
        if number == 2:
            assert later.wait(10)
            raise KeyError("first rows")
        return number

    with pytest.raises(KeyError, match="first rows"):
        list(Stages().overlap(parts(5), before, same, after))


def test_rows_as_a_cause() -> None:
    """Where exceptions have no notes (Python 3.10), the rows are the last cause in the chain, the user's own kept."""
    error = ValueError("outer")
    error.__cause__ = KeyError("inner")
    add_cause(error, "in rows 0 to 1 of the batch")
    text = "".join(traceback.format_exception(error))
    assert isinstance(error.__cause__.__cause__, RowsOfBatch)
    assert text.index("in rows 0 to 1") < text.index("inner") < text.index("outer")
    add_cause(error, "in rows 2 to 3 of the batch")
    last = error.__cause__.__cause__
    assert (str(last), last.__cause__) == ("in rows 2 to 3 of the batch", None)


def test_each_stage_has_the_callers_settings() -> None:
    """Inference mode is on, and torch's number of threads is the caller's, in every stage and call."""

    def state(_: Any) -> tuple[bool, int]:
        return torch.is_inference_mode_enabled(), torch.get_num_threads()

    seen: list[Any] = []
    stages = Stages()
    for threads in (2, 1):
        torch.set_num_threads(threads)
        list(
            stages.overlap(
                parts(2),
                lambda part: seen.append(state(part)),
                lambda x: seen.append(state(x)),
                lambda x: seen.append(state(x)),
            )
        )
        assert seen == [(True, threads)] * 6
        list(stages.one_by_one(parts(1), *[lambda x: seen.append(state(x))] * 3))
        assert seen == [(True, threads)] * 9
        seen.clear()


@pytest.mark.parametrize("stage", ["preprocess", "model"])
def test_threads_of_torch_set_in_a_stage(stage: str) -> None:
    """The number of torch's threads that a stage sets holds for the model from then on."""
    seen: list[int] = []

    def before(part: range) -> int:
        if stage == "preprocess" and part.start == 4:
            torch.set_num_threads(2)
        return part.start

    def model(number: int) -> int:
        if stage == "model" and number == 4:
            torch.set_num_threads(2)
        seen.append(torch.get_num_threads())
        return number

    torch.set_num_threads(1)
    try:
        list(Stages().overlap(parts(5), before, model, same))
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 1, 2, 2, 2]


def test_one_thread_calls_the_model() -> None:
    """Split calls from several threads all reach the model in one thread, which runs no other stage."""
    stages = Stages()
    model: set[int] = set()
    others: set[int] = set()

    def call(number: int) -> list[int]:
        run = stages.overlap(
            parts(5),
            lambda part: others.add(threading.get_ident()) or part.start,
            lambda x: model.add(threading.get_ident()) or x + number,
            same,
        )
        return [result for _, result in run]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(8)))
    assert results == [[n + number for n in range(0, 10, 2)] for number in range(8)]
    assert len(model) == 1
    assert not model & others
    assert threading.get_ident() not in model


def test_a_slow_call_does_not_hold_up_another() -> None:
    """With `concurrent`, the model serves another call while one call waits for its own preprocess."""
    stages, release = Stages(concurrent=True), threading.Event()
    slow = threading.Thread(target=lambda: list(stages.overlap(parts(2), lambda _: release.wait(20), same, same)))
    slow.start()
    try:
        assert [result for _, result in stages.overlap(parts(3), start, same, same)] == [0, 2, 4]
        assert list(stages.one_by_one(parts(1), start, same, same)) == [(range(2), 0)]
    finally:
        release.set()
        slow.join()


def consume(stages: Stages) -> None:
    list(stages.overlap(parts(3), start, same, same))


@pytest.mark.parametrize("concurrent", [False, True])
def test_threads_end(concurrent: bool) -> None:
    """No thread outlives the stages, nor the calling thread's threads the calling thread, failed calls included."""
    before = set(ours())
    stages = Stages(concurrent=concurrent)
    for _ in range(3):
        list(stages.overlap(parts(3), start, same, same))
        with pytest.raises(CustomError):
            list(stages.overlap(parts(9), explode, same, same))
    mine = set(ours()) - before
    assert len(mine) == 1 + concurrent
    caller = threading.Thread(target=consume, args=(stages,))
    caller.start()
    caller.join()
    assert all_ended(list(set(ours()) - before - mine))
    assert all(thread.is_alive() for thread in mine)
    del stages
    assert all_ended(list(mine))


def test_results_that_nobody_takes() -> None:
    """When the caller lets the results go, no further part is begun, and nothing waits for the model."""
    begun: list[int] = []
    go_on = threading.Event()

    def model(number: int) -> int:
        assert number == 0 or go_on.wait(20)
        return number

    stages = Stages()
    results = stages.overlap(parts(100), lambda part: begun.append(part.start) or part.start, model, same)
    next(results)
    results.close()
    assert begun == list(range(0, 2 * DEPTH, 2))
    go_on.set()
    assert [result for _, result in stages.overlap(parts(2), start, same, same)] == [0, 2]  # behind what ran
    assert begun == list(range(0, 2 * DEPTH, 2))


def test_results_collected_in_a_stage() -> None:
    """Results that Python collects in the very thread that works for them hold nothing up."""
    stages, collect = Stages(), threading.Event()

    def model(number: int) -> int:
        if number and collect.wait(20):
            gc.collect()
        return number

    done: list[int] = []

    def call() -> None:
        kept: list[Any] = [stages.overlap(parts(100), start, model, same)]
        next(kept[0])
        kept.append(kept)  # a cycle, which the collection alone ends
        del kept
        collect.set()
        done.extend(number for _, number in stages.overlap(parts(2), start, same, same))

    caller = threading.Thread(target=call, daemon=True)
    gc.disable()
    try:
        caller.start()
        caller.join(20)
    finally:
        gc.enable()
    assert done == [0, 2]


# ---------------------------------------------------------------- a predictor in parts


@pytest.fixture(scope="module")
def model_ref(ray_session: None) -> ModelRef:
    """Share a model that adds one."""
    return prepare_model_for_actors(predictors.adds_one())


def numbers(count: int = 23) -> pa.Table:
    """Return a batch of two chunks."""
    table = pa.table({"x": pa.array(range(count)), "s": [str(n) for n in range(count)]})
    return pa.concat_tables([table.slice(0, 5), table.slice(5)])


@pytest.mark.parametrize("size", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("form", ["record_batch", "arrays", "bf16", "bf16_list"])
def test_the_same_as_without(form: str, size: int, model_ref: ModelRef) -> None:
    """Micro-batches of any size give the table that the whole batch gives, schema included."""
    columns = ["y", "name"] if form == "arrays" else ["y"]  # its "z" counts within the batch that it sees
    whole = Formats(form=form, model_ref=model_ref)(numbers()).select(columns)
    split = Formats(form=form, model_ref=model_ref, micro_batch_size=size)(numbers()).select(columns)
    assert split.schema == whole.schema
    assert split.equals(whole)


def test_the_same_as_without_for_pandas_and_empty_batches(model_ref: ModelRef) -> None:
    """Data frames are joined with one index, and a batch without rows is one part."""
    whole = Formats(form="pandas", model_ref=model_ref)(numbers())
    pd.testing.assert_frame_equal(Formats(form="pandas", model_ref=model_ref, micro_batch_size=4)(numbers()), whole)
    assert AddOne(model_ref, micro_batch_size=4)(numbers(0).cast(numbers().schema)).column_names == ["x", "s", "y"]


def test_bit_equal_with_several_threads(ray_session: None) -> None:
    """Sums that depend on the number of threads come out bit for bit the same, overlapped or not."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    ref = prepare_model_for_actors(nn.Sequential(nn.Linear(700, 300), nn.GELU(), nn.Linear(300, 50)))
    x = np.random.default_rng(0).normal(size=(64, 700)).astype(np.float32)
    batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 700)})
    options = {"input_columns": "x", "output_column": "y", "keep_columns": False}
    try:
        torch.set_num_threads(2)
        serial = [ZeroCopyPredictor(ref, **options)(batch.slice(n, 16)) for n in range(0, 64, 16)]
        overlapped = ZeroCopyPredictor(ref, micro_batch_size=16, **options)(batch)
    finally:
        torch.set_num_threads(before)
    assert overlapped.equals(pa.concat_tables(serial))


def test_parts_of_different_types_are_a_generator(model_ref: ModelRef) -> None:
    """Parts whose columns differ in type, such as sequences padded for each part, go on one by one."""

    class Padded(AddOne):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            return {"y": torch.zeros(len(batch), int(batch["x"][-1].as_py()), 2)}

    rows = Padded(model_ref, micro_batch_size=10)(numbers())
    assert [part["y"].type.shape for part in rows] == [(9, 2), (19, 2), (22, 2)]


def test_generators_stay_lazy(model_ref: ModelRef) -> None:
    """What postprocess yields goes on as it is made: the first rows are there before the last part is begun."""
    begun: list[int] = []

    class Explodes(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            begun.append(batch["x"][0].as_py())
            return super().preprocess(batch)

        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            for y in outputs[:, 0]:
                assert torch.is_inference_mode_enabled()
                if y % 2:
                    yield {"y": y.repeat(2)}

    predictor = Explodes(model_ref, micro_batch_size=2)
    rows = predictor(numbers(40))
    assert next(rows)["y"].to_pylist() == [1.0, 1.0]
    assert len(begun) <= DEPTH + 1
    assert [part["y"][0].as_py() for part in rows] == [float(y) for y in range(3, 41, 2)]
    assert (predictor.totals.batches, predictor.totals.rows) == (1, 40)


def test_some_parts_are_generators(model_ref: ModelRef) -> None:
    """A postprocess that returns a generator for some parts only loses no rows, and keeps their order."""

    class Mixed(AddOne):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            rows = {"y": outputs[:, 0]}
            return (part for part in [rows]) if batch["x"][0].as_py() in self.lazily else rows

    for lazily in ([4, 8], [0]):
        predictor = Mixed(model_ref, micro_batch_size=4)
        predictor.lazily = lazily
        parts = list(predictor(numbers()))
        assert pa.concat_tables(parts)["y"].to_pylist() == [x + 1.0 for x in range(23)]
        assert predictor.totals.rows == 23


def test_an_error_names_the_rows(model_ref: ModelRef) -> None:
    """An error in a part is the user's own, with the rows, and the predictor goes on with the next batch."""

    class Fails(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            if 13 in batch["x"].to_pylist():
                raise KeyError("thirteen")
            return super().preprocess(batch)

    predictor = Fails(model_ref, micro_batch_size=5)
    with pytest.raises(KeyError, match="thirteen") as caught:
        predictor(numbers())
    assert "in rows 10 to 14 of the batch" in "".join(traceback.format_exception(caught.value))
    assert predictor(numbers(10)).num_rows == 10


def test_an_error_raised_again_names_the_last_rows(model_ref: ModelRef) -> None:
    """One exception object that several batches meet says where it was raised last, and keeps its own notes."""
    error = ValueError("the same object each time")
    add_note(error, "the user's own")

    class Fails(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            if batch["x"][0].as_py() == self.failing:
                raise error
            return super().preprocess(batch)

    predictor = Fails(model_ref, micro_batch_size=5)
    for predictor.failing in (0, 5):
        with pytest.raises(ValueError, match="the same object"):
            predictor(numbers())
    text = "".join(traceback.format_exception(error))
    assert [text.count(f"in rows {rows} of the batch") for rows in ("0 to 4", "5 to 9")] == [0, 1]
    assert "the user's own" in text


@pytest.mark.parametrize("size", [None, 4])
def test_errors_of_generators_and_stop_iteration(size: int | None, model_ref: ModelRef) -> None:
    """An error in a generator has its rows too, and a StopIteration ends the batch as a RuntimeError with them."""

    class Yields(AddOne):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            for x in batch["x"].to_pylist():
                if x == 7:
                    raise KeyError(x)
                yield {"x": [x]}

    class Stops(AddOne):
        def preprocess(self, batch: pa.Table) -> torch.Tensor:
            next(x for x in batch["x"].to_pylist() if x < 7)
            return super().preprocess(batch)

    for cls, error, rows in ((Yields, KeyError, "4 to 7"), (Stops, RuntimeError, "8 to 11")):
        with pytest.raises(error) as caught:
            list(cls(model_ref, micro_batch_size=size)(numbers(12).slice(0 if size else 7)))
        text = "".join(traceback.format_exception(caught.value))
        assert (f"in rows {rows} of the batch" in text) is (size is not None)
        assert error is KeyError or isinstance(caught.value.__cause__, StopIteration)


def test_an_error_on_ray_data_has_the_rows(model_ref: ModelRef) -> None:
    """What Ray Data shows of an error is the user's own, where it was raised, and the rows."""
    ds = ray.data.range(40, override_num_blocks=1).rename_columns({"id": "x"})
    bound = predictors.NoMultiplesOfSeven.using(model_ref, micro_batch_size=4)
    ds = ds.map_batches(bound, batch_size=None, compute=ActorPoolStrategy(size=1), num_cpus=0.1)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ds.take_all()
    assert "ValueError: 0 is a multiple of seven" in str(caught.value)
    assert "in rows 0 to 3 of the batch" in str(caught.value)
    assert "predictors.py" in str(caught.value)


def test_calls_from_several_threads(model_ref: ModelRef) -> None:
    """Concurrent calls of one predictor, split and not, give each its own rows; the model has one call at a time."""
    threads: set[int] = set()
    inside: list[int] = []

    class Watched(AddOne):
        def predict(self, inputs: torch.Tensor) -> torch.Tensor:
            threads.add(threading.get_ident())
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.001)
            inside.pop()
            return super().predict(inputs)

    for size in (None, 3):
        predictor = Watched(model_ref, micro_batch_size=size)
        with ThreadPoolExecutor(4) as pool:
            tables = list(pool.map(predictor, map(numbers, range(1, 20))))
        assert [table["y"].to_pylist() for table in tables] == [[x + 1.0 for x in range(n)] for n in range(1, 20)]
        assert predictor.totals.rows == sum(range(1, 20))
        assert size is None or len(threads) == 1
        threads.clear()


@pytest.mark.parametrize("truly", [False, True])
def test_concurrent_calls_on_ray_data(truly: bool, model_ref: ModelRef) -> None:
    """Several calls at once in one actor, with Ray Data's lock around them or without, lose and mix up nothing."""
    pool = ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=4, enable_true_multi_threading=truly)
    ds = ray.data.range(200, override_num_blocks=10).rename_columns({"id": "x"})
    ds = ds.map_batches(
        predictors.OneThread.using(model_ref, micro_batch_size=3),
        batch_size=10,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=0.1,
    )
    rows = ds.take_all()
    assert {row["x"]: row["y"] for row in rows} == {x: x + 1.0 for x in range(200)}
    assert len({row["thread"] for row in rows}) == 1


# ---------------------------------------------------------------- too little memory on the device


class Small(AddOne):
    """Stands for a device on which a number of rows fit."""

    fits = 6

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), len(inputs)]
        if len(inputs) > self.fits:
            raise torch.OutOfMemoryError(f"{len(inputs)} rows")
        return super().predict(inputs)


@pytest.mark.parametrize("size", [None, 16, 8])
def test_out_of_memory_halves(size: int | None, model_ref: ModelRef, caplog: pytest.LogCaptureFixture) -> None:
    """Too large a part is halved until it fits; the size is remembered, said once, and counted."""
    predictor = Small(model_ref, micro_batch_size=size)
    for _ in range(2):
        assert predictor(numbers(40))["y"].to_pylist() == [x + 1.0 for x in range(40)]
    fitting = {None: 5, 16: 4, 8: 4}[size]
    expected = [40, 20, 10] if size is None else [16, 8] if size == 16 else [8]
    assert [n for n in predictor.seen if n > 6][: len(expected)] == expected
    first_batch_tried = [n for n in predictor.seen if n > 6]
    assert predictor.totals.retries == len(expected)
    assert set(predictor.seen) - set(first_batch_tried) == {fitting}
    said = [record.message for record in caplog.records if "too little memory" in record.message]
    assert len(said) == 1
    assert f"micro_batch_size={fitting}" in said[0]
    predictor.seen = []
    predictor(numbers(40))
    assert max(predictor.seen) == fitting


def test_out_of_memory_in_a_short_part(model_ref: ModelRef) -> None:
    """Memory that is short in a last part of few rows splits that part, and later batches go on as they did."""

    class Briefly(Small):
        fits = 100

        def predict(self, inputs: torch.Tensor) -> torch.Tensor:
            self.fits = 2 if len(inputs) == 3 else 100
            return super().predict(inputs)

    predictor = Briefly(model_ref, micro_batch_size=8)
    for _ in range(2):
        predictor.seen = []
        assert predictor(numbers(19))["y"].to_pylist() == [x + 1.0 for x in range(19)]
        assert predictor.seen == [8, 8, 3, 1, 1, 1]


def test_out_of_memory_in_one_row(model_ref: ModelRef) -> None:
    """A row that does not fit by itself is torch's own error, at once or after halving."""

    class Tiny(Small):
        fits = 0

    for size in (None, 4):
        with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
            Tiny(model_ref, micro_batch_size=size)(numbers(8))


def test_an_error_after_out_of_memory(model_ref: ModelRef) -> None:
    """Another error in a retried part is not taken for want of memory."""

    class Fails(Small):
        def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
            raise RuntimeError("CUDA error: something else")

    with pytest.raises(RuntimeError, match="something else"):
        Fails(model_ref)(numbers(40))


# ---------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_overlap_on_a_gpu(ray_session: None) -> None:
    """Copies on streams of their own lose nothing: many batches come out as they do without micro-batches."""
    torch.manual_seed(0)
    ref = prepare_model_for_actors(nn.Sequential(nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 1000)))
    options = {"input_columns": "x", "output_column": "y", "keep_columns": False, "device": "cuda:0"}
    whole = ZeroCopyPredictor(ref, **options)
    split = ZeroCopyPredictor(ref, micro_batch_size=64, **options)
    random = np.random.default_rng(0)
    for rows in (1000, 63, 64, 513, 2000):
        x = random.normal(size=(rows, 1000)).astype(np.float32)
        batch = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 1000)})
        expected, got = (p(batch)["y"].combine_chunks().to_numpy_ndarray() for p in (whole, split))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_out_of_memory_on_a_gpu(ray_session: None) -> None:
    """A batch that the device has no memory for is split, for real."""

    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            free = torch.cuda.mem_get_info()[0]
            hold = torch.empty(
                int(free * len(x) / 10), dtype=torch.uint8, device=x.device
            )  # ten rows are all there is
            return x + hold[:1] * 0

    predictor = ZeroCopyPredictor(
        prepare_model_for_actors(Greedy()), input_columns="x", output_column="y", device="cuda:0"
    )
    table = predictor(pa.table({"x": np.arange(64, dtype=np.float32)}))
    assert table["y"].to_pylist() == [float(x) for x in range(64)]
    assert predictor.totals.retries >= 1
