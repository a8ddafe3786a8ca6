"""Zero-copy model loading for PyTorch in Ray: N workers on a node, one copy of the weights."""

from ._collector import put_off_to_import

with put_off_to_import("torch"):
    from . import actor, invoke, memory
    from ._store import ModelRef
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
