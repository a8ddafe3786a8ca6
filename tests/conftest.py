"""One real local Ray for all tests, and two actors that run what a test hands them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A new Ray starts an idle worker for each CPU. The tests start many Rays, and need few of these workers.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Workers import what a test module defines by the module's name, so every folder of tests must be on their path.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *(str(path) for path in (Path(__file__).parent, *sorted(Path(__file__).parent.glob("*/")))),
        os.environ.get("PYTHONPATH", ""),
    ]
)

import pytest
import ray
import torch

# Files that take minutes start first, so that the processes of `pytest -n 2` end at about the same time.
SLOWEST = (
    "test_examples.py",
    "test_docs.py",
    "test_predictor.py",
    "test_actor.py",
    "test_loaders.py",
    "test_invoke.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Start a local Ray with more logical CPUs than any test's actors take."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; workers would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ray.init("local", num_cpus=16, include_dashboard=False, object_store_memory=1 << 30, logging_level="error")
    torch.set_num_threads(1)
    yield
    ray.shutdown()


class Runner:
    """An actor that runs functions and keeps what they leave in `self.kept`, so that tests can share it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.kept: dict[str, Any] = {}

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def run_kept(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.kept, *args)


@pytest.fixture(scope="session")
def two_actors(ray_session: None) -> list[Any]:
    """Start two actors in processes of their own."""
    remote = ray.remote(num_cpus=0.1)(Runner)
    actors = [remote.remote() for _ in range(2)]
    ray.get([actor.run.remote(int) for actor in actors])
    return actors
