"""The table from a type to the function that reduces its objects.

`modules.py`, `tensors.py`, `functions.py` and `resources.py` fill the table.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from .imports import Import
from .objects import has_default_reduce, reducer_for_object
from .script.identity import Scripts
from .training_wrappers import refusal_for

__all__ = [
    "Import",
    "Reduce",
    "Refusal",
    "Walk",
    "belongs_to_process",
    "has_default_reduce",
    "reducer_for",
    "reduces",
]


class Walk(Protocol):
    """The pickler of `graph.py`, as the reducers see it.

    Attributes:
        dispatch_table: The reducers that users and libraries registered with pickle.
        modules: The modules found so far.
        flagged_tensors: Tensors whose `requires_grad` is set after the load.
        opaque_modules: Modules whose class defines `__reduce__`, so that flags are set after the load.
        scripts: The TorchScript modules found so far.
        fixed_dtype_class: The name of a class whose tensors cannot be converted to another dtype; empty if none.
        fixed_dtype_ids: The ids of tensors whose dtype another tensor depends on.
        tensors_without_bytes: Tensors on the meta device, and parameters of lazy modules that never ran.
        runs_constructors: Whether unpickling calls code of the objects' classes, which may read tensors.
        imports: The modules and libraries to import before the object is rebuilt, by name.
        operators: The operators that graphs and scripts call, in the order of the walk.
        definitions: The operators that a script defines and its models call, by name.
        user_imports: Whether the user listed modules to import.
    """

    dispatch_table: Mapping[type, Any]
    modules: list[torch.nn.Module]
    flagged_tensors: list[torch.Tensor]
    opaque_modules: list[torch.nn.Module]
    scripts: Scripts
    fixed_dtype_class: str
    fixed_dtype_ids: set[int]
    tensors_without_bytes: list[torch.Tensor]
    runs_constructors: bool
    imports: dict[str, Import]
    operators: dict[str, None]
    definitions: dict[str, Any]
    user_imports: bool

    def pickle_error(self, part: object) -> Exception | None:
        """Pickle a part on trial. Return the exception that this raises, or None."""

    def is_reachable(self, part: object) -> bool:
        """Tell whether a part is held by the graph, not only by weak references."""


class Refusal(TypeError):
    """An object cannot travel.

    Attributes:
        remedy: A sentence. The message is the reason, as a clause about `it`.
        part: The object.
    """

    part: object = None

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


Reduce = Callable[[Any, Walk], Any]
_Reduce = TypeVar("_Reduce", bound=Reduce)
_reducers: dict[type, Reduce] = {}
_of_process: set[type] = set()


def reduces(kind: type, *, of_process: bool = False) -> Callable[[_Reduce], _Reduce]:
    """Register a function that reduces the instances of a class and of its subclasses.

    The function returns a value of `__reduce__`, or NotImplemented for pickle's default. With `of_process`, an
    instance belongs to a process, such as a lock, so another one in the worker may not take its place everywhere.
    """

    def register(function: _Reduce) -> _Reduce:
        _reducers[kind] = function
        if of_process:
            _of_process.add(kind)
        return function

    return register


def reducer_for(kind: type) -> Reduce | None:
    """Return the function registered for a class or the nearest of its bases. It may refuse the object."""
    refuse: Reduce | None = refusal_for(kind)
    if refuse is not None:
        return refuse
    if kind in copyreg.dispatch_table and not issubclass(kind, (torch.nn.Module, torch.Tensor)):
        return None  # a reducer that a user or a library registered
    registered = next((_reducers[base] for base in kind.__mro__ if base in _reducers), None)
    return registered or reducer_for_object(kind)


def belongs_to_process(kind: type) -> bool:
    """Tell whether instances of a class belong to a process, as locks and open files do."""
    return not _of_process.isdisjoint(kind.__mro__)
