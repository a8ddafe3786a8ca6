"""Walk object graphs, and say where in them a thing is: for reports, for error messages and to find models.

A path is spelled as Python is: `.encoder.layers[0].weight`, `['key']`; what has no spelling is in angle brackets,
such as `.<closure scale>`. Walking runs no code of the objects, properties least of all.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .kinds import has_default_reduce
from .script import parts

__all__ = ["attributes_of", "children", "follow", "unpicklable", "walk"]


def children(obj: object) -> Iterator[tuple[str, Any]]:
    """Yield what `obj` holds directly, each with the text that leads from `obj` to it: `.name`, `[0]`, `['key']`."""
    if isinstance(obj, torch.Tensor):
        yield from ((f".{name}", value) for name, value in obj.__dict__.items())
        return
    if isinstance(obj, dict):
        for number, (key, value) in enumerate(list(obj.items())):
            yield f"[{key!r}]", value
            if not isinstance(key, _LEAVES):
                yield f".keys()[{number}]", key
    elif isinstance(obj, (list, tuple, set, frozenset, collections.deque)):
        for number, value in enumerate(obj):
            yield f"[{number}]", value
    elif isinstance(obj, functools.partial):
        yield from ((".func", obj.func), (".args", obj.args), (".keywords", obj.keywords))
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            try:
                yield f".<closure {name}>", cell.cell_contents
            except ValueError:
                continue
        names = obj.__code__.co_varnames[: obj.__code__.co_argcount][-len(obj.__defaults__ or ()) :]
        defaults = {**dict(zip(names, obj.__defaults__ or (), strict=False)), **(obj.__kwdefaults__ or {})}
        yield from ((f".<default {name}>", value) for name, value in defaults.items())
    if isinstance(obj, (type, type(torch), torch.fx.Graph)):  # a graph's tensors are fake ones
        return
    if isinstance(obj, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        yield from parts.named_tensors(obj)
        return
    yield from _named(obj, attributes_of(obj))
    for kind in type(obj).__mro__:
        if "__slots__" not in kind.__dict__:
            continue
        for name, slot in kind.__dict__.items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield f".{_unmangled(kind, name)}", slot.__get__(obj)
                except AttributeError:  # never set
                    continue


def attributes_of(obj: object) -> dict[str, Any]:
    """Return what an object has in a `__dict__` of its own, not what a `__getattr__` or a proxy answers."""
    try:
        attributes = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _named(obj: object, attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    of_module = isinstance(obj, torch.nn.Module)
    for name, value in list(attributes.items()):
        if of_module and name in ("_parameters", "_buffers", "_modules"):
            yield from ((f".{key}", held) for key, held in list(value.items()))
        else:
            yield f".{name}", value


def _unmangled(kind: type, name: str) -> str:
    prefix = f"_{kind.__name__.lstrip('_')}__"
    return name[len(prefix) - 2 :] if name.startswith(prefix) else name


_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def walk(obj: object, path: str = "", stop_at: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield `obj` and everything reachable from it once, each with its path from `obj`; never runs a property.

    What instances of the types in `stop_at` hold is not looked at.
    """
    seen: set[int] = set()
    alive: list[object] = []
    pending = [(path, obj)]
    while pending:
        path, current = pending.pop()
        if isinstance(current, _LEAVES) or id(current) in seen:
            continue
        seen.add(id(current))
        alive.append(current)
        yield path, current
        if isinstance(current, stop_at):
            continue
        pending.extend(reversed([(path + step, child) for step, child in children(current)]))


def follow(obj: object, path: str) -> Any:
    """Return what lies at a path as `children` spells them, such as `.stages[0].model`; LookupError if nothing.

    A key that is a string may have quotes of either kind around it.
    """
    if not path:
        return obj
    for step, child in children(obj):
        length = len(step) if path.startswith(step) else _length_of_key(path, step)
        if length and path[length : length + 1] in ("", ".", "["):
            with contextlib.suppress(LookupError):  # a name may go on like another, with a dot in it
                return follow(child, path[length:])
    raise LookupError(path)


