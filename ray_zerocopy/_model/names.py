"""What a worker finds by importing a module, and what travels by value because it lives in this process only."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickletools
import sys
import threading
import types
from collections.abc import Collection, Iterator
from typing import Any

from ray.cloudpickle import cloudpickle

from ..errors import ZeroCopyError

__all__ = [
    "ByValueModules",
    "is_found_by_name",
    "is_importable_global",
    "missing_name_error",
    "pickle_modules_by_value",
    "pickled_names",
    "travels_by_name",
]

# transformers imports the code of trust_remote_code from a folder that only this process has on its path.
_DYNAMIC_PACKAGES = {"transformers_modules", "diffusers_modules"}


def is_found_by_name(obj: Any) -> bool:
    """Tell whether a worker finds `obj` by importing its module."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or not _travels_by_name(module):
        return False
    name = getattr(obj, "__qualname__", None)  # what functools.lru_cache makes of a partial has none
    if not isinstance(name, str):
        return False
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is obj


def is_importable_global(module: str, name: str, value: object) -> bool:
    """Tell whether a worker finds a global by importing its module."""
    found = sys.modules.get(module)
    return found is not None and getattr(found, name, None) is value and _travels_by_name(found)


def travels_by_name(module: str) -> bool:
    """Tell whether an imported module travels by name, not by value."""
    found = sys.modules.get(module)
    return found is not None and _travels_by_name(found)


def _travels_by_name(module: types.ModuleType) -> bool:
    if module.__name__ == "__main__" or not _can_be_imported(module.__name__.partition(".")[0]):
        return False
    if _is_generated(module.__name__):
        return False
    return bool(cloudpickle._should_pickle_by_reference(module))


# ---------------------------------------------------------------- modules of this process only


_importable: dict[str, bool] = {}


def _can_be_imported(package: str) -> bool:
    """Tell whether a new process with this one's path could import a package that this process has imported."""
    known = _importable.get(package)
    if known is None:
        known = _importable[package] = package not in _DYNAMIC_PACKAGES and _is_on_path(package)
    return known


def _is_on_path(package: str) -> bool:
    if package in sys.stdlib_module_names or package not in sys.modules:
        return True
    try:
        return any(
            finder.find_spec(package, None) is not None for finder in sys.meta_path if hasattr(finder, "find_spec")
        )
    except Exception:  # a finder of somebody else's
        return True


_generated: dict[str, bool] = {}


def _is_generated(module: str) -> bool:
    """Tell whether a module of a package was made at run time, from a source file that is not in the package.

    Example: torch_geometric writes a module for each `Sequential`, whose name has a random part.
    """
    known = _generated.get(module)
    if known is None and module in sys.modules:
        known = _generated[module] = _has_foreign_file(module)
    return bool(known)


def _has_foreign_file(name: str) -> bool:
    package = sys.modules.get(name.rpartition(".")[0])
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    folders = getattr(package, "__path__", None)
    if folders is None or not file.endswith(".py") or any(file.startswith(folder + os.sep) for folder in folders):
        return False
    try:
        found = [f.find_spec(name, folders) for f in sys.meta_path if hasattr(f, "find_spec")]
    except Exception:  # a finder of somebody else's
        return False
    return not any(found)


class ByValueModules:
    """The packages that travel by value while `pickle_modules_by_value` runs."""

    def __init__(self) -> None:
        self._checked: set[str] = {"builtins", "torch", "transformers"}
        self._added: list[str] = []

    def check(self, module: str | None) -> None:
        """Let a module travel by value if it belongs to a package that a worker could not import."""
        package = module.partition(".")[0] if isinstance(module, str) else "builtins"
        if package not in self._checked:
            self._checked.add(package)
            if package != "__main__" and not _can_be_imported(package):
                self.add(package)
        if isinstance(module, str) and module not in self._checked:
            self._checked.add(module)
            if package not in self._added and _is_generated(module):
                self.add(module)

    def add(self, name: str) -> None:
        with _lock:
            if name not in _uses and name in cloudpickle._PICKLE_BY_VALUE_MODULES:
                return  # registered by the user
            _uses[name] += 1
            cloudpickle._PICKLE_BY_VALUE_MODULES.add(name)
        self._added.append(name)

    def names(self) -> set[str]:
        """Return the packages of which a worker finds nothing by name."""
        return {"__main__", *self._added}

    def remove_all(self) -> None:
        with _lock:
            for name in self._added:
                _uses[name] -= 1
                if not _uses[name]:
                    del _uses[name]
                    cloudpickle._PICKLE_BY_VALUE_MODULES.discard(name)


_uses: collections.Counter[str] = collections.Counter()  # of names that this package added to Ray's registry
_lock = threading.Lock()


@contextlib.contextmanager
def pickle_modules_by_value() -> Iterator[ByValueModules]:
    """Let modules travel by value in this block. Modules registered with the package `cloudpickle` do so too.

    Ray has its own copy of cloudpickle, with its own registry.
    """
    modules = ByValueModules()
    try:
        for name in getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", set)():
            modules.add(name)
        yield modules
    finally:
        modules.remove_all()


def pickled_names(data: bytes, packages: Collection[str]) -> Iterator[str]:
    """Yield the names by which pickles in `data` refer to objects of some packages."""
    if not any(package.encode() in data for package in packages):
        return
    stream, memo, pushed = io.BytesIO(data), [], ["", ""]
    while stream.tell() < len(data):
        argument: Any
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "MEMOIZE":
                memo.append(pushed[-1])
            elif operation.name == "STACK_GLOBAL":
                if pushed[0].partition(".")[0] in packages:
                    yield ".".join(pushed)
                pushed = [pushed[-1], ""]
            elif operation.name.endswith("BINGET"):
                pushed = [pushed[-1], memo[argument]]
            elif operation.name != "FRAME":
                pushed = [pushed[-1], argument if isinstance(argument, str) else ""]


# ---------------------------------------------------------------- what a worker does not find


def missing_name_error(model: str, module: str, name: str, error: Exception) -> ZeroCopyError:
    """Return the error for a class or function of a model that this process does not find.

    An empty `name` means the module itself.
    """
    wanted = f"{module}.{name}" if name else f"the module {module}"
    package = module.partition(".")[0]
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing != module and not module.startswith(f"{missing}."):
        return ZeroCopyError(
            f"{model} cannot be loaded: it needs {wanted}, and importing {module} failed in this worker: there is no "
            f"module {missing!r}. Install it on the workers, for example with runtime_env={{'pip': [{missing!r}]}}."
        )
    if missing:
        return ZeroCopyError(
            f"{model} cannot be loaded: it needs {wanted}, and this worker cannot import {missing}. Give workers the "
            f"module: ray.init(runtime_env={{'working_dir': '.'}}) or runtime_env={{'py_modules': [{package}]}}, or "
            f"its folder in PYTHONPATH. Or send its code with the model: "
            f"ray.cloudpickle.register_pickle_by_value({package}) before the model is prepared."
        )
    place = getattr(sys.modules.get(module), "__file__", None)
    return ZeroCopyError(
        f"{model} cannot be loaded: it needs {wanted}, and this worker has another {module}"
        f"{f' ({place})' if place else ''}: {type(error).__name__}: {error}. Give driver and workers the same "
        f"version of {package}."
    )
