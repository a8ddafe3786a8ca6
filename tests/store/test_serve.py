"""Ray Serve with models by name: an app from a config, replicas that die, rollouts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from run_script import run_json


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason='needs Ray Serve: pip install -e ".[serve]"')
def test_serve_from_a_config() -> None:
    """Replicas are killed and come back, though the process that prepared is gone; a rollout leaves one version."""
    script = Path(__file__).parent / "serve_script.py"
    found = run_json(script, "3")
    assert found["killed"]
    assert found["values"] == [1.0, 1.0]
    assert found["rollouts"] == [1.0, 2.0, 3.0]
    assert found["without owner"] == [3.0, 3.0]
    assert 1.9 < found["most"] < 2.05
    assert all(0.95 < used < 1.1 for used in found["afterwards"])
