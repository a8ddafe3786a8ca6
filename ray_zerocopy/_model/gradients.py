"""Inference mode around code that may compute gradients, and the note on torch's errors about it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .tensors import map_tensors

__all__ = ["inference_context", "without_gradients"]

# In the messages of torch's errors for gradients of tensors that inference mode made.
_WORDS = ("nference tensor", "grad_fn", "requires_grad=False", "doesn't require grad", "does not require grad")


@contextlib.contextmanager
def inference_context(enabled: bool, remedy: str) -> Iterator[None]:
    """Run a block under `torch.inference_mode(enabled)`; without it, gradients are recorded as torch does by default.

    If it is enabled, an error of torch about gradients gets the note `remedy`.
    """
    with torch.inference_mode(enabled):
        try:
            yield
        except RuntimeError as error:
            if enabled and any(word in str(error) for word in _WORDS):
                _add_note(error, remedy)
            raise


def _add_note(error: RuntimeError, note: str) -> None:
    if note in (*getattr(error, "__notes__", ()), *error.args[1:]) or note in str(error):
        return
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.args = (f"{error}\n{note}", *error.args[1:])


def without_gradients(values: Any) -> Any:
    """Return `values` with each tensor in them detached from its gradient; see `map_tensors`."""
    return map_tensors(values, lambda tensor: tensor.detach() if tensor.requires_grad else tensor)
