"""On two nodes: one copy a node, one report over both, and what is said when a model's owner has died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_script import run_json


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Run the script once."""
    script = Path(__file__).parent / "cluster_script.py"
    return run_json(script)


def test_one_copy_a_node(found: dict[str, Any]) -> None:
    """Workers of one node see the same pages, those of another node other pages, all the same values."""
    one, two, three, four = found["loads"]
    assert one == two
    assert three == four
    assert one[0] != three[0]
    assert one[1] is not None
    assert three[1] is not None
    assert one[1] != three[1]
    assert one[2] == three[2]


def test_one_report_over_nodes(found: dict[str, Any]) -> None:
    """The report finds the processes of both nodes and counts the stored bytes once a node."""
    assert len(found["nodes"]) == 4
    assert len(set(found["nodes"])) == 2
    assert 2 * found["nbytes"] <= found["stored"] <= 2 * found["nbytes"] + 16384
    assert found["copies"] >= 4 * found["nbytes"]


def test_a_dead_owner(found: dict[str, Any]) -> None:
    """A node without a copy is told that the model is gone, and why; what was loaded before stays whole."""
    assert "no longer in the object store: OwnerDiedError" in found["lost"]
    assert "Prepare it in the driver" in found["lost"]
    assert found["kept"][0] == found["kept"][1]
