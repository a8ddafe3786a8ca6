"""Clear `requires_grad` and `training` in a pickle of TorchScript objects."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar, NamedTuple

import torch

__all__ = ["clear_flags"]


class _Flag(NamedTuple):
    """The position of a bool in a pickle."""

    position: int


class _Object:
    """A placeholder for the result of any class or function that the pickle calls."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


_PythonUnpickler: Any = pickle._Unpickler  # the unpickler in C has no dispatch table


class _FlagReader(_PythonUnpickler):  # type: ignore[misc]
    """Reads a pickle of TorchScript objects, and records the positions of its tensors' flags."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        super().__init__(self.stream)
        self.tensor_flags: list[_Flag] = []

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        return self._tensor if module == "torch._utils" else _Object

    def _tensor(self, *given: Any) -> _Object:
        self.tensor_flags += [value for value in given if isinstance(value, _Flag)]
        return _Object()

    def _flag(self) -> None:
        self.append(_Flag(self.stream.tell() - 1))

    def _reduce(self) -> None:
        given = self.stack.pop()  # a tuple, except for enums
        self.stack[-1] = self.stack[-1](*given) if isinstance(given, tuple) else _Object()

    dispatch: ClassVar[dict[int, Any]] = {
        **_PythonUnpickler.dispatch,
        pickle.NEWTRUE[0]: _flag,
        pickle.NEWFALSE[0]: _flag,
        pickle.REDUCE[0]: _reduce,
    }


def clear_flags(data: bytes, cpp: Any) -> bytes:
    """Return the pickle with `requires_grad` and `training` set to False everywhere."""
    reader = _FlagReader(data)
    held = reader.load().state["held"]
    flags = reader.tensor_flags
    pending = [(held, cpp)]
    while pending:
        placeholder, module = pending.pop()
        if isinstance(placeholder.state, dict):  # otherwise the class's __getstate__ returned something else
            flags += [flag for flag in [placeholder.state.get("training")] if isinstance(flag, _Flag)]
            pending += [(placeholder.state[name], child) for name, child in torch._C.ModuleDict(module).items()]
    changed = bytearray(data)
    for flag in flags:
        changed[flag.position] = pickle.NEWFALSE[0]
    return bytes(changed)
