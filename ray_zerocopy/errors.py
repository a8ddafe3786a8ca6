"""The exceptions of this package beyond `TypeError` and `ValueError`, its warning, and its log."""

from __future__ import annotations

import logging
import sys
import warnings

__all__ = ["ModelLostError", "ModelTimeoutError", "ZeroCopyError", "ZeroCopyWarning", "log", "warn"]

_logger = logging.getLogger(__name__.partition(".")[0])


class ZeroCopyError(RuntimeError):
    """A promise of this package cannot be kept here. The message says what happened, where, and what to do."""


class ModelLostError(ZeroCopyError):
    """The model of a `ModelRef` is gone: its owner ended, or the handle is from another Ray session."""


class ModelTimeoutError(ZeroCopyError, TimeoutError):
    """A model did not arrive within the `timeout` that was given."""


class ZeroCopyWarning(UserWarning):
    """A model was loaded with less than this package promises. Given once per process and reason."""


def warn(message: str) -> None:
    """Give a `ZeroCopyWarning` that points at the line of the user's code."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "contextlib",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ZeroCopyWarning, stacklevel=level)


def log(line: str, level: int = logging.INFO) -> None:
    """Log a line. Without a handler it goes to standard error, which Ray shows in the driver."""
    if not _logger.hasHandlers() and _logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)
    _logger.log(level, line)
