"""Zero-copy model loading for PyTorch in Ray: N workers on a node, one copy of the weights."""

from ._model.gc_pause import gc_paused_to_import

with gc_paused_to_import("torch"):
    from . import actor, invoke, memory
    from ._store.ref import ModelRef
    from .actor import (
        load_model_in_actor,
        load_pipeline_in_actor,
        prepare_model_for_actors,
        rewrite_pipeline_for_actors,
    )
    from .errors import ModelLostError, ZeroCopyError, ZeroCopyWarning
    from .predictor import ZeroCopyPredictor

__all__ = [
    "ModelLostError",
    "ModelRef",
    "ZeroCopyError",
    "ZeroCopyPredictor",
    "ZeroCopyWarning",
    "actor",
    "invoke",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "memory",
    "prepare_model_for_actors",
    "rewrite_pipeline_for_actors",
]
