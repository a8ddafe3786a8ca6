"""What a user writes. `.ci/run` type-checks this file with `mypy --strict` against the installed wheel."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray
import torch

from ray_zerocopy import (
    ModelRef,
    ZeroCopyPredictor,
    get_model,
    load_model_in_actor,
    memory,
    prefetch,
    prepare_model_for_actors,
    prepare_model_from,
)
from ray_zerocopy.actor import load_pipeline_in_actor, rewrite_pipeline_for_actors
from ray_zerocopy.arrow import column_to_tensor, tensor_to_column
from ray_zerocopy.invoke import call_model, rewrite_pipeline


class Sentiment(ZeroCopyPredictor):
    sort_by = "text"

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        return column_to_tensor(batch, "features")

    def postprocess(self, outputs: Any, batch: pa.Table) -> pa.Table:
        return batch.append_column("scores", tensor_to_column(outputs))


def run(model: torch.nn.Module) -> int:
    model_ref: ModelRef = prepare_model_for_actors(model, name="sentiment", lifetime="detached")
    other: ModelRef = prepare_model_from(lambda: model)
    predictor = Sentiment.using(model_ref, micro_batch_size="auto", device="cpu")
    ds = ray.data.range(10).map_batches(predictor, batch_format="pyarrow")
    loaded = load_model_in_actor(get_model("sentiment"), device="cpu", dtype=torch.bfloat16)
    skeleton, refs = rewrite_pipeline_for_actors({"a": model})
    pipeline = load_pipeline_in_actor(skeleton, refs)
    result = ray.get(call_model.options(num_cpus=0.5).remote(other, (torch.ones(2),), {}))
    stand_in = rewrite_pipeline(pipeline)
    nbytes: int = memory.model_memory(loaded).private + memory.pool_memory(model_ref).stored
    print(prefetch(model_ref).failed, result, stand_in, ds.count())
    return nbytes
