"""The table of kinds: which function reduces an object of a type, filled by `modules.py` and `tensors.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from .script.identity import Scripts

__all__ = ["Reduce", "Walk", "has_default_reduce", "reducer_for", "reduces"]


class Walk(Protocol):
    """What a reducer may ask of the walk over an object graph, and tell it.

    Attributes:
        dispatch_table: The reducers that users and libraries registered with pickle.
        modules: The modules met so far.
        flagged: Tensors whose `requires_grad` is set after the load.
        opaque: Modules that their own `__reduce__` rebuilds, so that flags are set after the load.
        scripts: The TorchScript modules met so far.
        composed: The name of a class whose parts cannot become another dtype one by one.
        constructs: Whether an object is rebuilt by calling its class, which may read tensors.
    """

    dispatch_table: Mapping[type, Any]
    modules: list[torch.nn.Module]
    flagged: list[torch.Tensor]
    opaque: list[torch.nn.Module]
    scripts: Scripts
    composed: str
    constructs: bool

    def failure(self, part: object) -> Exception | None:
        """Try to pickle a part, and return what was raised, or None."""


Reduce = Callable[[Any, Walk], Any]
_Reduce = TypeVar("_Reduce", bound=Reduce)
_reducers: dict[type, Reduce] = {}


def reduces(kind: type) -> Callable[[_Reduce], _Reduce]:
    """Register a function that reduces the instances of a class and of its subclasses.

    The function returns what `__reduce__` may return, or NotImplemented for what pickle does by default.
    """

    def register(function: _Reduce) -> _Reduce:
        _reducers[kind] = function
        return function

    return register


def reducer_for(kind: type) -> Reduce | None:
    """Return the function registered for a class or the nearest of its bases."""
    return next((_reducers[base] for base in kind.__mro__ if base in _reducers), None)


def has_default_reduce(kind: Any) -> bool:
    """Tell whether pickle takes an instance's state, and the class says nothing else."""
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
