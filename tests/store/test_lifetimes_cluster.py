"""On three nodes: a model larger than the head's store, and what is lost or loaded again when a node dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_script import run_json


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Run the script once."""
    script = Path(__file__).parent / "lifetimes_script.py"
    return run_json(script)


def test_a_small_head_node(found: dict[str, Any]) -> None:
    """A model of 115 MB is refused by the head's store of 80 MB, with the remedy; by name it goes to another node."""
    for words in ("110.0 MiB", "76.3 MiB", "381.5 MiB", 'name="..."', "prepare_model_from(load)"):
        assert words in found["too large"]
    assert found["large"] == [1.0, 1.0]
    assert found["head free"] == 80_000_000


def test_a_node_that_dies(found: dict[str, Any]) -> None:
    """Models with a loader are loaded again on another node, unnamed and named; loaded models go on."""
    assert found["owner on a dying node"]
    assert found["after"] == [2.0, 3.0]
    assert found["kept"] == 1.0


def test_lost_with_a_node(found: dict[str, Any]) -> None:
    """A model without a loader is lost with its owner's node, and the error says so and what helps."""
    named, unnamed = found["lost"]
    assert "'lost'" in named
    for text in (named, unnamed):
        assert "died" in text
        assert "node" in text.lower()
        assert "prepare_model_from(load, " in text
