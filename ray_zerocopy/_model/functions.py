"""Kinds of functions and descriptors: a pair of functions that reduce and rebuild each.

A function that a worker finds by its module and name travels by name. These kinds are for the functions of a script,
which travel by value. A cache arrives empty.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
import typing
from collections.abc import Callable
from typing import Any, cast

from torch.distributions.transforms import Transform, _InverseTransform

from .compiled import is_compiled, reduce_compiled
from .kinds import Refusal, Walk, reduces
from .modules import new_object
from .names import is_found_by_name, travels_by_name

__all__ = ["invert", "rebuild_lru_cache"]


# ---------------------------------------------------------------- caches


@reduces(functools._lru_cache_wrapper)
def _reduce_lru_cache(cached: Any, walk: Walk) -> Any:
    if is_found_by_name(cached):
        return NotImplemented
    own = {name: value for name, value in cached.__dict__.items() if name != "cache_parameters"}
    parameters = cached.cache_parameters()
    arguments = (cached.__wrapped__, parameters["maxsize"], parameters["typed"])
    return rebuild_lru_cache, arguments, own, None, None, _set_attributes


def rebuild_lru_cache(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _set_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    obj.__dict__.update(attributes)


@reduces(functools.cached_property)
def _reduce_cached_property(cached: Any, walk: Walk) -> Any:
    # Python 3.10 and 3.11 give each property a lock, later versions do not.
    own = {name: value for name, value in cached.__dict__.items() if name != "lock"}
    return new_object, (type(cached),), own, None, None, _set_cached_property


def _set_cached_property(cached: Any, attributes: dict[str, Any]) -> None:
    cached.__dict__.update(attributes)
    if hasattr(functools.cached_property(len), "lock"):
        cached.lock = threading.RLock()


# ---------------------------------------------------------------- context managers


@reduces(contextlib._GeneratorContextManager)
def _reduce_context_manager(manager: Any, walk: Walk) -> Any:
    """Reduce what `contextlib.contextmanager` returns, as where it decorates a method."""
    if inspect.getgeneratorstate(manager.gen) != inspect.GEN_CREATED:
        raise Refusal("it was entered", "Keep the function that makes it, and call the function in each `with`.")
    return type(manager), (manager.func, manager.args, manager.kwds)


# ---------------------------------------------------------------- dispatch on a type


def _example(argument: object) -> None:
    """Have a type to dispatch on."""


# All functions that `singledispatch` makes have this code.
_DISPATCH_CODE = cast(types.FunctionType, functools.singledispatch(_example)).__code__
_MADE_BY_DISPATCH = ("dispatch", "registry", "register", "_clear_cache", "__wrapped__")


@reduces(types.FunctionType)
def _reduce_function(function: Any, walk: Walk) -> Any:
    if is_compiled(function) and not is_found_by_name(function):
        return reduce_compiled(function)
    if function.__code__ is _DISPATCH_CODE and not is_found_by_name(function):
        own = {name: value for name, value in function.__dict__.items() if name not in _MADE_BY_DISPATCH}
        implementations = list(function.registry.items())
        names = (function.__module__, function.__qualname__, function.__name__)
        arguments = (function.__wrapped__,)
        return functools.singledispatch, arguments, (names, own, implementations), None, None, _set_dispatch
    return NotImplemented


def _set_dispatch(function: Any, state: Any) -> None:
    (function.__module__, function.__qualname__, function.__name__), own, implementations = state
    function.__dict__.update(own)
    for kind, implementation in implementations:
        function.register(kind, implementation)


# ---------------------------------------------------------------- names of types


def _reduce_type_name(parameter: Any, walk: Walk) -> Any:
    """Reduce a type parameter, which Python pickles by name."""
    name = parameter.__name__
    if getattr(sys.modules.get(parameter.__module__), name, None) is parameter and travels_by_name(
        parameter.__module__
    ):
        return NotImplemented
    return type(parameter), (name,)


for _kind in ("ParamSpec", "TypeVarTuple"):  # cloudpickle reduces TypeVar; TypeVarTuple came with Python 3.11
    if hasattr(typing, _kind):
        reduces(getattr(typing, _kind))(_reduce_type_name)


@reduces(typing.NewType)
def _reduce_new_type(kind: Any, walk: Walk) -> Any:
    if is_found_by_name(kind):
        return NotImplemented
    return typing.NewType, (kind.__name__, kind.__supertype__), {"__module__": kind.__module__}


# ---------------------------------------------------------------- transforms of distributions


@reduces(_InverseTransform)
def _reduce_inverse(inverse: Any, walk: Walk) -> Any:
    return invert, (inverse._inv,)  # torch's own state leaves out the transform that is inverted


def invert(transform: Transform) -> Transform:
    return transform.inv
