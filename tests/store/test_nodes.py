"""Several nodes: prefetch, locations, waits that speak, timeouts, and reports after a node's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_script import run_json


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Run the script once."""
    script = Path(__file__).parent / "nodes_script.py"
    return run_json(script)


def test_prefetch_brings_every_byte_once(found: dict[str, Any]) -> None:
    """A node receives all bytes at its first prefetch, and none at the next; the result names possible sources."""
    ids, results = found["ids"], found["prefetched"]
    ((node, nbytes, sources, error),) = results["zone b"]
    assert (node, sources, error) == (ids["second"], [ids["head"]], None)
    assert nbytes >= found["nbytes"]
    assert results["again"] == [[ids["second"], 0, [], None]]
    ((node, nbytes, sources, error),) = results["third"]
    assert (node, sorted(sources), error) == (ids["third"], sorted([ids["head"], ids["second"]]), None)
    assert {node: nbytes for node, nbytes, *_ in results["all"]} == dict.fromkeys(
        (ids["head"], ids["second"], ids["third"]), 0
    )
    assert "1 of 1 nodes have the model" in found["table"]
    assert ids["third"] in found["table"]


def test_locations(found: dict[str, Any]) -> None:
    """A handle tells which nodes have the model, before and after a prefetch."""
    ids = found["ids"]
    assert found["objects"] >= 3
    assert found["before"] == [ids["head"]]
    assert found["complete"] == sorted([ids["head"], ids["second"], ids["third"]])
    assert found["partial"] == []


def test_models_of_several_objects_arrive_whole(found: dict[str, Any]) -> None:
    """The numbers of a model of several objects are equal on every node."""
    assert found["sums"] == [found["sum"], found["sum"]]


@pytest.mark.parametrize(
    ("case", "facts"),
    [
        ("unknown", ["ValueError", "f" * 56, "not nodes of this cluster"]),
        ("negative", ["ValueError", "timeout=-1"]),
        ("not a number", ["TypeError", "'soon'"]),
        ("no match", ["ValueError", "TPU"]),
        ("not a handle", ["TypeError", "ObjectRef"]),
        ("bad nodes", ["TypeError", "nodes=3"]),
    ],
)
def test_bad_input_of_prefetch(found: dict[str, Any], case: str, facts: list[str]) -> None:
    """An error of prefetch names what was given."""
    assert all(fact in found["errors"][case] for fact in facts), found["errors"][case]


def test_a_wait_speaks_and_ends(found: dict[str, Any]) -> None:
    """A load that waits for a frozen owner logs that once, raises at its timeout, and goes on when the owner does."""
    said, lines = found["timeout"]
    assert said.startswith("True ")
    assert "timeout=4 s" in said
    assert "does not answer" in said
    assert len(lines) == 1
    assert "after 1 s" in lines[0]
    assert found["at once"][0].startswith("True ")
    assert found["at once"][1] == []
    outcome, lines = found["thawed"]
    assert outcome == "loaded"
    assert len(lines) == 1


def test_a_dead_node(found: dict[str, Any]) -> None:
    """A dead node is refused by name, and the others are prefetched to and reported on."""
    ids = found["ids"]
    assert ids["third"] in found["after death"]
    assert "dead" in found["after death"]
    nodes, unanswered, _ = found["pool"]
    assert ids["third"] not in nodes
    assert unanswered == []
    assert dict(found["alive"]) == {ids["head"]: None, ids["second"]: None}


def test_a_store_that_is_too_small(found: dict[str, Any]) -> None:
    """A model that is larger than a node's store is an error of that node, with both sizes and the difference."""
    ((node, error),) = found["too small"]
    assert node == found["ids"]["small"]
    assert all(fact in error for fact in ("90.0 MiB", "76.3 MiB", "13.7 MiB"))


def test_a_received_model_on_disk(found: dict[str, Any]) -> None:
    """A load from a file on disk, on a node that received the model into a full store, warns with the sizes."""
    (said,) = found["on disk"]
    assert "Linear (40.0 MiB) is in a file on disk in /" in said
    assert "has 60.0 MiB of 76.3 MiB in use" in said
