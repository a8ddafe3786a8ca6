"""Zero-copy model loading for PyTorch in Ray: N workers on a node, one copy of the weights."""

import importlib
from typing import TYPE_CHECKING, Any

from ._model import startup
from ._model.gc_pause import pause_gc_to_import

with pause_gc_to_import("torch"):
    from . import actor, models
    from ._store.prefetch import prefetch
    from ._store.ref import ModelRef
    from .actor import (
        load_model_in_actor,
        load_pipeline_in_actor,
        prepare_model_for_actors,
        rewrite_pipeline_for_actors,
    )
    from .errors import ModelLostError, ModelTimeoutError, ZeroCopyError, ZeroCopyWarning
    from .models import get_model, list_models, prepare_model_from, remove_model

startup.note_imports_done()

if TYPE_CHECKING:
    from . import invoke, memory
    from .predictor import ZeroCopyPredictor


def __getattr__(name: str) -> Any:
    """Import what a worker does not need to load a model, on first use. It takes half of the import's time."""
    if name == "ZeroCopyPredictor":
        return importlib.import_module(".predictor", __name__).ZeroCopyPredictor
    if name in ("invoke", "memory"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ModelLostError",
    "ModelRef",
    "ModelTimeoutError",
    "ZeroCopyError",
    "ZeroCopyPredictor",
    "ZeroCopyWarning",
    "actor",
    "get_model",
    "invoke",
    "list_models",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "memory",
    "models",
    "prefetch",
    "prepare_model_for_actors",
    "prepare_model_from",
    "remove_model",
    "rewrite_pipeline_for_actors",
]
