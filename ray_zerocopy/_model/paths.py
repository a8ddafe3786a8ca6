"""Walk object graphs with the path of each object, for reports, for error messages and to find models.

A path is written as in Python: `.encoder.layers[0].weight`, `['key']`. A step without a Python expression is in angle
brackets, such as `.<closure scale>`. The walk runs no code of the objects, such as properties.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .kinds import Refusal, has_default_reduce
from .script import parts
from .training_wrappers import RefusedPart

__all__ = [
    "attributes_of",
    "children",
    "follow",
    "global_names",
    "pickled_children",
    "too_deep_error",
    "unpicklable_error",
    "walk",
]


def children(obj: object) -> Iterator[tuple[str, Any]]:
    """Yield the objects that `obj` holds directly, each after its step of a path: `.name`, `[0]`, `['key']`."""
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
        name = getattr(obj.__func__, "__name__", "")  # a partial has no name
        if getattr(type(obj.__self__), name, None) is not obj.__func__:  # bound by hand to this object
            yield ".__func__", obj.__func__
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            try:
                yield f".<closure {name}>", cell.cell_contents
            except ValueError:
                continue
        names = obj.__code__.co_varnames[: obj.__code__.co_argcount][-len(obj.__defaults__ or ()) :]
        defaults = {**dict(zip(names, obj.__defaults__ or (), strict=False)), **(obj.__kwdefaults__ or {})}
        yield from ((f".<default {name}>", value) for name, value in defaults.items())
    if isinstance(obj, (type, type(torch), torch.fx.Graph)):  # the tensors of a graph are fake tensors
        return
    if isinstance(obj, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        yield from parts.named_tensors(obj)
        return
    yield from _named_attributes(obj, attributes_of(obj))
    for kind in type(obj).__mro__:
        if "__slots__" not in kind.__dict__:
            continue
        for name, slot in kind.__dict__.items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield f".{_unmangle(kind, name)}", slot.__get__(obj)
                except AttributeError:  # never set
                    continue


def attributes_of(obj: object) -> dict[str, Any]:
    """Return an object's `__dict__` without running `__getattr__` or following a proxy; empty if there is none."""
    try:
        attributes = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _named_attributes(obj: object, attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    of_module = isinstance(obj, torch.nn.Module)
    for name, value in list(attributes.items()):
        if of_module and name in ("_parameters", "_buffers", "_modules"):
            yield from ((f".{key}", held) for key, held in list(value.items()))
        else:
            yield f".{name}", value


def _unmangle(kind: type, name: str) -> str:
    prefix = f"_{kind.__name__.lstrip('_')}__"
    return name[len(prefix) - 2 :] if name.startswith(prefix) else name


_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def walk(
    obj: object,
    path: str = "",
    stop_at: tuple[type, ...] = (),
    children_of: Callable[[object], Iterator[tuple[str, Any]]] = children,
) -> Iterator[tuple[str, Any]]:
    """Yield `obj` and every object reachable from it once, each after its path. Never runs a property.

    Yields instances of the types in `stop_at`, but not the objects that they hold. `children_of` yields the objects
    that one holds.
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
        pending.extend(reversed([(path + step, child) for step, child in children_of(current)]))


def follow(obj: object, path: str) -> Any:
    """Return the object at a path such as `.stages[0].model`. A string key may have quotes of either kind.

    Raises:
        LookupError: There is no object at the path.
    """
    if not path:
        return obj
    for step, child in children(obj):
        length = len(step) if path.startswith(step) else _key_length(path, step)
        if length and path[length : length + 1] in ("", ".", "["):
            with contextlib.suppress(LookupError):  # names with a dot are ambiguous: try the next child
                return follow(child, path[length:])
    raise LookupError(path)


def _key_length(path: str, step: str) -> int:
    """Return the length of a step at the beginning of a path if the path has the other kind of quotes, else 0."""
    if not step.startswith(("['", '["')) or "\\" in step:
        return 0
    quote = '"' if step[1] == "'" else "'"
    return len(step) if path.startswith(f"[{quote}{step[2:-2]}{quote}]") else 0


# ---------------------------------------------------------------- unpicklable objects


def unpicklable_error(obj: object, pickle_error: Callable[[object], Exception | None], error: Exception) -> TypeError:
    """Return a TypeError with the path of the deepest part of `obj` that cannot be pickled, and a remedy.

    `pickle_error` pickles a part on trial, and returns the exception or None. `error` is the exception for `obj`.
    """
    if isinstance(error, RefusedPart):
        path = next((path for path, part in walk(obj) if part is error.part), "")
        return TypeError(error.message(type(obj).__qualname__, path))
    path, reason, parts_on_the_way = _find_culprit(obj, pickle_error, error)
    culprit = parts_on_the_way[-1]
    where = f"{type(obj).__qualname__}{path}" if path else type(obj).__qualname__
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    if "._guards_fn." in path:
        return TypeError(
            f"{where.split('._guards_fn')[0].rpartition('>.')[2]} was made by ExportedProgram.module(), which torch "
            f"cannot pickle. Share the ExportedProgram instead, and call its module() in the worker."
        )
    if len(where) > 300:
        where = f"{where[:100]} ... {where[-150:]}"
    fact = f"{type(obj).__qualname__} cannot be shared: {where} is a {kind}"
    if isinstance(reason, Refusal):
        return TypeError(f"{fact}, which cannot be pickled: {reason}. {reason.remedy}")
    return TypeError(
        f"{fact}, which cannot be pickled ({type(reason).__name__}: {reason}). {_remedy(parts_on_the_way)}"
    )


def _remedy(way: list[object]) -> str:
    """Say what to do about the last of the objects on the way from the root to a part that does not pickle."""
    code = [number for number, part in enumerate(way[:-1]) if isinstance(part, (type, types.FunctionType))]
    holders = [part for part in way[code[-1] + 1 if code else 0 :] if _is_of_user_class(part)]
    if holders:
        return (
            f"Remove it before sharing and create it again in the worker, or leave it out in "
            f"{type(holders[-1]).__qualname__}.__getstate__."
        )
    if code:  # a global or an attribute of a class, which the code of the model brings along
        name = getattr(way[code[-1]], "__qualname__", "")
        return (
            f"{name} travels by value and brings it along. Move {name} to a module that workers can import, or "
            f"create the object in the worker, on first use."
        )
    return "Remove it before sharing and create it again in the worker."


def too_deep_error(obj: object) -> TypeError:
    """Return the error for an object whose parts are nested too deep for pickle."""
    deepest, pending, seen = (0, ""), [(0, "", obj)], set()
    while pending:
        depth, path, current = pending.pop()
        if id(current) not in seen and not isinstance(current, _LEAVES):
            seen.add(id(current))
            deepest = max(deepest, (depth, path), key=lambda place: place[0])
            pending += [(depth + 1, path[:60] + step[-20:], child) for step, child in children(current)]
    depth, path = deepest
    return TypeError(
        f"{type(obj).__qualname__} cannot be shared: its parts are nested {depth} deep, too deep for pickle. "
        f"The deepest part begins at {type(obj).__qualname__}{path[:60]}. Hold the parts in one list (nn.ModuleList) "
        f"instead of in each other."
    )


def _is_of_user_class(part: object) -> bool:
    """Tell whether a user may add methods to the class of `part`: it is of no standard library and not torch's."""
    if not type(part).__flags__ & _HEAP_TYPE:
        return False
    top = type(part).__module__.partition(".")[0]
    return (top not in sys.stdlib_module_names and top != "torch") or top == "__main__"


_HEAP_TYPE = 1 << 9  # a class that Python code made, Py_TPFLAGS_HEAPTYPE
# Every object has a __getstate__ from Python 3.11 on.
_DEFAULT_GETSTATE = getattr(object, "__getstate__", None)
_MODULE_GETSTATE = getattr(torch.nn.Module, "__getstate__", None)


def _pickled_parts(obj: object) -> Iterator[tuple[str, Any]]:
    """Yield the objects that pickle reads from `obj`, each after its step of a path.

    These are the values of a dict that `__getstate__` returns; otherwise the children, and the class or globals.
    """
    if isinstance(obj, torch.jit.ScriptModule):
        for path, attributes in parts.python_state(obj).items():
            yield from ((f".{path}.{name}" if path else f".{name}", value) for name, value in attributes.items())
        return
    state = _chosen_state(obj)
    if state is not None:
        yield from _named_attributes(obj, state)
        return
    yield from children(obj)
    if isinstance(obj, types.FunctionType):
        used = (name for name in global_names(obj.__code__) if name in obj.__globals__)
        yield from ((f".<global {name}>", obj.__globals__[name]) for name in used)
    elif isinstance(obj, type):
        yield from _named_attributes(obj, dict(obj.__dict__))
    else:
        yield ".__class__", type(obj)


def pickled_children(obj: object) -> Iterator[tuple[str, Any]]:
    """Yield as `children` does, but of an object whose class has a `__getstate__` only what that returns."""
    state = _chosen_state(obj)
    yield from children(obj) if state is None else _named_attributes(obj, state)


def _chosen_state(obj: object) -> dict[str, Any] | None:
    """Return the dict that the `__getstate__` of an object's class returns; None if there is none."""
    kind: Any = type(obj)
    getstate = getattr(kind, "__getstate__", None)
    if not has_default_reduce(kind) or getstate in (None, _DEFAULT_GETSTATE, _MODULE_GETSTATE):
        return None
    state: Any = None
    with contextlib.suppress(Exception):  # then pickling `obj` raises it
        state = getstate(obj)
    return state if isinstance(state, dict) else None


def global_names(code: types.CodeType) -> list[str]:
    """Return the globals that a function's code reads or writes, and those of the functions inside it."""
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname.endswith("_GLOBAL"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    return list(names)


def _find_culprit(
    obj: object, pickle_error: Callable[[object], Exception | None], error: Exception
) -> tuple[str, Exception, list[object]]:
    """Descend from `obj` to a failing part without failing children.

    Returns its path, its exception, and the objects on the way, the part last. A part that refers back to an object
    on the way may fail only because of that object. Other parts are preferred.
    """
    stack = [("", obj, error, _pickled_parts(obj))]
    seen = {id(obj)}
    fallback = None
    while stack:
        path, current, reason, remaining = stack[-1]
        leads_back = False
        if isinstance(reason, Refusal) and reason.part is current:
            remaining = iter(())
        for step, child in remaining:
            leads_back = leads_back or id(child) in seen
            if id(child) in seen or isinstance(child, _LEAVES):
                continue
            failure = pickle_error(child)
            if failure is not None:
                seen.add(id(child))
                stack.append((path + step, child, failure, _pickled_parts(child)))
                break
        else:
            way = [part for _, part, _, _ in stack]
            if not leads_back:
                return path, reason, way
            fallback = fallback or (path, reason, way)
            stack.pop()
    return fallback or ("", error, [obj])
