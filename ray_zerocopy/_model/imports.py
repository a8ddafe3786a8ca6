"""The modules and shared libraries that a worker imports before it rebuilds a model: the option `imports`."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..errors import ZeroCopyError, warn

__all__ = [
    "Import",
    "check_imports",
    "has_operator",
    "import_first",
    "is_library",
    "missing_operator_error",
]


class Import(NamedTuple):
    """A module or shared library to import before a model is rebuilt.

    Attributes:
        name: The name of the module, or the path of the library.
        reason: What needs it, for errors; empty if the user listed it.
        required: Whether the load fails without it. The code of eager models only may call an operator.
    """

    name: str
    reason: str = ""
    required: bool = True


def check_imports(imports: Iterable[Any]) -> list[Import]:
    """Check the option `imports`: names of modules, modules, or paths of shared libraries."""
    if isinstance(imports, (str, types.ModuleType)):
        imports = [imports]
    found = []
    for item in imports:
        name = item.__name__ if isinstance(item, types.ModuleType) else item
        name = str(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str):
            raise TypeError(f"imports has {item!r}. Give names of modules, or paths of shared libraries.")
        if name == "__main__":
            raise ValueError("imports has __main__, which no worker can import. Move the code to a module.")
        if is_library(name):
            if not os.path.isfile(name):
                raise ValueError(f"imports has {name!r}, and there is no such file.")
            name = os.path.abspath(name)
        elif name not in sys.modules and not _can_be_found(name):
            raise ValueError(f"imports has {name!r}, and this process cannot import it either.")
        found.append(Import(name))
    return found


def _can_be_found(name: str) -> bool:
    """Tell whether a module can be imported. Imports the packages above it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def is_library(name: str) -> bool:
    return os.sep in name or name.endswith((".so", ".dll", ".dylib"))


def import_first(model: str, imports: Iterable[Import], operators: Iterable[str]) -> None:
    """Import what a model needs, and check that its operators are there.

    Raises:
        ZeroCopyError: A module or a library is missing, or no module registers an operator.
    """
    for name, reason, required in imports:
        try:
            if is_library(name):
                torch.ops.load_library(name)  # type: ignore[no-untyped-call]
            elif name not in sys.modules:
                importlib.import_module(name)
        except Exception as error:
            why = f"it {reason}" if reason else "imports=[...] lists it"
            message = (
                f"{model}: {name} is to be imported before the model is loaded, because {why}, and this worker "
                f"cannot import it ({type(error).__name__}: {error}). Install it on the workers, or pass "
                f"runtime_env={{'working_dir': '.'}} or {{'py_modules': [...]}} to ray.init."
            )
            if required:
                raise ZeroCopyError(message) from error
            warn(message)
    for operator in operators:
        if not has_operator(operator):
            raise missing_operator_error(model, operator)


def has_operator(operator: str) -> bool:
    namespace, _, name = operator.partition("::")
    return hasattr(getattr(torch.ops, namespace), name)


def missing_operator_error(model: str, operator: str) -> ZeroCopyError:
    return ZeroCopyError(
        f"{model} cannot be loaded: it calls the operator {operator}, which this worker does not have. List the "
        f"module or the shared library that registers it where the model is prepared: "
        f"prepare_model_for_actors(model, imports=['that_module'])."
    )
