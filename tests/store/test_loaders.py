"""Models that a worker loads: the driver never has them, errors come back, and a lost model is loaded again."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from known_objects import settled_store, wait_for_store
from torch import nn

from ray_zerocopy import (
    ModelLostError,
    ModelRef,
    ZeroCopyError,
    ZeroCopyPredictor,
    get_model,
    list_models,
    load_model_in_actor,
    memory,
    prepare_model_for_actors,
    prepare_model_from,
    remove_model,
)

NAMESPACE = "ray_zerocopy"


def filled(value: float, record: Path | None = None) -> nn.Module:
    """Return a module whose weights are all `value`, 4 MB; note in a file that it was made."""
    if record is not None:
        with open(record, "a") as file:
            file.write(f"{os.getpid()}\n")
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)])
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def load_value(model_ref: ModelRef) -> float:
    model = load_model_in_actor(model_ref)
    low, high = model[0].weight.min().item(), model[-1].weight.max().item()
    return low if low == high else float("nan")


def load_kept(kept: dict[str, Any], model_ref: ModelRef) -> float:
    kept["model"] = load_model_in_actor(model_ref)
    return kept_value(kept)


def kept_value(kept: dict[str, Any]) -> float:
    return kept["model"][0].weight.min().item()


def names() -> set[str]:
    return {found["name"] for found in ray.util.list_named_actors(all_namespaces=True)}


def pid_of_owner(name: str) -> int:
    owner = ray.get_actor(name, namespace=NAMESPACE)
    return ray.get(owner.describe_model.remote())["version"]["pid"]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[], list[int]]:
    """Return a function that returns the processes in which the loader of this test ran."""
    record = tmp_path / "made"
    return lambda: [int(line) for line in record.read_text().split()] if record.exists() else []


# ---------------------------------------------------------------- loads


@pytest.mark.parametrize("options", [{}, {"name": "loaded"}], ids=["unnamed", "named"])
def test_a_worker_loads(
    options: dict[str, Any], made: Callable[[], list[int]], tmp_path: Path, two_actors: list[Any]
) -> None:
    """The loader runs once, in another process, and every process loads the result from the same pages."""
    load = functools.partial(filled, 3.0, tmp_path / "made")
    model_ref = prepare_model_from(load, **options)
    assert len(made()) == 1
    assert made()[0] != os.getpid()
    assert (model_ref.class_name, model_ref.nbytes, model_ref.tensors) == ("Sequential", 4 << 20, 4)
    assert ray.get([actor.run.remote(load_value, model_ref) for actor in two_actors]) == [3.0, 3.0]
    assert memory.model_memory(model_ref).private == 0
    assert memory.location(load_model_in_actor(model_ref)[0].weight) is not None


def test_a_small_model_is_in_the_store(ray_session: None) -> None:
    """A model so small that Ray would send it by value is in the store too, and its pages are shared."""
    model_ref = prepare_model_from(functools.partial(nn.Linear, 8, 8))
    assert memory.model_memory(model_ref).private == 0


def test_two_at_the_same_moment(made: Callable[[], list[int]], tmp_path: Path, two_actors: list[Any]) -> None:
    """Processes that prepare one name at the same moment load once; the list names the loader."""
    load = functools.partial(filled, 4.0, tmp_path / "made")
    for number in range(3):
        name = f"race {number}"
        prepare = functools.partial(prepare_model_from, load, name=name, lifetime="detached", get_if_exists=True)
        handles = ray.get([actor.run.remote(prepare) for actor in two_actors])
        assert len(set(handles)) == 1
        assert len(made()) == number + 1
        assert load_value(handles[0]) == 4.0
        (listed,) = [model for model in list_models() if model.name == name]
        assert listed.loader is not None
        assert listed.loader.startswith("filled(4.0, ")
        remove_model(name)


# ---------------------------------------------------------------- bad loaders


def missing() -> Any:
    raise FileNotFoundError(2, "no such checkpoint", "weights.safetensors")


class Refusal(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def refuse() -> Any:
    raise Refusal("an error that cannot travel")


def nothing() -> None:
    return None


def a_number() -> Any:
    return 3


def die() -> Any:
    os._exit(3)


def never() -> Any:
    time.sleep(600)


def huge() -> Any:
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.empty(1, 300 << 20))
    return model


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (missing, {}, FileNotFoundError, "no such checkpoint"),
    (refuse, {}, ZeroCopyError, r"(?s)loader refuse\(\) failed.*an error that cannot travel"),
    (nothing, {}, TypeError, r"loader nothing\(\) returned None"),
    (a_number, {}, TypeError, r"loader a_number\(\) returned an object without tensors: int"),
    (functools.partial(nn.Linear, 2, 2, device="meta"), {}, ValueError, "meta device"),
    (huge, {}, ZeroCopyError, r"1\.2 GiB.*holds 1\.0 GiB"),
    (die, {"max_retries": 0}, ZeroCopyError, r"loader die\(\) did not finish, because its worker died"),
    (never, {"timeout": 1}, TimeoutError, r"loader never\(\) did not return within 1 s"),
]


# `die` and `never` each end a worker, which takes seconds to replace: each runs in one of the two ways.
WAYS = [(*bad, named) for named in (False, True) for bad in BAD if bad[0] is not (never, die)[named]]


@pytest.mark.parametrize(("load", "options", "error", "words", "named"), WAYS)
def test_a_loader_that_fails(
    load: Any, options: dict[str, Any], error: type[Exception], words: str, named: bool, ray_session: None
) -> None:
    """What a loader raises is raised here, with the loader named; nothing is left, neither bytes nor a name."""
    before = settled_store()
    with pytest.raises(error, match=words) as raised:
        prepare_model_from(load, **options, **({"name": "bad", "lifetime": "detached"} if named else {}))
    if error is FileNotFoundError:
        assert raised.value.filename == "weights.safetensors"
        assert "loader missing()" in str(raised.value.__cause__)
    assert "bad" not in names()
    assert wait_for_store(lambda used: used <= before) <= before


def slowly(value: float, started: Path) -> nn.Module:
    started.touch()
    time.sleep(4)
    return filled(value)


def replace_slowly(started: Path) -> None:
    load = functools.partial(slowly, 5.0, started)
    prepare_model_from(load, name="given up", lifetime="detached", replace=True)


def test_a_load_that_was_given_up(ray_session: None, tmp_path: Path) -> None:
    """After Ctrl-C a loader that still runs changes nothing, neither the model that was there nor the next one."""
    first = prepare_model_for_actors(filled(1.0), name="given up", lifetime="detached")
    waiting = ray.remote(num_cpus=0.1, max_retries=0)(replace_slowly).remote(tmp_path / "started")
    while not (tmp_path / "started").exists():
        time.sleep(0.1)
    ray.cancel(waiting)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(waiting)
    assert load_value(first) == 1.0
    again = prepare_model_for_actors(filled(2.0), name="given up", lifetime="detached", replace=True)
    time.sleep(5)
    assert load_value(again) == 2.0
    assert load_value(get_model("given up")) == 2.0
    remove_model("given up")


def filled_unless(value: float, record: Path, broken: Path) -> nn.Module:
    if broken.exists():
        raise RuntimeError("the hub is down")
    time.sleep(1)
    return filled(value, record)


def test_many_ask_after_a_failed_reload(made: Callable[[], list[int]], tmp_path: Path, ray_session: None) -> None:
    """A loader that failed when it ran again runs once for all processes that ask next."""
    load = functools.partial(filled_unless, 3.0, tmp_path / "made", tmp_path / "broken")
    model_ref = prepare_model_from(load, name="failed once", lifetime="detached", num_cpus=0.1)
    assert len(made()) == 1
    (tmp_path / "broken").touch()
    os.kill(pid_of_owner("failed once"), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ray.exceptions.RayError):
            owner = ray.get_actor("failed once", namespace=NAMESPACE)
            if ray.get(owner.describe_model.remote(False))["status"] == "failed":
                break
        time.sleep(0.1)
    (tmp_path / "broken").unlink()
    ask = ray.remote(num_cpus=0.1)(load_value)
    assert ray.get([ask.remote(model_ref) for _ in range(4)]) == [3.0] * 4
    assert len(made()) == 2
    remove_model("failed once")


def test_a_next_version_that_fails(ray_session: None) -> None:
    """If the loader of the next version fails, the version before stays."""
    model_ref = prepare_model_from(functools.partial(filled, 1.0), name="stays")
    with pytest.raises(FileNotFoundError):
        prepare_model_from(missing, name="stays", replace=True)
    assert load_value(model_ref) == 1.0


@pytest.mark.parametrize(
    ("load", "options", "error", "words"),
    [
        (nn.Linear(2, 2), {}, TypeError, r"a Linear was given.*prepare_model_for_actors\(model\)"),
        ("bert-base", {}, TypeError, "needs a function without arguments.*'bert-base'"),
        (nn.Linear, {}, TypeError, r"loader Linear is called without arguments, but: missing.*functools\.partial"),
        (functools.partial(filled, bytes(9 << 20)), {}, ValueError, r"carries 9\.0 MiB.*8\.0 MiB are the limit"),
        (functools.partial(filled, threading.Lock()), {}, TypeError, r"loader filled.* cannot be sent to a worker"),
        (nothing, {"timeout": 0}, ValueError, "timeout=0"),
        (nothing, {"num_replicas": 2}, TypeError, "no option 'num_replicas'.*max_retries"),
    ],
)
def test_what_is_no_loader(load: Any, options: dict[str, Any], error: type, words: str, ray_session: None) -> None:
    """What cannot be a loader is refused at once, in the driver."""
    with pytest.raises(error, match=words):
        prepare_model_from(load, **options)


# ---------------------------------------------------------------- owners that end


def kill(name: str) -> None:
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def kill_process(name: str) -> None:
    os.kill(pid_of_owner(name), signal.SIGKILL)


@pytest.mark.parametrize("end", [kill, kill_process])
def test_an_owner_that_is_killed(end: Callable[[str], None], two_actors: list[Any]) -> None:
    """Loaded models go on. With a loader the model is loaded again; without one, the error names the cause."""
    loaded = prepare_model_from(functools.partial(filled, 5.0), name="comes back", lifetime="detached")
    sent = prepare_model_for_actors(filled(6.0), name="is lost", lifetime="detached")
    assert ray.get(two_actors[0].run_kept.remote(load_kept, loaded)) == 5.0
    assert ray.get(two_actors[1].run_kept.remote(load_kept, sent)) == 6.0
    pid = pid_of_owner("is lost")
    end("comes back")
    end("is lost")
    assert ray.get([actor.run_kept.remote(kept_value) for actor in two_actors]) == [5.0, 6.0]
    assert ray.get([actor.run.remote(load_value, loaded) for actor in two_actors]) == [5.0, 5.0]
    assert load_value(loaded) == load_value(get_model("comes back")) == 5.0
    with pytest.raises(
        ModelLostError, match=rf"'is lost'.*process {pid} .*was killed.*no loader.*prepare_model_from"
    ):
        load_model_in_actor(sent)
    assert load_value(prepare_model_for_actors(filled(7.0), name="is lost", lifetime="detached")) == 7.0
    remove_model("comes back")
    remove_model("is lost")


class Slow(ZeroCopyPredictor):
    def preprocess(self, batch: Any) -> Any:
        time.sleep(0.3)
        return torch.zeros(len(batch), 512)

    def postprocess(self, outputs: torch.Tensor, batch: Any) -> Any:
        value = self.model[0].weight.min().item()
        return {"value": np.full(len(batch), value), "pid": np.full(len(batch), os.getpid())}


def test_an_owner_killed_under_a_pool(ray_session: None) -> None:
    """A running map_batches goes on when the owner is killed, and a worker that dies then loads the model again."""
    model_ref = prepare_model_from(functools.partial(filled, 8.0), name="pool", lifetime="detached")
    dataset = ray.data.range(16, override_num_blocks=16).map_batches(
        Slow.using(model_ref), batch_size=1, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.1
    )
    values, pids = [], []
    for row in dataset.iter_rows():
        values.append(row["value"])
        pids.append(row["pid"])
        if len(values) == 2:
            kill("pool")
            os.kill(pids[0], signal.SIGKILL)
    assert values == [8.0] * 16
    assert len(set(pids)) > 2
    remove_model("pool")
