"""A `BatchRunner` of a class that writes all three methods, as the tests of a batch's way need it."""

from __future__ import annotations

import torch

from ray_zerocopy._batch import defaults
from ray_zerocopy._batch.run import BatchRunner
from ray_zerocopy._batch.totals import Totals

__all__ = ["batch_runner"]


def batch_runner(name: str, *, few_shapes: bool = False) -> BatchRunner:
    """Return the runner of a class `name` whose model is on the CPU."""
    return BatchRunner(
        overridden={"preprocess", "predict", "postprocess"},
        name=name,
        device=torch.device("cpu"),
        dtypes=defaults.Dtypes(None, None),
        copy_streams=False,
        few_shapes=few_shapes,
        totals=Totals(name, 0.0, 0, 0),
    )
