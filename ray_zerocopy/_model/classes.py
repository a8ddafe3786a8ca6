"""Classes: the functions in them, and what cloudpickle loses of one that travels by value.

cloudpickle loses states and aliases of enum members, gives private slots twice, and runs `__init_subclass__` and the
metaclass of a script again, before the class has its attributes.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

from ray.cloudpickle import cloudpickle

from .kinds import Refusal
from .names import travels_by_name

__all__ = ["complete_class", "functions_in", "make_class", "set_enum_state"]

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
        _check_keywords(kind)
        return (make_class, *reduced[1:]) if reduced[0] is cloudpickle._make_skeleton_class else reduced
    # cloudpickle makes each member from its value, before the class has its `__init__` and `__new__`.
    members: Any = list(kind)
    own = [{name: value for name, value in vars(member).items() if name not in _OF_ENUM} for member in members]
    aliases = [
        (name, member.name if any(member is known for known in members) else None, member.value)
        for name, member in dict[str, Any](kind.__members__).items()
        if name not in {known.name for known in members}
    ]
    return (*reduced[:2], (state, own, aliases, list(kind.__members__)), None, None, set_enum_state)


def _check_keywords(kind: type) -> None:
    """Raise Refusal if `__init_subclass__` of a library needs keywords of the class, which are not known any more."""
    importable = (base for base in kind.__mro__[1:] if travels_by_name(base.__module__))
    base = next((base for base in importable if "__init_subclass__" in vars(base)), object)
    hook = getattr(vars(base)["__init_subclass__"], "__func__", None)
    if not isinstance(hook, types.FunctionType):
        return
    try:
        inspect.signature(hook).bind(kind)
    except TypeError as error:
        refusal = Refusal(
            f"{base.__qualname__}.__init_subclass__ needs keywords of the class, which do not travel ({error})",
            f"Move {kind.__qualname__} to a module that workers can import.",
        )
        refusal.part = kind
        raise refusal from error


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


_making = threading.Lock()


def make_class(kind: Any, name: str, bases: tuple[Any, ...], own: dict[str, Any], tracker_id: str, _: Any) -> Any:
    """Return a new class without its attributes, or the known class of `tracker_id`. cloudpickle sets the attributes.

    Unlike cloudpickle's function, it does not run the `__init_subclass__` and the metaclass of a script: what they
    did, such as filling a registry, is in the attributes of the classes, and keywords of the class are not known.
    """
    known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    if known is not None:
        return known
    own = {sys.intern(key): value for key, value in own.items()}
    resolved = types.resolve_bases(bases)
    with _making:
        made = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS
        hooks = [
            (base, base.__dict__["__init_subclass__"])
            for base in dict.fromkeys(ancestor for base in resolved for ancestor in base.__mro__)
            if base in made and "__init_subclass__" in base.__dict__
        ]
        for base, _hook in hooks:
            type.__delattr__(base, "__init_subclass__")
        try:
            if kind in made:
                of_library: Any = next(base for base in kind.__mro__ if base not in made)
                if resolved is not bases:
                    own["__orig_bases__"] = bases
                new = of_library.__new__(kind, name, resolved, own)
            else:
                new = types.new_class(name, bases, {"metaclass": kind}, lambda namespace: namespace.update(own))
        finally:
            for base, hook in hooks:
                type.__setattr__(base, "__init_subclass__", hook)
    return cloudpickle._lookup_class_or_track(tracker_id, new)


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
