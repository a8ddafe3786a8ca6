"""Methods of importable classes that a script has replaced: workers import the class, and get the original."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ..errors import warn
from .classes import functions_in
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
        if base.__module__ != "builtins" and travels_by_name(base.__module__):
            for attribute, module in _replaced(base, packages):
                warn(
                    f"{name} has a {base.__qualname__}, and {base.__qualname__}.{attribute} was replaced by a "
                    f"function of {module}. Workers import {base.__qualname__} from {base.__module__} with its own "
                    f"method. Write a subclass in your script, or replace the method in a module that workers can "
                    f"import, and pass imports=['that_module'] where the model is prepared."
                )


def _replaced(base: type, packages: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the attributes of a class that hold a function of one of the packages, and the module of each."""
    for attribute, held in list(vars(base).items()):
        modules = (str(function.__globals__.get("__name__", "")) for function in functions_in(held))
        module = next((module for module in modules if module.partition(".")[0] in packages), None)
        if module is not None:
            yield attribute, module
