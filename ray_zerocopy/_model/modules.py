"""Kinds of modules: how each is reduced and rebuilt, in pairs. See Note [Skeletons] in `graph.py`."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import dataclasses
import pickle
import pkgutil
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize

from .kinds import Walk, has_default_reduce, reduces
from .script.write import reduce_script

__all__ = ["flatten_recurrent", "new_object", "set_module_state"]

Tensor = torch.Tensor
GraphModule: Any = torch.fx.GraphModule
new_object = copyreg.__newobj__  # type: ignore[attr-defined]  # pickle has an opcode for it


@reduces(torch.nn.Module)
def _reduce_module(module: torch.nn.Module, walk: Walk) -> Any:
    kind = type(module)
    walk.modules.append(module)
    if "parametrizations" in module.__dict__.get("_modules", ()) and parametrize.is_parametrized(module):
        return reduce_parametrized(module)
    if kind in walk.dispatch_table or not has_default_reduce(kind):
        walk.opaque.append(module)
        walk.constructs = True
        if kind.__reduce__ is GraphModule.__reduce__:
            return reduce_graph_module(module, walk.failure)
    elif has_plain_state(kind):
        return new_object, (kind,), state_of(kind, module), None, None, set_module_state
    elif isinstance(state := state_of(kind, module), tuple) and not hasattr(kind, "__getnewargs__"):
        # torch's quantized convolutions: their __setstate__ wants a module that has been initialized.
        return _new_initialized, (kind,), state
    return NotImplemented


# ---------------------------------------------------------------- plain


def _new_initialized(kind: type[torch.nn.Module]) -> torch.nn.Module:
    module: torch.nn.Module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def has_plain_state(kind: type[torch.nn.Module]) -> bool:
    """Tell whether a module of this class is its `__dict__` and nothing else, as torch pickles it."""
    return (
        kind.__setstate__ is torch.nn.Module.__setstate__
        and getattr(kind, "__getstate__", None) is getattr(torch.nn.Module, "__getstate__", None)
        and kind.__new__ is object.__new__
        and not hasattr(kind, "__slots__")
    )


def state_of(kind: type[torch.nn.Module], module: torch.nn.Module) -> Any:
    getstate = getattr(kind, "__getstate__", None)  # every object has one from Python 3.11 on
    return getstate(module) if getstate is not None else module.__dict__


def set_module_state(module: torch.nn.Module, state: dict[str, Any]) -> None:
    # Module.__setstate__ also adds what pickles of earlier versions of torch lack: a sixth of the time to
    # unpickle BERT, and the state comes from this version.
    object.__setattr__(module, "__dict__", state)


# ---------------------------------------------------------------- TorchScript; the pair of these is in `script/`


@reduces(torch.jit.ScriptModule)
def _reduce_script_module(module: torch.jit.ScriptModule, walk: Walk) -> Any:
    walk.modules.append(module)
    walk.composed = type(module).__name__
    return walk.scripts.reduce(module)


@reduces(torch.jit.ScriptFunction)
def _reduce_script_function(function: Any, walk: Walk) -> Any:
    walk.composed = type(function).__name__
    return reduce_script(function)


@reduces(torch.ScriptMethod)
def _reduce_script_method(method: Any, walk: Walk) -> Any:
    walk.composed = type(method).__name__
    return walk.scripts.reduce_method(method)


# ---------------------------------------------------------------- exported


@reduces(torch.export.ExportedProgram)
def _reduce_exported(program: Any, walk: Walk) -> Any:
    walk.composed = type(program).__name__
    return reduce_exported_program(program)


def reduce_exported_program(program: Any) -> Any:
    """Describe an exported program by torch's own format for its graph, and its tensors beside that.

    Its default pickle would trace the graph anew, and fail.
    """
    from torch._export.serde.serialize import ExportedProgramSerializer  # a second to import

    serialized = ExportedProgramSerializer().serialize(
        program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    )
    tensors = (dict(program.state_dict), dict(program.constants), program.example_inputs)
    return _rebuild_exported_program, (serialized.exported_program, *tensors)


def _rebuild_exported_program(graph: Any, state: dict[str, Tensor], constants: dict[str, Any], example: Any) -> Any:
    from torch._export.serde.serialize import ExportedProgramDeserializer

    with _torch_globals:
        return ExportedProgramDeserializer().deserialize(graph, state, constants, example)


# ---------------------------------------------------------------- parametrized


def reduce_parametrized(module: torch.nn.Module) -> Any:
    """Describe a module whose class torch made for it alone, and refuses to pickle, by the class under that."""
    kind = parametrize.type_before_parametrizations(module)
    names = tuple(module.parametrizations.keys())  # type: ignore[operator,union-attr]
    return _new_parametrized, (kind, names), state_of(kind, module), None, None, _set_parametrized_state


def _new_parametrized(kind: type[torch.nn.Module], names: tuple[str, ...]) -> torch.nn.Module:
    module: torch.nn.Module = object.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        object.__setattr__(module, "__dict__", {"_parameters": {}, "_buffers": {}, "_modules": {}})
        parametrize._inject_property(module, name)
    return module


def _set_parametrized_state(module: torch.nn.Module, state: Any) -> None:
    kind: Any = parametrize.type_before_parametrizations(module)
    kind.__setstate__(module, state)


# ---------------------------------------------------------------- traced by torch.fx


_GRAPH_ATTRIBUTES = ("_graph", "_code", "_lineno_map", "_prologue_start")
# torch puts the code that it traces on a class, one for all threads, and its reader of exported programs in a global.
_torch_globals = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _NodeNumber:
    """Stands for a node among the arguments of a later one."""

    number: int


def reduce_graph_module(module: Any, failure: Callable[[object], Exception | None]) -> Any:
    """Describe a GraphModule by its nodes, or by its code where these do not pickle, as `failure` tells.

    The code is traced to have nodes again, and torch changes `nn.Module` itself while it traces: whoever calls a
    model in another thread meanwhile gets an error.
    """
    nodes = _describe_nodes(module.graph)
    if nodes is None or failure(nodes):
        return _rebuild_from_code, module.__reduce__()[1]
    state = {name: value for name, value in module.__dict__.items() if name not in _GRAPH_ATTRIBUTES}
    return _rebuild_from_nodes, (type(module).__name__, state, nodes)


def _describe_nodes(graph: Any) -> list[tuple[Any, ...]] | None:
    """Return op, target, arguments, name and type of each node; None where these are not all there is to a graph."""
    if type(graph._codegen) is not torch.fx.graph.CodeGen or graph._codegen._body_transformer is not None:
        return None
    nodes: list[tuple[Any, ...]] = []
    numbers: dict[Any, _NodeNumber] = {}
    try:
        for node in graph.nodes:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)  # type: ignore[arg-type]
            target = _importable(node.target) if node.op == "call_function" else node.target
            numbers[node] = _NodeNumber(len(nodes))
            nodes.append((node.op, target, args, kwargs, node.name, node.type))
    except Exception:
        return None
    return nodes


def _importable(function: Any) -> Any:
    """Return a function as it can be pickled, or its name; LookupError where neither leads back to it."""
    with contextlib.suppress(Exception):
        if pickle.loads(pickle.dumps(function)) is function:
            return function
    name = torch.fx.node._get_qualified_name(function)
    if pkgutil.resolve_name(name) is not function:
        raise LookupError(name)
    return name


def _rebuild_from_nodes(name: str, state: dict[str, Any], nodes: list[tuple[Any, ...]]) -> torch.nn.Module:
    graph = torch.fx.Graph(tracer_cls=state.get("_tracer_cls"), tracer_extras=state.get("_tracer_extras"))
    made: list[Any] = []

    def known(part: Any) -> Any:
        return made[part.number] if type(part) is _NodeNumber else part

    for op, target, args, kwargs, called, kind in nodes:
        if op == "call_function" and isinstance(target, str):
            target = pkgutil.resolve_name(target)
        given = torch.fx.node.map_aggregate((args, kwargs), known)
        made.append(graph.create_node(op, target, *given, called, kind))
    root = torch.nn.Module()
    root.__dict__.update(state)
    module: torch.nn.Module = GraphModule(root, graph, name)
    module.__dict__.update(state)
    return module


def _rebuild_from_code(body: dict[str, Any], imports: str) -> torch.nn.Module:
    """Make a GraphModule as torch does, but with the hooks, names and order that it had."""
    with _torch_globals:
        module = torch.fx.graph_module.reduce_graph_module(body, imports)
    module.__dict__.update((name, value) for name, value in body.items() if name not in _GRAPH_ATTRIBUTES)
    return module


# ---------------------------------------------------------------- recurrent


def flatten_recurrent(modules: Sequence[torch.nn.RNNBase], tensors: Sequence[Tensor]) -> None:
    """Bring an RNN's weights on a CUDA device into one block, as cuDNN wants them; else it does so in each call.

    Only where a load could not place them so at once (`Parts.recurrent`): they are twice there meanwhile. Not where
    they are in one storage already, nor where another tensor sees one of them: that tie would go.
    """
    seen = collections.Counter(tensor.untyped_storage()._cdata for tensor in tensors)
    for module in modules:
        storages = [w.untyped_storage()._cdata for w in module._flat_weights if isinstance(w, Tensor) and w.is_cuda]
        if storages and all(seen[storage] == 1 for storage in storages):
            module.flatten_parameters()
