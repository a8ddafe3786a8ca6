"""The TorchScript modules of one pickle: a part of a module, wherever it is held, stays that part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.jit import ScriptModule

from .rebuild import part_at
from .write import reduce_script

__all__ = ["RestartPickle", "Scripts"]


class RestartPickle(Exception):
    """Parts of a script module, or its methods, were pickled before it was met: start over, now that it is known."""


class Scripts:
    """The script modules of one pickle: a part of one, wherever it is held, is reduced to a path in the whole."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[ScriptModule, str]] = {}  # by the C++ object: Python has several for one
        self._stand_ins: set[int] = set()
        self._reduced: set[int] = set()

    def restart(self) -> None:
        """Forget what has been reduced, but not what has been met."""
        self._reduced.clear()

    def add(self, module: ScriptModule) -> None:
        """Take note of a module and its parts."""
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
        """Return what `reduce_script` does, or where in a larger module this one is."""
        self.add(module)
        whole, path = self._places[hash(module._c)]
        if whole is not module:
            return part_at, (whole, path)
        self._reduced.add(hash(module._c))
        return reduce_script(module)

    def reduce_method(self, method: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Describe a module's method by the module and its name."""
        number = hash(method.owner)
        if number not in self._places:
            stand_in = torch.jit._recursive.wrap_cpp_module(method.owner)  # type: ignore[no-untyped-call]
            try:
                self.add(stand_in)
            finally:
                self._stand_ins.add(number)
        whole, path = self._places[number]
        return _method, (whole, path, method.name)


def _method(whole: ScriptModule, path: str, name: str) -> Any:
    return getattr(part_at(whole, path), name)
