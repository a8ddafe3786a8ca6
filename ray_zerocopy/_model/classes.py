"""Classes: the functions in them, and what cloudpickle loses of one that travels by value.

cloudpickle loses states and aliases of enum members, and gives private slots twice.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from ray.cloudpickle import cloudpickle

__all__ = ["complete_class", "functions_in", "set_enum_state"]

# The attributes that Enum itself sets on a member.
_OF_ENUM = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_", "_inverted_"})


def complete_class(kind: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Complete the value that cloudpickle reduces a class to."""
    state = reduced[2] if len(reduced) > 2 else None
    if not isinstance(state, tuple) or not isinstance(state[0], dict):
        return reduced  # a class that travels by name
    # cloudpickle leaves out slots by the names that are written, and a private one has another name in the class.
    slots = kind.__dict__.get("__slots__", ())
    for slot in (slots,) if isinstance(slots, str) else slots:
        if slot.startswith("__") and not slot.endswith("__"):
            state[0].pop(f"_{kind.__name__.lstrip('_')}{slot}", None)
    if not isinstance(kind, enum.EnumMeta):
        return reduced
    # cloudpickle makes each member from its value, before the class has its `__init__` and `__new__`.
    members: Any = list(kind)
    own = [{name: value for name, value in vars(member).items() if name not in _OF_ENUM} for member in members]
    aliases = [
        (name, member.name if any(member is known for known in members) else None, member.value)
        for name, member in dict[str, Any](kind.__members__).items()
        if name not in {known.name for known in members}
    ]
    return (*reduced[:2], (state, own, aliases, list(kind.__members__)), None, None, set_enum_state)


def set_enum_state(kind: Any, state: tuple[Any, ...]) -> Any:
    """Set the state that `complete_class` read."""
    state_of_class, own, aliases, names = state
    cloudpickle._class_setstate(kind, state_of_class)
    member: Any
    for member, attributes in zip(list(kind), own, strict=True):
        member.__dict__.update(attributes)
    for name, canonical, value in aliases:
        member = kind._member_map_[canonical] if canonical is not None else kind(value)
        if canonical is None:  # several flags together
            member._name_ = name
        kind._member_map_[name] = member
        type.__setattr__(kind, name, member)
    ordered = {name: kind._member_map_[name] for name in names}
    kind._member_map_.clear()
    kind._member_map_.update(ordered)
    return kind


def functions_in(held: Any) -> Iterator[types.FunctionType]:
    """Yield the functions of an attribute of a class: itself, of a descriptor, and those that decorators wrap."""
    pending, seen = [held], set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            yield value
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    pending.append(cell.cell_contents)
        if callable(value) or isinstance(value, (property, functools.cached_property, functools.partialmethod)):
            for name in ("__func__", "__wrapped__", "func", "fget", "fset"):
                wrapped = inspect.getattr_static(value, name, None)  # not getattr, which may call code of a proxy
                slot = isinstance(wrapped, types.MemberDescriptorType) and isinstance(value, wrapped.__objclass__)
                pending.append(wrapped.__get__(value) if slot else wrapped)
