"""Methods of importable classes that a script has replaced: workers import the class, and get the original."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Iterator

from ..errors import warn
from .names import travels_by_name

__all__ = ["warn_of_replaced_methods"]


def warn_of_replaced_methods(name: str, kinds: Iterable[type], packages: Collection[str]) -> None:
    """Warn of methods that come from a module which workers cannot import.

    Args:
        name: What the warning calls the object that is shared.
        kinds: The classes of its parts.
        packages: The packages that workers cannot import, `__main__` among them.
    """
    classes = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    for base in classes:
        for attribute, function in _replaced(base, packages):
            module = function.__globals__["__name__"]
            warn(
                f"{name} has a {base.__qualname__}, and {base.__qualname__}.{attribute} was replaced by a function "
                f"of {module}. Workers import {base.__qualname__} from {base.__module__} with its own method. "
                f"Write a subclass in your script, or replace the method in a module that workers can import, and "
                f"pass imports=['that_module'] where the model is prepared."
            )


def _replaced(base: type, packages: Collection[str]) -> Iterator[tuple[str, types.FunctionType]]:
    for attribute, held in list(vars(base).items()):
        function: Callable[..., object] = getattr(held, "__func__", held)  # of a static or class method
        if not isinstance(function, types.FunctionType):
            continue
        package = str(function.__globals__.get("__name__", "")).partition(".")[0]
        if package in packages and travels_by_name(base.__module__):
            yield attribute, function
