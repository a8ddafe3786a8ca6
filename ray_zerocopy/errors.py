"""What this package raises beyond `TypeError` and `ValueError`, and the one warning it gives."""

from __future__ import annotations

import sys
import warnings

__all__ = ["ModelLostError", "ZeroCopyError", "ZeroCopyWarning", "warn"]


class ZeroCopyError(RuntimeError):
    """Say that a promise of this package cannot hold here: the message names the fact, where, and the remedy."""


class ModelLostError(ZeroCopyError):
    """Say that a `ModelRef` no longer leads to a model: its owner ended, or it is from another Ray session."""


class ZeroCopyWarning(UserWarning):
    """Say, once per process and reason, that a model loaded with less than was promised."""


def warn(message: str) -> None:
    """Give a `ZeroCopyWarning` that points at the line of the user's code that called this package."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "contextlib",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ZeroCopyWarning, stacklevel=level)
