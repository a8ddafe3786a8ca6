"""A copy of a model without its weights, which answers what a pipeline asks a stand-in.

`config`, `dtype` or `main_input_name` of a model may be a property of its class. The copy has the model's class and
attributes, with tensors on the meta device, so that the property runs. A value that has tensors in it is refused.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import actor
from .._model import graph, paths
from .._store.put import CARRIED

__all__ = ["MODULE_ATTRIBUTES", "NeedsWeightsError", "Weightless", "has_weights", "is_method"]

# A copy whose skeleton and arrays are larger than this does not travel with the stand-in.
LARGEST_COPY = 4 << 20
_OWN = ("_path", "_pickled")


class NeedsWeightsError(AttributeError):
    """An attribute of a model cannot be answered without its weights."""


class Weightless:
    """A module without weights: the copy of a model, or a part of it.

    It answers attributes that need no weights. A part that is a module is a `Weightless` too.
    """

    def __init__(self, path: str, module: torch.nn.Module | None, pickled: tuple[Any, ...] = ()) -> None:
        self._path = path
        self._pickled = pickled
        if module is not None:
            _modules[self] = module

    @classmethod
    def copy_of(cls, model: object, path: str) -> Weightless | None:
        """Return a copy of a model without weights; None if it is large, or its classes cannot be built without."""
        if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
            return None
        try:
            parts = graph.take_apart(model, CARRIED, local_model_types=actor.MODEL_TYPES)
            functions = [part for part in parts.carried if isinstance(part, types.FunctionType)]
            if _size(parts) > LARGEST_COPY or any(map(has_weights, functions)):
                return None
            return cls(path, _build(*_without_weights(parts)))
        except Exception:  # raised by code of the model's classes, which may need the weights
            return None

    @property
    def module(self) -> Any:
        """The module, with tensors on the meta device."""
        module = _modules.get(self)
        if module is None:
            module = _modules[self] = _build(*self._pickled)
        return module

    def answer(self, name: str) -> Any:
        """Return an attribute.

        Raises:
            NeedsWeightsError: The attribute has tensors in it, or cannot be computed without them.
            AttributeError: There is no such attribute.
        """
        try:
            value = getattr(self.module, name)
        except AttributeError:
            raise
        except Exception as error:
            said = f"{self._path}.{name} {_NEEDS_WEIGHTS} {type(error).__name__}: {error}"
            raise NeedsWeightsError(said) from error
        if isinstance(value, torch.nn.Module):
            return Weightless(f"{self._path}.{name}", value)
        if isinstance(value, torch.device) and value.type == "meta":
            return torch.device("cpu")
        if is_method(inspect.getattr_static(type(self.module), name, None)):
            raise NeedsWeightsError(f"{self._path}.{name} is a method, which {_NEEDS_WEIGHTS}")
        if name in MODULE_ATTRIBUTES or has_weights(value) or _tells_meta(value):
            raise NeedsWeightsError(f"{self._path}.{name} {_NEEDS_WEIGHTS}")
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN:
            raise AttributeError(name)
        return self.answer(name)

    def __getitem__(self, index: Any) -> Any:
        return Weightless(f"{self._path}[{index!r}]", self.module[index])

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.module)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: only the stand-in can be called."""
        raise TypeError(f"{self._path} cannot be called here: {_WEIGHTS}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Weightless:
        twin = Weightless.copy_of(self.module, self._path)
        assert twin is not None
        return twin

    def __reduce__(self) -> Any:
        module = _modules.get(self)
        pickled = self._pickled if module is None else _without_weights(graph.take_apart(module, CARRIED))
        return Weightless, (self._path, None, pickled)

    def __repr__(self) -> str:
        return f"{self._path} without weights"


# Not an attribute of `Weightless`: a pipeline that holds a stand-in must not find a model in it.
_modules: weakref.WeakKeyDictionary[Weightless, Any] = weakref.WeakKeyDictionary()
_WEIGHTS = "its weights are in the object store. Load the model: load_model_in_actor(standin.model_ref)."
_NEEDS_WEIGHTS = f"needs the weights, and {_WEIGHTS}"
MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


def is_method(static: object) -> bool:
    """Tell whether an attribute of a class is a method of its objects, not a property, class method or constant."""
    of_object = (functools.partialmethod, functools.singledispatchmethod)
    return isinstance(static, of_object) or (
        callable(static) and not isinstance(static, (type, staticmethod, torch.nn.Module))
    )


def has_weights(value: object) -> bool:
    """Tell whether a value holds tensors or models, also in a closure."""
    return any(isinstance(part, (torch.Tensor, *actor.MODEL_TYPES)) for _, part in paths.walk(value))


def _tells_meta(value: object) -> bool:
    """Tell whether a value has the device of the copy in it, in a container or a text."""
    if isinstance(value, str):
        return "device='meta'" in value
    return any(isinstance(part, torch.device) and part.type == "meta" for part in _parts_of(value))


def _parts_of(value: object) -> Iterator[object]:
    """Yield the values in tuples, lists and dicts."""
    if isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts_of(part)
    else:
        yield value


def _size(parts: graph.Parts) -> int:
    return len(parts.skeleton) + sum(array.raw().nbytes for array in parts.arrays)


def _without_weights(parts: graph.Parts) -> tuple[Any, ...]:
    """Return the arguments of `_build`: the skeleton, shapes instead of tensors, arrays, what is carried."""
    tensors = [
        (tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, isinstance(tensor, torch.nn.Parameter))
        for tensor in parts.tensors
    ]
    return parts.skeleton, tensors, [bytearray(array.raw()) for array in parts.arrays], parts.carried


def _build(skeleton: bytes, tensors: Sequence[Any], arrays: Sequence[Any], carried: Sequence[Any]) -> Any:
    on_meta: list[torch.Tensor] = []
    for shape, stride, dtype, is_parameter in tensors:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        on_meta.append(torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    with torch.inference_mode(False):
        return graph.put_together(skeleton, on_meta, arrays, carried)[0]
