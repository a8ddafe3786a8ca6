"""Read a TorchScript module: its tensors, graphs, graph constants and Python attributes. Never changes the module."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.jit import ScriptFunction, ScriptModule

__all__ = [
    "OwnMethod",
    "attribute_types",
    "attributes",
    "constant_bytes",
    "constants",
    "has_mutable_constants",
    "may_tie_lists",
    "modules",
    "named_tensors",
    "operator_names",
    "python_state",
    "tensors_of",
    "tensors_within",
]

Tensor = torch.Tensor


def modules(cpp: Any) -> Iterator[Any]:
    """Yield a C++ module and its submodules; yield a module twice if two modules hold it."""
    pending = [cpp]
    while pending:
        module = pending.pop()
        yield module
        pending.extend(child for _, child in torch._C.ModuleDict(module).items())


def attribute_types(module: Any) -> dict[str, Any]:
    """Return the types of a C++ module's attributes by name, without its submodules."""
    attributes: Any = torch._C.ConcreteModuleType.from_jit_type(module._type()).get_attributes()  # type: ignore[attr-defined]
    return {name: kind for name, (kind, _) in attributes.items()}


def attributes(cpp: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the value and type of every attribute of the modules, in a fixed order, with duplicates."""
    for module in modules(cpp):
        for name, kind in attribute_types(module).items():
            yield module.getattr(name), kind


def tensors_of(cpp: Any) -> Iterator[Tensor]:
    """Yield the tensors in the attributes, also nested ones, in a fixed order, with duplicates."""
    for value, _ in attributes(cpp):
        yield from tensors_within(value)


def tensors_within(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, dicts and C++ modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for held in value.values():
            yield from tensors_within(held)
    elif isinstance(value, (list, tuple)):
        for held in value:
            yield from tensors_within(held)
    elif isinstance(value, torch._C.ScriptModule):
        yield from tensors_of(value)


# ---------------------------------------------------------------- graphs


def _graphs(cpp: Any) -> Iterator[Any]:
    """Yield the graphs of a module's methods and hooks, with calls inlined, and the graphs that they fork."""
    seen = set()
    for module in modules(cpp):
        methods = [module._get_method(name) for name in module._method_names()]
        for method in (*methods, *module._get_forward_pre_hooks(), *module._get_forward_hooks()):
            if (module.qualified_name, method.name) not in seen:
                seen.add((module.qualified_name, method.name))
                yield from _graph_and_forks(method.inlined_graph)


def _graph_and_forks(graph: Any) -> Iterator[Any]:
    yield graph
    for fork in graph.findAllNodes("prim::fork"):
        forked = fork.g("Subgraph").copy()
        torch._C._jit_pass_inline(forked)
        yield from _graph_and_forks(forked)


def _constants_of(graph: Any) -> Iterator[tuple[Any, Tensor]]:
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") in ("t", "ts", "ival"):
            for tensor in tensors_within(getattr(node, node.kindOf("value"))("value")):
                yield node.output(), tensor


def operator_names(script: ScriptModule | ScriptFunction[Any, Any]) -> set[str]:
    """Return the kinds of the nodes in all graphs of a script: `aten::relu`, `prim::fork`.

    `torch.jit.export_opnames` refuses forks, and crashes on weights that are packed for MKLDNN.
    """
    graphs = _graphs(script._c) if isinstance(script, ScriptModule) else _graph_and_forks(script.inlined_graph)
    return {kind for graph in graphs for kind in _kinds_of_nodes(graph)}


def _kinds_of_nodes(block: Any) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds_of_nodes(inner)


def constants(cpp: Any) -> Iterator[Tensor]:
    """Yield each tensor in the graphs of a module's methods and of the functions that they call, once."""
    seen = set()
    for graph in _graphs(cpp):
        for _, tensor in _constants_of(graph):
            if tensor._cdata not in seen:
                seen.add(tensor._cdata)
                yield tensor


def _function_constants(function: ScriptFunction[Any, Any]) -> Iterator[Tensor]:
    for graph in _graph_and_forks(function.inlined_graph):
        yield from (tensor for _, tensor in _constants_of(graph))


def has_mutable_constants(cpp: Any) -> bool:
    """Tell whether a method may write to a constant of its graph, or return one to a caller who may write to it."""
    for graph in _graphs(cpp):
        held = list(_constants_of(graph))
        if held:
            aliases = graph.alias_db()
            reached = [*graph.inputs(), *graph.outputs()]
            for value, _ in held:
                if aliases.has_writers(value) or any(aliases.may_contain_alias(value, other) for other in reached):
                    return True
    return False


def may_tie_lists(cpp: Any) -> bool:
    """Tell whether a method may assign one list to two attributes. Python cannot see that."""
    for graph in _graphs(cpp):
        for node in graph.findAllNodes("prim::SetAttr"):
            if _has_list(list(node.inputs())[1].type()):
                return True
        for operator in ("aten::append", "aten::insert", "aten::_set_item", "aten::extend", "aten::add_"):
            for node in graph.findAllNodes(operator):
                changed = next(node.inputs()).type()
                if changed.kind() == "ListType" and _has_list(changed.getElementType()):
                    return True
    return False


def _has_list(kind: Any) -> bool:
    return kind.kind() == "ListType" or any(map(_has_list, kind.containedTypes()))


# ---------------------------------------------------------------- the Python side


# The entries of a script module's `__dict__` that torch and `rebuild.py` make.
_DEFAULT_ATTRIBUTES = frozenset((*torch.nn.Module().__dict__, "_c", "_concrete_type", "_initializing", "_compiled"))


class OwnMethod(NamedTuple):
    """A method that a module has in its `__dict__`, without the module."""

    function: Callable[..., Any]


def python_state(module: ScriptModule) -> dict[str, dict[str, Any]]:
    """Return, by module path, the attributes and ignored methods that users set on the Python objects."""
    states = {}
    for path, part in module.named_modules():
        part = part.__dict__.get("_actual_script_module", part)
        state: dict[str, Any] = {}
        for name, value in part.__dict__.items():
            if isinstance(value, types.MethodType):
                if value.__self__ is part:
                    state[name] = OwnMethod(value.__func__)
            elif name not in _DEFAULT_ATTRIBUTES and not isinstance(value, (torch._C.ScriptMethod, property)):
                state[name] = value
        if state:
            states[path] = state
    return states


# ---------------------------------------------------------------- for reports


def constant_bytes(module: ScriptModule | ScriptFunction[Any, Any]) -> int:
    """Return the bytes of the distinct storages in a module's graphs: weights that are in no `state_dict`."""
    found = list(_function_constants(module)) if isinstance(module, ScriptFunction) else list(constants(module._c))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found if torch._C._has_storage(t)}
    return sum(storages.values())


def named_tensors(module: ScriptModule | ScriptFunction[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield parameters, buffers, tensors in attributes, packed weights and graph constants, with their paths."""
    if isinstance(module, ScriptFunction):
        yield from ((".<constant in its graph>", tensor) for tensor in _function_constants(module))
        return
    seen: set[int] = set()
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in named:
        seen.add(tensor._cdata)
        yield f".{name}", tensor
    for tensor in tensors_of(module._c):
        if tensor._cdata not in seen:
            seen.add(tensor._cdata)
            yield ".<attribute>", tensor
    for part in modules(module._c):
        for name, kind in attribute_types(part).items():
            if kind.kind() == "ClassType" and isinstance(value := part.getattr(name), torch.ScriptObject):
                yield f".<{name}>", value
    for tensor in constants(module._c):
        yield ".<constant in its graph>", tensor
