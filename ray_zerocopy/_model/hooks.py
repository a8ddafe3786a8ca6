"""Hooks that store into a global: a script's functions and its model are separate pickles, so they lose each other.

A hook of a script travels by value with a copy of its globals. A function that the user sends to the same worker has
another copy. What the hook stores there is not seen.
"""

from __future__ import annotations

import collections
import dis
import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..errors import warn
from .names import is_found_by_name, travels_by_name
from .paths import global_names, walk

__all__ = ["filled_names", "warn_of_filled_globals"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CHANGES = frozenset(["append", "appendleft", "extend", "insert", "add", "update", "setdefault", "__setitem__"])
_CONTAINERS = (dict, list, set, collections.deque)


def filled_names(code: types.CodeType) -> set[str]:
    """Return the globals and closure variables that a function assigns to, or stores into."""
    names: set[str] = set()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL", "PRECALL")]
    for number, instruction in enumerate(instructions):
        if instruction.opname == "STORE_GLOBAL":
            names.add(instruction.argval)
        elif instruction.opname == "STORE_SUBSCR":
            key = _begin_of_value(instructions, number - 1)
            names.update(_name_at(instructions, _begin_of_value(instructions, key - 1)))
        elif instruction.opname in ("LOAD_METHOD", "LOAD_ATTR") and instruction.argval in _CHANGES:
            names.update(_name_at(instructions, _begin_of_value(instructions, number - 1)))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= filled_names(constant)
    return names


def _begin_of_value(instructions: Sequence[dis.Instruction], last: int) -> int:
    """Return the first instruction of those that push one value and end with `last`; -1 if it cannot be told."""
    pushed = 0
    for number in range(last, -1, -1):
        instruction = instructions[number]
        if instruction.opname.startswith("LOAD_") and not instruction.opname.endswith(("_ATTR", "_METHOD")):
            pushed += 1  # not `dis.stack_effect`, which counts the NULL of a call
        elif not instruction.opname.startswith("LOAD_"):
            pushed += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if pushed == 1:
            return number
    return -1


def _name_at(instructions: Sequence[dis.Instruction], number: int) -> Iterator[str]:
    if number >= 0 and instructions[number].opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
        yield instructions[number].argval


def warn_of_filled_globals(root: object, modules: Iterable[torch.nn.Module], by_value: Sequence[Any]) -> None:
    """Warn of hooks that store into a global of the script which no other function of the object uses.

    Args:
        root: The object that is shared.
        modules: The modules in it.
        by_value: The functions in it that travel by value.
    """
    hooks: dict[types.FunctionType, torch.nn.Module] = {}
    for module in modules:
        for function in _hooks_of(module):
            if not (is_found_by_name(function) or travels_by_name(function.__module__ or "")):
                hooks.setdefault(function, module)
    if not hooks:
        return
    known = {called for function in hooks for called in _called_by(function)}
    others = {called for other in by_value if other not in known for called in _called_by(other)}
    used = {(id(other.__globals__), name) for other in others for name in global_names(other.__code__)}
    for function, module in hooks.items():
        stores = [(called, name) for called in _called_by(function) for name in filled_names(called.__code__)]
        for name in sorted({_name_of_global(called, name) for called, name in stores} - {""}):
            if (id(function.__globals__), name) not in used:
                _warn(root, module, function, name)


def _called_by(function: types.FunctionType) -> list[types.FunctionType]:
    """Return a function and those of the same script that it names, and that these name."""
    found = {function: None}
    pending = [function]
    while pending:
        for name in global_names(pending.pop().__code__):
            called = function.__globals__.get(name)
            if not isinstance(called, types.FunctionType) or called.__globals__ is not function.__globals__:
                continue
            if called not in found:
                found[called] = None
                pending.append(called)
    return list(found)


def _hooks_of(module: torch.nn.Module) -> Iterator[types.FunctionType]:
    for kind in _HOOKS:
        for hook in module.__dict__.get(kind, {}).values():
            while isinstance(hook, functools.partial):
                hook = hook.func
            hook = getattr(hook, "__func__", hook)  # of a bound method
            function = hook if isinstance(hook, types.FunctionType) else vars(type(hook)).get("__call__")
            if isinstance(function, types.FunctionType):
                yield function


def _name_of_global(function: types.FunctionType, name: str) -> str:
    """Return the global that a function stores into as `name`; empty if it is no global of the script."""
    if name not in function.__code__.co_freevars:
        value = function.__globals__.get(name)
        return name if value is None or isinstance(value, _CONTAINERS) or not callable(value) else ""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        value = cells[name].cell_contents
    except ValueError:
        return ""
    return next((key for key, held in list(function.__globals__.items()) if held is value), "")


def _warn(root: object, module: torch.nn.Module, function: types.FunctionType, name: str) -> None:
    path = next((path for path, part in walk(root) if part is module), "")
    warn(
        f"{type(root).__qualname__}{path} has the hook {function.__qualname__}, which stores into the global "
        f"{name!r} of {function.__module__}. In a worker the hook fills a copy of {name!r} that your functions there "
        f"do not see. Store into an attribute of the module, module.{name} = {{}}, or register the hook in the "
        f"worker after loading."
    )
