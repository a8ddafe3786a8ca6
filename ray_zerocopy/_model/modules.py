"""Kinds of modules: a pair of functions that reduce and rebuild each. See Note [Skeletons] in `graph.py`."""

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

from ..errors import warn
from .kinds import Refusal, Walk, reduces
from .objects import default_state, has_default_reduce, set_default_state
from .operators import note_graph_operators, note_script_operators
from .pytrees import pytree_registrations, register_pytree_types
from .script.write import reduce_script

__all__ = ["flatten_rnns", "new_object", "set_module_state"]

Tensor = torch.Tensor
GraphModule: Any = torch.fx.GraphModule
new_object = copyreg.__newobj__  # type: ignore[attr-defined]  # pickle writes one opcode for it


@reduces(torch.nn.Module)
def _reduce_module(module: torch.nn.Module, walk: Walk) -> Any:
    kind = type(module)
    walk.modules.append(module)
    if "parametrizations" in module.__dict__.get("_modules", ()) and parametrize.is_parametrized(module):
        return reduce_parametrized(module)
    if kind in walk.dispatch_table or not has_default_reduce(kind):
        walk.opaque_modules.append(module)
        walk.runs_constructors = True
        if kind.__reduce__ is GraphModule.__reduce__:
            note_graph_operators(walk, module)
            return reduce_graph_module(module, walk.pickle_error)
    elif has_plain_state(kind):
        if hasattr(kind, "__slots__"):  # which torch's Module.__setstate__ loses
            return new_object, (kind,), default_state(module), None, None, set_default_state
        return new_object, (kind,), state_of(kind, module), None, None, set_module_state
    elif isinstance(state := state_of(kind, module), tuple) and not hasattr(kind, "__getnewargs__"):
        # torch's quantized convolutions: their __setstate__ needs an initialized module.
        return _new_initialized, (kind,), state
    return NotImplemented


# ---------------------------------------------------------------- plain


def _new_initialized(kind: type[torch.nn.Module]) -> torch.nn.Module:
    module: torch.nn.Module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def has_plain_state(kind: type[torch.nn.Module]) -> bool:
    """Tell whether torch pickles a module of this class as its `__dict__`."""
    return (
        kind.__setstate__ is torch.nn.Module.__setstate__
        and getattr(kind, "__getstate__", None) is getattr(torch.nn.Module, "__getstate__", None)
        and kind.__new__ is object.__new__
    )


def state_of(kind: type[torch.nn.Module], module: torch.nn.Module) -> Any:
    getstate = getattr(kind, "__getstate__", None)  # every object has one from Python 3.11 on
    return getstate(module) if getstate is not None else module.__dict__


def set_module_state(module: torch.nn.Module, state: dict[str, Any]) -> None:
    # Module.__setstate__ also adds attributes that pickles of older torch versions lack. That takes a sixth of the
    # time to unpickle BERT, and this state comes from the same version.
    object.__setattr__(module, "__dict__", state)


# ---------------------------------------------------------------- TorchScript, which `script/` reduces and rebuilds


@reduces(torch.jit.ScriptModule)
def _reduce_script_module(module: torch.jit.ScriptModule, walk: Walk) -> Any:
    walk.modules.append(module)
    walk.fixed_dtype_class = type(module).__name__
    note_script_operators(walk, module)
    return walk.scripts.reduce(module)


@reduces(torch.jit.ScriptFunction)
def _reduce_script_function(function: Any, walk: Walk) -> Any:
    walk.fixed_dtype_class = type(function).__name__
    note_script_operators(walk, function)
    return reduce_script(function)


@reduces(torch.ScriptMethod)
def _reduce_script_method(method: Any, walk: Walk) -> Any:
    walk.fixed_dtype_class = type(method).__name__
    return walk.scripts.reduce_method(method)


@reduces(torch.jit._script.ScriptMethodStub)
def _refuse_script_method_stub(stub: Any, walk: Walk) -> Any:
    raise Refusal(
        f"it is {stub.original_method.__qualname__}, a script_method of a ScriptModule class of the script",
        "Write the class as an nn.Module and compile its objects, torch.jit.script(module), or move it to a module "
        "that workers can import.",
    )