def _length_of_key(path: str, step: str) -> int:
    """Return how many characters at the beginning of a path spell a step's string key in the other quotes, or 0."""
    if not step.startswith(("['", '["')) or "\\" in step:
        return 0
    quote = '"' if step[1] == "'" else "'"
    return len(step) if path.startswith(f"[{quote}{step[2:-2]}{quote}]") else 0


# ---------------------------------------------------------------- what cannot be pickled


def unpicklable(obj: object, fails: Callable[[object], Exception | None], error: Exception) -> TypeError:
    """Return the error that names the deepest part of `obj` which does not pickle, by its path.

    `fails` tries a part, and returns what was raised, or None.
    """
    path, culprit, reason = _deepest(obj, fails, error)
    where = f"{type(obj).__qualname__}{path}" if path else type(obj).__qualname__
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    if "._guards_fn." in path:
        return TypeError(
            f"{where.split('._guards_fn')[0].rpartition('>.')[2]} is what torch.export's module() gives, which torch "
            f"cannot pickle. Share the ExportedProgram itself, and call its module() in the worker."
        )
    if len(where) > 300:
        where = f"{where[:100]} ... {where[-150:]}"
    return TypeError(
        f"{type(obj).__qualname__} cannot be shared: {where} is a {kind}, which cannot be pickled "
        f"({type(reason).__name__}: {reason}). Remove it before sharing and create it again in the worker, "
        f"or give the class that holds it a __getstate__ without it."
    )


# Every object has one from Python 3.11 on.
_DEFAULT_GETSTATE = getattr(object, "__getstate__", None)
_MODULE_GETSTATE = getattr(torch.nn.Module, "__getstate__", None)


def _pickled_of(obj: object) -> Iterator[tuple[str, Any]]:
    """Yield what a pickler goes on to from `obj`, with paths: its children and more, or its own choice of them."""
    kind: Any = type(obj)
    if isinstance(obj, torch.jit.ScriptModule):
        for path, state in parts.python_state(obj).items():
            yield from ((f".{path}.{name}" if path else f".{name}", value) for name, value in state.items())
        return
    own = getattr(kind, "__getstate__", None)
    if has_default_reduce(kind) and own not in (None, _DEFAULT_GETSTATE, _MODULE_GETSTATE):
        chosen: Any = None
        with contextlib.suppress(Exception):  # which is then why it cannot be pickled
            chosen = own(obj)
        if isinstance(chosen, dict):
            yield from _named(obj, chosen)
            return
    yield from children(obj)
    if isinstance(obj, types.FunctionType):
        used = (name for name in obj.__code__.co_names if name in obj.__globals__)
        yield from ((f".<global {name}>", obj.__globals__[name]) for name in used)
    elif isinstance(obj, type):
        yield from _named(obj, dict(obj.__dict__))
    else:
        yield ".__class__", kind


def _deepest(
    obj: object, fails: Callable[[object], Exception | None], error: Exception
) -> tuple[str, object, Exception]:
    """Follow the failing child from `obj` down to the one none of whose own children fails.

    What leads back to where the search came from may fail for that alone: other children are tried before it.
    """
    way = [("", obj, error, _pickled_of(obj))]
    seen = {id(obj)}
    instead = None
    while way:
        path, current, reason, left = way[-1]
        leads_back = False
        for step, child in left:
            leads_back = leads_back or id(child) in seen
            if id(child) in seen or isinstance(child, _LEAVES):
                continue
            failure = fails(child)
            if failure is not None:
                seen.add(id(child))
                way.append((path + step, child, failure, _pickled_of(child)))
                break
        else:
            if not leads_back:
                return path, current, reason
            instead = instead or (path, current, reason)
            way.pop()
    return instead or ("", obj, error)
