"""Run by test_serve.py: a Serve app from a config whose model is bound at import, replicas that die, and rollouts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from known_objects import store_used, wait_for_store
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

MODEL_BYTES = 30 << 20


def deploy(applications: list[dict[str, Any]]) -> None:
    """Deploy a config as `serve run config.yaml` does: Serve's controller imports the apps in a task."""
    _get_global_client().deploy_apps(ServeDeploySchema(applications=applications), _blocking=True)


def answers(name: str, count: int, wanted: float) -> dict[int, float]:
    """Ask an app until `count` replicas have answered with the wanted value; return what each of these said."""
    handle = serve.get_app_handle(name)
    said: dict[int, float] = {}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            pid, value = handle.remote().result(timeout_s=30)
        except Exception:  # a replica that was killed
            time.sleep(0.2)
            continue
        if value == wanted:
            said[pid] = value
        if len(said) >= count:
            break
    return said


class Sampler:
    """Notes the largest use of the store."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, store_used())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.most


def main(rollouts: int) -> None:
    """Print what the test looks at, as JSON."""
    here = str(Path(__file__).parent)
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
    ray.init("local", num_cpus=8, object_store_memory=400 << 20, runtime_env=environment, **options)
    serve.start(proxy_location="Disabled")
    found: dict[str, Any] = {}
    application = {"name": "import", "route_prefix": "/import", "import_path": "serve_app:app"}
    deploy([application])
    first = answers("import", 1, 1.0)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    again = answers("import", 1, 1.0)
    found["killed"] = not set(first) & set(again)
    found["values"] = [*first.values(), *again.values()]
    base = store_used()
    sampler = Sampler()
    found["rollouts"] = []
    for version in range(1, rollouts + 1):
        rollout = {"name": "rollout", "route_prefix": "/rollout", "import_path": "serve_app:rollout"}
        deploy([application, {**rollout, "args": {"value": version}}])
        found["rollouts"].append(max(answers("rollout", 1, float(version)).values()))
        # The replica of the version before has ended when its model is gone.
        used = wait_for_store(lambda used: used - base < 1.5 * MODEL_BYTES)
        found.setdefault("afterwards", []).append((used - base) / MODEL_BYTES)
    found["most"] = (sampler.stop() - base) / MODEL_BYTES
    # The owner is killed under the app: the replica goes on, and one that starts then loads the model again.
    ray.kill(ray.get_actor("rollout", namespace="ray_zerocopy"))
    before = answers("rollout", 1, float(rollouts))
    os.kill(min(before), signal.SIGKILL)
    after = answers("rollout", 1, float(rollouts))
    found["without owner"] = [*before.values(), *after.values()]
    found["killed"] &= not set(before) & set(after)
    print(json.dumps(found))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