# ---------------------------------------------------------------- exported


@reduces(torch.export.ExportedProgram)
def _reduce_exported(program: Any, walk: Walk) -> Any:
    walk.fixed_dtype_class = type(program).__name__
    note_graph_operators(walk, program.graph_module)
    return reduce_exported_program(program)


def reduce_exported_program(program: Any) -> Any:
    """Reduce an exported program to torch's serialization of its graph, and its tensors.

    The default pickle traces the graph again, and fails.
    """
    from torch._export.serde.serialize import ExportedProgramSerializer  # the import takes a second

    serialized = ExportedProgramSerializer().serialize(
        program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    )
    tensors = (dict(program.state_dict), dict(program.constants), program.example_inputs)
    calls = [entry.signature for entry in program.module_call_graph if entry.signature is not None]
    specs = [spec for call in calls for spec in (call.in_spec, call.out_spec)]
    return _rebuild_exported_program, (serialized.exported_program, *tensors, pytree_registrations(specs))


def _rebuild_exported_program(
    graph: Any, state: dict[str, Tensor], constants: dict[str, Any], example: Any, registrations: list[Any]
) -> Any:
    from torch._export.serde.serialize import ExportedProgramDeserializer

    register_pytree_types(registrations)
    with _torch_globals:
        return ExportedProgramDeserializer().deserialize(graph, state, constants, example)


# ---------------------------------------------------------------- parametrized


def reduce_parametrized(module: torch.nn.Module) -> Any:
    """Reduce a parametrized module to its original class: torch cannot pickle the class that it makes per module."""
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
# torch's tracer sets attributes of a class, and its deserializer of exported programs a global variable.
_torch_globals = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _NodeNumber:
    """A reference to an earlier node, among the arguments of a node."""

    number: int


def reduce_graph_module(module: Any, pickle_error: Callable[[object], Exception | None]) -> Any:
    """Reduce a GraphModule to its nodes, or to its code if `pickle_error` finds that the nodes do not pickle.

    Nodes are better. Rebuilding from code traces the code, and torch patches `nn.Module` while it traces: a call of
    a model in another thread raises an error meanwhile.
    """
    nodes = _describe_nodes(module.graph)
    marks = _marks_of(module.graph, pickle_error)
    if nodes is None or pickle_error(nodes):
        body, imports = module.__reduce__()[1]
        if "__main__" in imports:
            raise Refusal(
                "its code imports names of __main__, which no worker can import",
                "Move the functions that it calls to a module that workers can import.",
            )
        return _rebuild_from_code, (body, imports, marks)
    state = {name: value for name, value in module.__dict__.items() if name not in _GRAPH_ATTRIBUTES}
    return _rebuild_from_nodes, (type(module).__name__, state, nodes, marks)


# The entries of `Node.meta` that torch's tracers write. They hold what the tracing knew, such as fake tensors.
_META_OF_TORCH = frozenset(
    [
        *("val", "example_value", "tensor_meta", "unbacked_bindings", "nn_module_stack", "fwd_nn_module_stack"),
        *("source_fn_stack", "fwd_source_fn_stack", "stack_trace", "torch_fn", "original_aten", "from_node"),
        *("eager_input_vals", "arg_kwarg_vals", "is_gradient_acc", "type", "mutation_region_id"),
    ]
)


def _marks_of(graph: Any, pickle_error: Callable[[object], Exception | None]) -> dict[str, Any]:
    """Return the attributes that a user set on a graph (under the name ""), and on its nodes and their `meta`."""
    standard = vars(torch.fx.Graph())
    own: dict[str, Any] = {name: value for name, value in vars(graph).items() if name not in standard}
    marks: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"": (own, {})} if own else {}
    for node in graph.nodes:
        attributes = dict(getattr(node, "__dict__", {}))
        meta = {name: value for name, value in node.meta.items() if name not in _META_OF_TORCH}
        if attributes or meta:
            marks[node.name] = (attributes, meta)
    if marks and pickle_error(marks):
        for place, parts in marks.items():
            for part in parts:
                for name in [name for name, value in part.items() if pickle_error(value)]:
                    del part[name]
                    warn(
                        f"{name!r} of {f'the node {place}' if place else 'the graph'} of a GraphModule cannot be "
                        f"pickled and does not reach the workers. The output of the model does not depend on it."
                    )
    return marks


