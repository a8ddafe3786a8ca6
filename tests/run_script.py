"""Run a script that starts clusters of its own in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_json", "run_python"]


def run_python(*arguments: str) -> str:
    """Run Python with arguments, fail if it does, and return what it prints."""
    command = [sys.executable, "-W", "ignore", *arguments]
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_json(script: Path, *arguments: str) -> dict[str, Any]:
    """Run a script, and return the last JSON object that it prints on a line of its own."""
    lines = [line for line in run_python(str(script), *arguments).splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1])
    return found
