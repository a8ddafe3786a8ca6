"""Check the documentation: the names in it exist, and its fences and doctests run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from as_main import run_as_main

import ray_zerocopy

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(ray_zerocopy.__path__, "ray_zerocopy.") if not module.ispkg
)
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def fences(path: Path) -> list[str]:
    """Return the Python code fences of a document."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_all_names_what_is_there(name: str) -> None:
    """Each module has `__all__`, and defines each name in it."""
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in module.__all__)


def test_public_names_are_documented() -> None:
    """The README or a document mentions every public name of the top level."""
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert [name for name in ray_zerocopy.__all__ if name not in text] == []


def test_import_has_no_side_effects() -> None:
    """Importing starts neither Ray nor a thread, gives no warning, changes no logging, and does not import ray.data.

    The test runs under `-OO`, where functions have no docstrings.
    """
    script = """
import logging, sys, threading, warnings
import ray, torch
warnings.simplefilter("error")
filters, threads = list(warnings.filters), threading.enumerate()
import ray_zerocopy
state = [ray.is_initialized(), logging.getLogger("ray_zerocopy").handlers, "ray.data" in sys.modules]
sys.exit(state != [False, [], False] or warnings.filters != filters or threading.enumerate() != threads)
"""
    subprocess.run([sys.executable, "-OO", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str, ray_session: None) -> None:
    """The examples in the docstrings print the shown output."""
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if fences(d)], ids=lambda path: path.name)
def test_fences_run(path: Path, tmp_path: Path, ray_session: None) -> None:
    """The Python fences of a document run one after the other, as one script."""
    code = "\n".join(fences(path))
    script = tmp_path / "fences.py"
    script.write_text(code)
    run_as_main(script)
