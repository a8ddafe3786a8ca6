"""`python -m ray_zerocopy doctor` and `memory`, each under the conditions that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from no_proc import can_mount, hide_proc, mount_over
from run_script import run_python

from ray_zerocopy._cli.checks import Check, check_node
from ray_zerocopy._store import store_place

COMMAND = [sys.executable, "-W", "ignore", "-m", "ray_zerocopy"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200, check=False, env=env)


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


class Patient:
    """An actor that changes what its thread sees of the machine, and runs the checks there."""

    def without_proc(self) -> list[Check]:
        hide_proc()
        return check_node()

    def few_mappings(self, path: str) -> list[Check]:
        mount_over("/proc/sys/vm/max_map_count", path)
        return check_node()


def test_without_proc(ray_session: None) -> None:
    """Without /proc, isolation is a problem with the true reason, and no check raises."""
    if not can_mount():
        pytest.skip("needs the right to mount file systems")
    actor = ray.remote(num_cpus=0.1)(Patient).remote()
    found = named(ray.get(actor.without_proc.remote()))
    ray.kill(actor)
    assert found["isolation"].status == "problem"
    assert "no /proc file system" in found["isolation"].finding
    assert found["platform"].status == "problem"


def test_few_mappings(ray_session: None, tmp_path: Path) -> None:
    """A low limit of mappings is a warning with the limit and the command that raises it."""
    if not can_mount():
        pytest.skip("needs the right to mount file systems")
    (tmp_path / "limit").write_text("9000\n")
    actor = ray.remote(num_cpus=0.1)(Patient).remote()
    found = named(ray.get(actor.few_mappings.remote(str(tmp_path / "limit"))))
    ray.kill(actor)
    assert found["mappings"].status == "warning"
    assert "of 9000 mappings" in found["mappings"].finding
    assert "sysctl -w vm.max_map_count" in found["mappings"].remedy
    assert found["isolation"].status == "ok"


STORE_ON_DISK = """
import subprocess, sys
import ray
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, logging_level="error",
         _plasma_directory=sys.argv[1])
command = [sys.executable, "-W", "ignore", "-m", "ray_zerocopy", "doctor", "--address"]
done = subprocess.run([*command, ray.get_runtime_context().gcs_address], capture_output=True, text=True)
print(done.returncode, done.stdout, done.stderr)
"""


def test_a_store_on_disk(tmp_path: Path) -> None:
    """A store on a disk is a problem with the directory and the size, and the exit code is 1."""
    if store_place._file_system(str(tmp_path)) == "tmpfs":
        pytest.skip("the temporary directory is in memory")
    printed = run_python("-c", STORE_ON_DISK, str(tmp_path))
    assert printed.startswith("1 node ")
    assert "1 problem" in printed
    assert f"on a disk: 95.4 MiB in {tmp_path}" in printed


def test_an_untested_version(tmp_path: Path) -> None:
    """A version that was not tested is a warning with both versions, and the exit code is 0."""
    folder = tmp_path / "numpy-2.1.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.7\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = run("doctor", "--address", "local", "--json", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    ((_, checks),) = json.loads(done.stdout).items()
    found: dict[str, dict[str, Any]] = {check["name"]: check for check in checks}
    assert found["numpy"]["status"] == "warning"
    assert "2.1.7 is installed" in found["numpy"]["finding"]
    assert found["object store"]["status"] == found["isolation"]["status"] == "ok"


MEMORY = """
import subprocess, sys
import ray, torch
from ray_zerocopy import load_model_in_actor, prepare_model_for_actors
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
ref = prepare_model_for_actors(torch.nn.Linear(500, 500), name="scorer")
loaded = load_model_in_actor(ref)
address = ray.get_runtime_context().gcs_address
for arguments in ([], ["scorer"], ["other"]):
    command = [sys.executable, "-W", "ignore", "-m", "ray_zerocopy", "memory", *arguments, "--address", address]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.returncode, done.stdout, done.stderr, "====")
"""


def test_memory() -> None:
    """`memory` lists the named models, shows the processes of one, and names a model that does not exist."""
    listed, one, missing = run_python("-c", MEMORY).split("====")[:3]
    assert listed.startswith("0 scorer: Linear, 978.6 KiB")
    assert one.strip().startswith("0 ")
    assert "once in the object store" in one
    assert missing.strip().startswith("1 ")
    assert "'other'" in missing
    assert "Traceback" not in missing
