"""The committed results of the benchmarks, and the tables and pictures that are made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as run_all  # noqa: E402
from benchmarks import pages  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_file_of_results_names_its_command(path: Path) -> None:
    """A file of results has the command of a script that exists, the versions and the machine."""
    found = json.loads(path.read_text())
    program, script, *_ = found["command"].split()
    assert program == "python"
    assert (ROOT / script).exists()
    assert {"ray", "torch"} <= found["versions"].keys()
    assert found["machine"]["cores"] >= 1
    assert found["summary"]


@pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.name)
def test_pages_agree_with_the_results(path: Path) -> None:
    """Each table of a page is what `python -m benchmarks pages` writes, and has results."""
    text = path.read_text()
    assert pages.page_with_results(text, run_all.RESULTS) == text
    for match in pages.BLOCK.finditer(text):
        assert (run_all.RESULTS / f"{pages.BLOCKS[match[2]][0]}.json").exists(), match[2]


def test_pictures(tmp_path: Path) -> None:
    """Each picture can be drawn from the committed results, and is committed."""
    drawn = {path.name for path in pages.draw(run_all.RESULTS, tmp_path)}
    assert drawn == {f"{name}.png" for name in pages.PICTURES}
    assert {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")} == drawn


@pytest.mark.parametrize("size", ["quick", "fit", "full"])
def test_the_arguments_of_all_benchmarks_are_known(size: str) -> None:
    """Each script takes the arguments that `python -m benchmarks` passes."""
    for name, arguments in run_all.commands(size).items():
        source = (ROOT / "benchmarks" / f"{name.partition('-')[0]}.py").read_text()
        for argument in arguments:
            assert not argument.startswith("--") or f'"{argument}"' in source, (name, argument)


def test_an_unknown_benchmark_is_refused() -> None:
    """`--only` with a name that is none lists the names."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "laod"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "laod" in done.stderr
    assert "task_overhead" in done.stderr
