"""Which keyword arguments a class's constructor takes, also behind `**kwargs`.

`def __init__(self, threshold, **kwargs): super().__init__(**kwargs)` takes `threshold` and what the next class
takes. Its signature says only that it takes everything. The source of `__init__` says where `kwargs` goes.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["suggest", "unknown_keywords"]


class _Use(NamedTuple):
    """What an `__init__` does with its `**kwargs`: the keys that it reads, and the class that it passes the rest to.

    `receiver` is None if the rest goes nowhere, and an empty string if it goes to `super()`.
    """

    keys: frozenset[str]
    receiver: str | None


def unknown_keywords(cls: type, names: Iterable[str]) -> list[str]:
    """Return which of `names` the constructor of `cls` certainly refuses.

    Follows `**kwargs` from class to class. A name counts as known where the source of an `__init__` is missing, or
    where `kwargs` goes anywhere but to the `__init__` of a base class.
    """
    unknown = list(names)
    classes = list(cls.__mro__)
    while unknown and classes:
        current = classes.pop(0)
        function = current.__dict__.get("__init__")
        if function is None or "_bound" in current.__dict__:
            continue
        if not isinstance(function, types.FunctionType):
            return []
        parameters = inspect.signature(function).parameters.values()
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = {parameter.name for parameter in parameters if parameter.kind in by_name}
        keywords = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        use = _use_of_keywords(function, keywords) if keywords else _Use(frozenset(), None)
        if use is None or (keywords and use.receiver is None):
            return []
        unknown = [name for name in unknown if name not in known | use.keys]
        if use.receiver is None:
            return unknown
        if use.receiver:
            while classes and classes[0].__name__ != use.receiver:
                classes.pop(0)
    return []


def _use_of_keywords(function: types.FunctionType, keywords: str) -> _Use | None:
    """Return what a function does with its `**keywords`; None if that cannot be told from its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    keys: set[str] = set()
    receivers: set[str] = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == keywords):
            continue
        key, receiver = _key_read(node, parents), _receiver(node, parents)
        if key is None and receiver is None:
            return None
        keys |= {key} if key is not None else set()
        receivers |= {receiver} if receiver is not None else set()
    return _Use(frozenset(keys), receivers.pop() if receivers else None) if len(receivers) < 2 else None


def _key_read(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> str | None:
    """Return `"x"` of `kwargs["x"]`, `kwargs.pop("x")`, `kwargs.get("x")`, `"x" in kwargs` and the like."""
    parent = parents[node]
    key: Any = None
    if isinstance(parent, ast.Subscript):
        key = parent.slice
    elif isinstance(parent, ast.Compare) and len(parent.ops) == 1 and isinstance(parent.ops[0], (ast.In, ast.NotIn)):
        key = parent.left
    elif isinstance(parent, ast.Attribute) and parent.attr in ("pop", "get", "setdefault"):
        call = parents[parent]
        key = call.args[0] if isinstance(call, ast.Call) and call.func is parent and call.args else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _receiver(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> str | None:
    """Return the class of `Class.__init__(self, **kwargs)`, and an empty string for `super().__init__(**kwargs)`."""
    keyword = parents[node]
    call = parents[keyword]
    if not (isinstance(keyword, ast.keyword) and keyword.arg is None and isinstance(call, ast.Call)):
        return None
    match call.func:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"):
            return ""
        case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr="__init__"):
            return name
    return None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known name that is most like `name`; empty if none is."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
