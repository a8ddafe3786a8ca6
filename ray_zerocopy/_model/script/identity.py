"""Keep the identity of TorchScript modules: a submodule that several objects hold stays one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.jit import ScriptModule

from .rebuild import part_at
from .write import reduce_script

__all__ = ["RestartPickle", "Scripts"]


class RestartPickle(Exception):
    """A submodule or method was pickled before the module that contains it. Pickle the graph again from the start."""


class Scripts:
    """The script modules of one pickle. A submodule is reduced to its path in the outermost module."""

    def __init__(self) -> None:
        # By the hash of the C++ object: one C++ object may have several Python objects.
        self._places: dict[int, tuple[ScriptModule, str]] = {}
        self._stand_ins: set[int] = set()  # owners of methods that were reduced before their module was found
        self._reduced: set[int] = set()

    def restart(self) -> None:
        """Start over with the same known modules."""
        self._reduced.clear()

    def add(self, module: ScriptModule) -> None:
        """Record a module and its submodules. Raise RestartPickle if one of them has been reduced already."""
        number = hash(module._c)
        known = self._places.get(number)
        if known is not None and (known[0] is module or number not in self._stand_ins):
            return
        self._stand_ins.discard(number)
        parts = {hash(part._c): (module, path) for path, part in module.named_modules()}
        self._places |= parts
        if known is not None or not self._reduced.isdisjoint(parts):
            raise RestartPickle

    def reduce(self, module: ScriptModule) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Reduce a module by `reduce_script`, or to its path in the module that contains it."""
        self.add(module)
        whole, path = self._places[hash(module._c)]
        if whole is not module:
            return part_at, (whole, path)
        self._reduced.add(hash(module._c))
        return reduce_script(module)

    def reduce_method(self, method: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Reduce a method to its module and its name."""
        number = hash(method.owner)
        if number not in self._places:
            stand_in = torch.jit._recursive.wrap_cpp_module(method.owner)  # type: ignore[no-untyped-call]
            try:
                self.add(stand_in)
            finally:
                self._stand_ins.add(number)
        whole, path = self._places[number]
        return _rebuild_method, (whole, path, method.name)


def _rebuild_method(whole: ScriptModule, path: str, name: str) -> Any:
    return getattr(part_at(whole, path), name)