def _set_marks(graph: Any, marks: dict[str, Any]) -> None:
    """Set what `_marks_of` returned, on the nodes that still have their names."""
    places: dict[str, Any] = {"": graph} | {node.name: node for node in graph.nodes}
    for place in marks.keys() & places.keys():
        attributes, meta = marks[place]
        places[place].__dict__.update(attributes)
        if place:
            places[place].meta.update(meta)


def _describe_nodes(graph: Any) -> list[tuple[Any, ...]] | None:
    """Return op, target, arguments, name and type of each node; None if they do not describe the whole graph."""
    if type(graph._codegen) is not torch.fx.graph.CodeGen or graph._codegen._body_transformer is not None:
        return None
    nodes: list[tuple[Any, ...]] = []
    numbers: dict[Any, _NodeNumber] = {}
    try:
        for node in graph.nodes:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)  # type: ignore[arg-type]
            target = _importable_form(node.target) if node.op == "call_function" else node.target
            numbers[node] = _NodeNumber(len(nodes))
            nodes.append((node.op, target, args, kwargs, node.name, node.type))
    except Exception:
        return None
    return nodes


def _importable_form(function: Any) -> Any:
    """Return the function if it can be pickled, otherwise its name. Raise LookupError if both are impossible."""
    with contextlib.suppress(Exception):
        if pickle.loads(pickle.dumps(function)) is function:
            return function
    name = torch.fx.node._get_qualified_name(function)
    if pkgutil.resolve_name(name) is not function:
        raise LookupError(name)
    return name


def _rebuild_from_nodes(
    name: str, state: dict[str, Any], nodes: list[tuple[Any, ...]], marks: dict[str, Any]
) -> torch.nn.Module:
    graph = torch.fx.Graph(tracer_cls=state.get("_tracer_cls"), tracer_extras=state.get("_tracer_extras"))
    created: list[Any] = []

    def resolve(part: Any) -> Any:
        return created[part.number] if type(part) is _NodeNumber else part

    for op, target, args, kwargs, node_name, kind in nodes:
        if op == "call_function" and isinstance(target, str):
            target = pkgutil.resolve_name(target)
        arguments = torch.fx.node.map_aggregate((args, kwargs), resolve)
        created.append(graph.create_node(op, target, *arguments, node_name, kind))
    _set_marks(graph, marks)
    root = torch.nn.Module()
    root.__dict__.update(state)
    module: torch.nn.Module = GraphModule(root, graph, name)
    module.__dict__.update(state)
    return module


def _rebuild_from_code(body: dict[str, Any], imports: str, marks: dict[str, Any]) -> torch.nn.Module:
    """Rebuild a GraphModule as torch does, and restore the hooks, names and order of its parts."""
    with _torch_globals:
        module = torch.fx.graph_module.reduce_graph_module(body, imports)
    module.__dict__.update((name, value) for name, value in body.items() if name not in _GRAPH_ATTRIBUTES)
    _set_marks(module.graph, marks)
    return module


# ---------------------------------------------------------------- recurrent


def flatten_rnns(modules: Sequence[torch.nn.RNNBase], tensors: Sequence[Tensor]) -> None:
    """Move the weights of RNNs on a CUDA device into one block each. Otherwise cuDNN copies the weights in each call.

    Skips an RNN whose weights are in one storage already: the load has placed them (`Parts.rnns`). Skips an RNN if
    another tensor shares a storage with a weight, because flattening would break the tie. Flattening needs device
    memory for a second copy of the weights, until it ends.
    """
    seen = collections.Counter(tensor.untyped_storage()._cdata for tensor in tensors)
    for module in modules:
        storages = [w.untyped_storage()._cdata for w in module._flat_weights if isinstance(w, Tensor) and w.is_cuda]
        if storages and all(seen[storage] == 1 for storage in storages):
            module.flatten_parameters()
