"""What this package raises beyond `TypeError` and `ValueError`, and the one warning it gives."""

from __future__ import annotations

__all__ = ["ModelLostError", "ZeroCopyError", "ZeroCopyWarning"]


class ZeroCopyError(RuntimeError):
    """Say that a promise of this package cannot hold here: the message names the fact, where, and the remedy."""


class ModelLostError(ZeroCopyError):
    """Say that a `ModelRef` no longer leads to a model: its owner ended, or it is from another Ray session."""


class ZeroCopyWarning(UserWarning):
    """Say, once per process and reason, that a model loaded with less than was promised."""
