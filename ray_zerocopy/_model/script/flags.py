"""The flags in a pickle of TorchScript objects: `requires_grad` of its tensors, `training` of its modules."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar, NamedTuple

import torch

__all__ = ["clear_flags"]


class _Flag(NamedTuple):
    """A bool in a pickle, by its place there."""

    position: int


class _Object:
    """Stands for whatever a pickle makes by calling a class or function."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


_InPython: Any = pickle._Unpickler  # the one that reads byte by byte


class _FlagReader(_InPython):  # type: ignore[misc]
    """Reads a pickle of TorchScript objects, and notes where the flags of its tensors are."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        super().__init__(self.stream)
        self.of_tensors: list[_Flag] = []

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        return self._tensor if module == "torch._utils" else _Object

    def _tensor(self, *given: Any) -> _Object:
        self.of_tensors += [value for value in given if isinstance(value, _Flag)]
        return _Object()

    def _flag(self) -> None:
        self.append(_Flag(self.stream.tell() - 1))

    def _reduce(self) -> None:
        given = self.stack.pop()  # a tuple, but for enums
        self.stack[-1] = self.stack[-1](*given) if isinstance(given, tuple) else _Object()

    dispatch: ClassVar[dict[int, Any]] = {
        **_InPython.dispatch,
        pickle.NEWTRUE[0]: _flag,
        pickle.NEWFALSE[0]: _flag,
        pickle.REDUCE[0]: _reduce,
    }


def clear_flags(data: bytes, cpp: Any) -> bytes:
    """Return a pickle of a module in which no tensor requires a gradient and no module trains."""
    reader = _FlagReader(data)
    held = reader.load().state["held"]
    flags = reader.of_tensors
    pending = [(held, cpp)]
    while pending:
        made, module = pending.pop()
        if isinstance(made.state, dict):  # else a __getstate__ of its own chose what to save
            flags += [flag for flag in [made.state.get("training")] if isinstance(flag, _Flag)]
            pending += [(made.state[name], child) for name, child in torch._C.ModuleDict(module).items()]
    changed = bytearray(data)
    for flag in flags:
        changed[flag.position] = pickle.NEWFALSE[0]
    return bytes(changed)
