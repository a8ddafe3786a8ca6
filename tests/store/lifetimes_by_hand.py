"""Longer checks of models by name, to be run by hand: about four minutes on two quiet cores.

    python tests/store/lifetimes_by_hand.py

Two drivers prepare one name at the same moment, fifty times. Then a Serve app is rolled out three times.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[up]) for up in range(3))

import ray
import torch
from ray.cluster_utils import Cluster

from ray_zerocopy import get_model, load_model_in_actor, prepare_model_from, remove_model

RACES = 50


class Barrier:
    """Lets two drivers go at the same moment."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Any]] = {}

    async def wait(self, name: str) -> None:
        arrived = asyncio.get_running_loop().create_future()
        waiting = self.waiting.setdefault(name, [])
        waiting.append(arrived)
        if len(waiting) == 2:
            for other in waiting:
                other.set_result(None)
        await arrived


def load(record: str) -> torch.nn.Module:
    with open(record, "a") as file:
        file.write("loaded\n")
    return torch.nn.Linear(256, 256)


def race(address: str, record: str, number_of_driver: int) -> None:
    """Be one of the two drivers; print the seconds of each race."""
    ray.init(address=address, namespace=str(os.getpid()), logging_level="error", log_to_driver=False)
    barrier = ray.get_actor("barrier", namespace="races")
    seconds = []
    for number in range(RACES):
        name = f"race {number}"
        ray.get(barrier.wait.remote(name))
        begin = time.perf_counter()
        model_ref = prepare_model_from(
            functools.partial(load, record), name=name, lifetime="detached", get_if_exists=True
        )
        seconds.append(time.perf_counter() - begin)
        load_model_in_actor(model_ref)
        assert get_model(name) == model_ref
        ray.get(barrier.wait.remote(f"{name} is over"))
        if number % 2 == number_of_driver:
            remove_model(name)
    print(json.dumps(seconds))


def main() -> None:
    """Run both checks; raise AssertionError if one of them fails."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "object_store_memory": 200 << 20, "include_dashboard": False},
    )
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    barrier = ray.remote(num_cpus=0)(Barrier).options(name="barrier", namespace="races").remote()
    with tempfile.TemporaryDirectory() as folder:
        record = os.path.join(folder, "loads")
        command = [sys.executable, __file__, cluster.address, record]
        drivers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(2)]
        answers = [driver.communicate()[0] for driver in drivers]
        assert [driver.returncode for driver in drivers] == [0, 0]
        loads = Path(record).read_text().count("loaded")
    seconds = sorted(value for answer in answers for value in json.loads(answer.splitlines()[-1]))
    print(f"{RACES} races of two drivers: {loads} loads, median {seconds[RACES]:.2f} s, longest {seconds[-1]:.2f} s")
    assert loads == RACES
    del barrier
    ray.shutdown()
    cluster.shutdown()

    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("serve_script.py")), "3"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    print(f"three rollouts: at most {found['most']:.2f} versions in the store, afterwards {found['afterwards']}")
    assert found["rollouts"] == [1.0, 2.0, 3.0]
    assert found["most"] < 2.05


if __name__ == "__main__":
    if len(sys.argv) > 1:
        race(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
