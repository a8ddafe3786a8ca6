"""Objects that pickle cannot rebuild by itself: their class intercepts attribute access, or needs arguments.

Unpickling asks a new, empty object for `__setstate__`, and sets slots with `setattr`. A class with a `__getattr__`
that reads `self.wrapped` then calls itself without end. `reduce_intercepting` sets the state without asking the
object.

Unpickling calls the class of an OrderedDict without arguments. A dataclass of this kind, as models return it, may
need some. `reduce_ordered_dict` makes the object without calling the class.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "default_state",
    "has_default_reduce",
    "lacks_arguments",
    "needs_arguments",
    "new_instance",
    "reduce_ordered_dict",
    "reducer_for_object",
    "set_default_state",
    "set_object_state",
    "unusable_state",
]


def has_default_reduce(kind: Any) -> bool:
    """Tell whether a class inherits `__reduce__` and `__reduce_ex__` from `object`."""
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def lacks_arguments(obj: Any) -> str:
    """Return why unpickling could not make an object of its class again; empty if it can.

    Pickle calls `__new__` of a class with what `__getnewargs__` gives, or without arguments, and an exception with
    its `args`.
    """
    kind: Any = type(obj)
    if issubclass(kind, type):
        return ""
    of_exception = isinstance(obj, BaseException) and kind.__reduce__ is BaseException.__reduce__
    try:
        if isinstance(kind.__new__, types.FunctionType) and has_default_reduce(kind):
            if not hasattr(kind, "__getnewargs_ex__"):
                arguments = obj.__getnewargs__() if hasattr(kind, "__getnewargs__") else ()
                inspect.signature(kind.__new__).bind(kind, *arguments)
        elif of_exception and isinstance(kind.__init__, types.FunctionType):
            inspect.signature(kind.__init__).bind(obj, *obj.args)
    except TypeError as error:
        return str(error)
    except Exception:  # code of the class; pickling says what is wrong
        return ""
    return ""


def unusable_state(obj: Any, reduced: Any) -> str:
    """Return why unpickling could not set the state that `__reduce__` of an object gives; empty if it can."""
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if state is None or (len(reduced) > 5 and reduced[5] is not None):
        return ""
    first = next((part for part in (reduced[0], *reduced[1]) if isinstance(part, type)), type(obj))
    if any(hasattr(kind, "__setstate__") for kind in (first, type(obj))):
        return ""
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    for part in (attributes, slots):
        if part and not isinstance(part, dict):
            return f"the state has a {type(part).__qualname__} where pickle takes a dict of attributes"
    if attributes and not hasattr(obj, "__dict__"):
        return "the state has attributes, and the object has no __dict__"
    return ""


def reducer_for_object(kind: type) -> Callable[[Any, Any], Any] | None:
    """Return the function that reduces objects of a class for which pickle's default does not work."""
    if needs_arguments(kind):
        return reduce_ordered_dict
    return reduce_intercepting if intercepts_attributes(kind) else None


def needs_arguments(kind: Any) -> bool:
    """Tell whether a class is an OrderedDict with a constructor, and with the pickling of OrderedDict."""
    return (
        issubclass(kind, OrderedDict)
        and kind.__reduce__ is OrderedDict.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__init__ is not OrderedDict.__init__
    )


def reduce_ordered_dict(obj: Any, walk: object = None) -> Any:
    state = default_state(obj)
    items = iter(OrderedDict.items(obj))
    return new_instance, (type(obj),), state, None, items, None if state is None else set_object_state


def intercepts_attributes(kind: Any) -> bool:
    """Tell whether objects of a class run code of the class where pickle reads or sets an attribute."""
    if issubclass(kind, (type, torch.nn.Module, torch.Tensor)) or not has_default_reduce(kind):
        return False
    slotted = any("__slots__" in base.__dict__ for base in kind.__mro__)
    return (
        hasattr(kind, "__getattr__")
        or any("__class__" in base.__dict__ for base in kind.__mro__[:-1])
        or isinstance(kind.__getattribute__, types.FunctionType)
        or (slotted and isinstance(kind.__setattr__, types.FunctionType))
    )


def reduce_intercepting(obj: Any, walk: Any) -> Any:
    kind: Any = type(obj)
    if kind in walk.dispatch_table:
        walk.runs_constructors = True
        return NotImplemented
    getstate = getattr(kind, "__getstate__", None)
    if not isinstance(kind.__getattribute__, types.FunctionType) and (
        sys.version_info >= (3, 11) or getstate is not None
    ):
        reduced: Any = object.__reduce_ex__(obj, 5)
        made, args, state, items, pairs = (*reduced, None, None, None)[:5]
    else:  # object.__reduce_ex__ would ask the object, not its class, for __getstate__
        made, args = copyreg.__newobj__, (kind, *getattr(kind, "__getnewargs__", _no_arguments)(obj))  # type: ignore[attr-defined]
        state = default_state(obj) if getstate in (None, getattr(object, "__getstate__", None)) else getstate(obj)
        items = list.__iter__(obj) if issubclass(kind, list) else None
        pairs = iter(dict.items(obj)) if issubclass(kind, dict) else None
    if made is copyreg.__newobj__:  # type: ignore[attr-defined]
        made = new_instance
    return made, args, state, items, pairs, None if state is None else set_object_state


def _no_arguments(obj: object) -> tuple[()]:
    return ()


def new_instance(kind: Any, *args: Any) -> Any:
    """Return a new object. Pickle requires that `__class__` of an object is the class that `__newobj__` gets."""
    return kind.__new__(kind, *args)


def default_state(obj: Any) -> Any:
    """Return what `object.__getstate__` of Python 3.11 returns: the attributes, with the slots if any is set."""
    attributes = _attributes(obj)
    slots = {}
    for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
        try:
            slots[name] = object.__getattribute__(obj, name)
        except AttributeError:  # never set
            continue
    return (attributes, slots) if slots else attributes or None


def _attributes(obj: Any) -> Any:
    try:
        return object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return None


def set_default_state(obj: Any, state: Any) -> None:
    """Set attributes and slots of a new object, without the methods of its class."""
    slots: Any = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state:
        object.__getattribute__(obj, "__dict__").update(state)
    for name, value in (slots or {}).items():
        object.__setattr__(obj, name, value)


def set_object_state(obj: Any, state: Any) -> None:
    """Set the state of a new object as pickle does, but look for `__setstate__` in the class only."""
    setstate = getattr(type(obj), "__setstate__", set_default_state)
    setstate(obj, state)
