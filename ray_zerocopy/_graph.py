"""An object graph <-> a skeleton and a list of tensors. Knows torch and Ray's pickler, never a Ray cluster.

Note [Skeletons]

`take_apart` pickles the graph with Ray's cloudpickle, so that classes from a notebook travel, but leaves a
placeholder (pickle's `persistent_id`) for what has bytes to share. `put_together` fills the placeholders in::

    model ----pickle----> skeleton: ... PERSID 0 ... PERSID 1 ... PERSID 0 ...    (a few 10 KB)
       |                                   |           |            |
       +--> tensors:  [ 0: weight, 1: bias ] <---------+            a tie is the same number twice

Three kinds of tensors:

plain       a `torch.Tensor` or `Parameter` that is dtype, shape, stride and offset over a storage: it leaves by
            identity, whole, and comes back as a view.
decorated   one of those with attributes of its own, or of a subclass: its data leaves as a plain tensor; type and
            attributes stay in the skeleton.
composed    all else (subclasses that wrap others, quantized, sparse, ...): torch's own reduce describes it, and the
            storages and tensors that it is made of leave from inside that description.

Identity lives in objects and storages, never in `state_dict` keys, so ties, aliases, views, plain attributes
and containers need no rule of their own.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import dataclasses
import enum
import functools
import inspect
import io
import pickle
import pkgutil
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from ray.cloudpickle import CloudPickler
from ray.cloudpickle.cloudpickle import _should_pickle_by_reference
from torch.nn.utils import parametrize

from . import _collector, _script, _script_parts
from ._paths import has_default_reduce, unpicklable, walk

__all__ = ["Parts", "components", "packed_bytes", "put_together", "take_apart"]

Tensor = torch.Tensor
Parameter = torch.nn.Parameter
_new = copyreg.__newobj__  # type: ignore[attr-defined]  # pickle has an opcode for it

# An array (numpy's, Arrow's) of fewer bytes than this stays in the skeleton: a buffer of its own costs more.
SMALLEST_ARRAY = 4096


class Parts(NamedTuple):
    """What `take_apart` makes of an object graph.

    `skeleton` is the pickle stream, `tensors` what its placeholders stand for, `arrays` the buffers that
    non-torch objects (numpy arrays) gave out of band, and `carried` the objects left out by `leave_out`.
    `composed` is the name of a class in it whose parts cannot become another dtype one by one, or empty.
    `constructs` says whether objects are rebuilt by calling their classes, which may look at tensors.
    `recurrent` has the RNNs that torch brings into cuDNN's order, each after the numbers of its weights.
    """

    skeleton: bytes
    tensors: list[Tensor]
    arrays: list[pickle.PickleBuffer]
    carried: list[Any]
    composed: str
    constructs: bool
    recurrent: list[tuple[tuple[int, ...], torch.nn.RNNBase]]


# ---------------------------------------------------------------- taking apart


def take_apart(
    obj: object,
    leave_out: tuple[type, ...] = (),
    objects: Sequence[object] = (),
    *,
    in_process: tuple[type, ...] = (),
) -> Parts:
    """Pickle `obj` into a skeleton, with its tensors taken out; `obj` is not changed.

    Instances of the types in `leave_out`, and `objects`, are not pickled but listed in `Parts.carried`. With
    `in_process`, for what is put together in this process, so are classes, and functions but for those with an
    instance of these types in their closure: rebuilding one that travels by value would change the living one.
    Raises TypeError naming the attribute path of what cannot be pickled.
    """
    scripts = _script.Scripts()
    while True:
        stream = io.BytesIO()
        pickler = _Pickler(stream, leave_out, objects, scripts, in_process)
        try:
            pickler.dump(obj)
            # A second pickle in the same stream, with the same memo: which of the objects just pickled must be
            # touched to give eval mode and requires_grad=False.
            recurrent = [module for module in pickler.modules if isinstance(module, torch.nn.RNNBase)]
            pickler.dump((*_in_training(pickler.modules), pickler.flagged, pickler.opaque, recurrent))
        except _script.BeginAgain:
            scripts.begin_again()
        except Exception as error:

            def fails(part: object) -> Exception | None:
                return _Pickler(io.BytesIO(), leave_out, objects, _script.Scripts(), in_process).failure(part)

            raise unpicklable(obj, fails, error) from error
        else:
            return Parts(
                stream.getvalue(),
                pickler.tensors,
                pickler.arrays,
                pickler.carried,
                pickler.composed,
                pickler.constructs or bool(pickler.composed),
                [(weights, module) for module in recurrent if (weights := pickler.recurrent(module))],
            )


class _Pickler(CloudPickler):  # type: ignore[misc]
    def __init__(
        self,
        stream: io.BytesIO,
        leave_out: tuple[type, ...],
        objects: Sequence[object],
        scripts: _script.Scripts,
        in_process: tuple[type, ...] = (),
    ) -> None:
        self.arrays: list[pickle.PickleBuffer] = []
        # Before super().__init__, which reads it. A flat copy: lookups in cloudpickle's ChainMap take a quarter
        # of the time to pickle BERT. Left out are the reducer for torch.Tensor that Ray puts there for
        # RAY_ENABLE_ZERO_COPY_TORCH_TENSORS, which would hide storages from us and lose strides and flags; and
        # cloudpickle's for an open text file, which would read the file to its end and send the text.
        unwanted = (Tensor, Parameter, io.TextIOWrapper)
        self.dispatch_table = {k: v for k, v in CloudPickler.dispatch_table.items() if k not in unwanted}
        super().__init__(stream, protocol=5, buffer_callback=self._take_array)
        self.leave_out = leave_out
        self.in_process = in_process
        self.objects = {id(part) for part in objects}
        self.tensors: list[Tensor] = []
        self.carried: list[Any] = []
        self.modules: list[torch.nn.Module] = []
        self.flagged: list[Tensor] = []
        self.opaque: list[torch.nn.Module] = []
        self.scripts = scripts
        self.composed = ""
        self.constructs = False
        # Names of objects that are pickled by name, by id; empty for one that is not.
        self._module_level: dict[int, str] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []
        self._unknown = self._meet
        self._identify: dict[type, Callable[[Any], Any] | None] = {
            Tensor: self._plain_id,
            Parameter: self._plain_id,
            torch.UntypedStorage: self._storage_id,
            torch.storage.TypedStorage: self._storage_id,
            _script.Asked: lambda _: ("keep_flags",),
        }
        if in_process:
            self._identify[types.FunctionType] = functools.partial(self._function_id, in_process)
            self.leave_out = (*leave_out, type)

    def failure(self, part: object) -> Exception | None:
        """Try to pickle a part, and return what was raised, or None."""
        try:
            self.dump(part)
        except _script.BeginAgain:
            return None
        except Exception as failure:
            return failure
        return None

    def recurrent(self, module: torch.nn.RNNBase) -> tuple[int, ...]:
        """Return the numbers of an RNN's weights; none if they are not as torch made them."""
        weights = module.__dict__.get("_flat_weights", ())
        numbers = [self._numbers.get(id(weight), -1) for weight in weights]
        left = all(0 <= n < len(self.tensors) and self.tensors[n] is w for n, w in zip(numbers, weights, strict=True))
        whole = 0 < len(set(numbers)) == len(numbers) == len(module.__dict__.get("_flat_weights_names", ()))
        torchs = getattr(module.flatten_parameters, "__func__", None) is torch.nn.RNNBase.flatten_parameters
        return tuple(numbers) if left and whole and torchs else ()

    def persistent_id(self, obj: Any) -> Any:
        # Called for every object of the graph, strings and all: one lookup decides for nearly all of them.
        identify = self._identify.get(type(obj), self._unknown)
        return identify(obj) if identify is not None else None

    def _meet(self, obj: Any) -> Any:
        """Decide for a type that has not been met before."""
        kind = type(obj)
        if kind in weakref.ProxyTypes:
            raise TypeError(f"cannot pickle 'weakref.{kind.__name__}' object")  # else it passes for what it points to
        identify = self._carried_id if issubclass(kind, self.leave_out) else None
        if identify is None and self.objects:
            identify = self._carried_id_if_named
        self._identify[kind] = identify
        return identify(obj) if identify is not None else None

    def _plain_id(self, tensor: Tensor) -> Any:
        return self._number(tensor, tensor) if _is_plain(tensor) else None

    def _carried_id(self, obj: Any) -> Any:
        number = self._numbers.get(id(obj))
        if number is None:
            if isinstance(obj, torch.jit.ScriptModule):
                self.scripts.add(obj)
            number = self._numbers[id(obj)] = len(self.carried)
            self.carried.append(obj)
        return ("carried", number)

    def _function_id(self, anew_with: tuple[type, ...], function: types.FunctionType) -> Any:
        by_value = any(isinstance(part, anew_with) for _, part in walk(function, stop_at=anew_with))
        return self._carried_id_if_named(function) if by_value else self._carried_id(function)

    def _carried_id_if_named(self, obj: Any) -> Any:
        return self._carried_id(obj) if id(obj) in self.objects else None

    def _dynamic_function_reduce(self, function: types.FunctionType) -> Any:
        """Describe a function by value, but for what only its module can make: that stays the module's own.

        Such is what the hooks that transformers puts into its models note their outputs in.
        """
        reduced = super()._dynamic_function_reduce(function)
        for name, value in reduced[2][1]["__globals__"].items():
            if id(value) not in self._module_level and _is_of_module(function.__module__, name, value):
                self._module_level[id(value)] = "" if self._goes_by_value(value) else name
        return reduced

    def _goes_by_value(self, value: object) -> bool:
        self._module_level[id(value)] = ""  # its own functions may use it
        return self._trial().failure(value) is None

    def _trial(self) -> _Pickler:
        """Return a pickler like this one, to try a part with."""
        trial = _Pickler(io.BytesIO(), self.leave_out, (), _script.Scripts(), self.in_process)
        trial._module_level = self._module_level
        return trial

    def reducer_override(self, obj: Any) -> Any:
        if name := self._module_level.get(id(obj)):
            return name
        kind = type(obj)
        if kind is collections.OrderedDict:
            # A module has eleven, nearly all empty, and OrderedDict's own reduce is slow.
            return NotImplemented if obj or obj.__dict__ else (collections.OrderedDict, ())
        if isinstance(obj, torch.nn.Module):
            self.modules.append(obj)
            if isinstance(obj, torch.jit.ScriptModule):
                self.composed = kind.__name__
                return self.scripts.reduce(obj)
            if "parametrizations" in obj.__dict__.get("_modules", ()) and parametrize.is_parametrized(obj):
                return _reduce_parametrized(obj)
            if kind in self.dispatch_table or not has_default_reduce(kind):
                self.opaque.append(obj)
                self.constructs = True
                if kind.__reduce__ is _GraphModule.__reduce__:
                    return _reduce_traced(obj, self._trial().failure)
            elif _has_plain_state(kind):
                return _new, (kind,), _state_of(kind, obj), None, None, _set_state
            elif isinstance(state := _state_of(kind, obj), tuple) and not hasattr(kind, "__getnewargs__"):
                # torch's quantized convolutions: their __setstate__ wants a module that has been initialized.
                return _new_initialized, (kind,), state
        elif issubclass(kind, Tensor):
            self.flagged.append(obj)
            if kind not in self.dispatch_table and _is_decorated(obj):
                if kind is not Tensor and not issubclass(kind, Parameter):
                    self.composed = f"{kind.__name__} of {obj.dtype}"
                return _reduce_decorated(obj)
            if any(True for _ in components(obj)):
                self.composed = f"{kind.__name__} of {obj.dtype}"
            if kind is Tensor and obj.is_quantized:
                return _reduce_quantized(obj)
            if kind is Tensor and obj.requires_grad and obj.layout is not torch.strided:
                return Tensor.requires_grad_, (obj.detach(),), dict(obj.__dict__), None, None, _set_attributes
            return NotImplemented
        elif kind is torch.jit.ScriptFunction:
            self.composed = kind.__name__
            return _script.reduce_script(obj)
        elif kind is torch.ScriptMethod:
            self.composed = kind.__name__
            return self.scripts.reduce_method(obj)
        elif kind.__name__ == "ExportedProgram" and kind.__module__ == "torch.export.exported_program":
            self.composed = kind.__name__
            return _reduce_exported(obj)
        if not issubclass(kind, _REDUCED_BY_TORCH_OR_PYTHON) and (
            kind in self.dispatch_table or not has_default_reduce(kind)
        ):
            self.constructs = True
        return super().reducer_override(obj)

    def _number(self, key: object, tensor: Tensor) -> int:
        number = self._numbers.get(id(key))
        if number is None:
            number = self._numbers[id(key)] = len(self.tensors)
            self.tensors.append(tensor)
            self._alive.append(key)  # an id is only good while its object lives
        return number

    def _storage_id(self, storage: Any) -> Any:
        if isinstance(storage, torch.UntypedStorage):
            untyped, dtype = storage, None
        else:
            untyped, dtype = storage._untyped_storage, storage.dtype
        if untyped.device.type == "meta":
            return None
        whole = torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)
        return ("storage", self._number(storage, whole), dtype)

    def _take_array(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            small = buffer.raw().nbytes < SMALLEST_ARRAY
        except BufferError:  # not contiguous: pickle copies it into the stream
            small = True
        if not small:
            self.arrays.append(buffer)
        return small


def _is_of_module(module: str, name: str, value: object) -> bool:
    """Tell whether a global is its module's own object, of a class that is imported from there in any case."""
    kind = type(value)
    there = getattr(sys.modules.get(module), name, None) is value
    return there and kind.__module__ == module and _should_pickle_by_reference(kind)


_REDUCED_BY_TORCH_OR_PYTHON = (
    *(type, enum.Enum, functools.partial, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(torch.nn.Module, Tensor, torch.dtype, torch.Size, torch.device, torch.layout, torch.memory_format),
)


def _new_initialized(kind: type[torch.nn.Module]) -> torch.nn.Module:
    module: torch.nn.Module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def _has_plain_state(kind: type[torch.nn.Module]) -> bool:
    """Tell whether a module of this class is its `__dict__` and nothing else, as torch pickles it."""
    return (
        kind.__setstate__ is torch.nn.Module.__setstate__
        and getattr(kind, "__getstate__", None) is getattr(torch.nn.Module, "__getstate__", None)
        and kind.__new__ is object.__new__
        and not hasattr(kind, "__slots__")
    )


def _state_of(kind: type[torch.nn.Module], module: torch.nn.Module) -> Any:
    getstate = getattr(kind, "__getstate__", None)  # every object has one from Python 3.11 on
    return getstate(module) if getstate is not None else module.__dict__


def _set_state(module: torch.nn.Module, state: dict[str, Any]) -> None:
    # Module.__setstate__ also adds what pickles of earlier versions of torch lack: a sixth of the time to
    # unpickle BERT, and the state comes from this version.
    object.__setattr__(module, "__dict__", state)


def _reduce_exported(program: Any) -> Any:
    """Describe an exported program by torch's own format for its graph, and its tensors beside that.

    Its default pickle would trace the graph anew, and fail.
    """
    from torch._export.serde.serialize import ExportedProgramSerializer  # a second to import

    serialized = ExportedProgramSerializer().serialize(
        program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    )
    tensors = (dict(program.state_dict), dict(program.constants), program.example_inputs)
    return _rebuild_exported, (serialized.exported_program, *tensors)


def _rebuild_exported(graph: Any, state: dict[str, Tensor], constants: dict[str, Any], example: Any) -> Any:
    from torch._export.serde.serialize import ExportedProgramDeserializer

    with _one_at_a_time:
        return ExportedProgramDeserializer().deserialize(graph, state, constants, example)


def _reduce_parametrized(module: torch.nn.Module) -> Any:
    """Describe a module whose class torch made for it alone, and refuses to pickle, by the class under that."""
    kind = parametrize.type_before_parametrizations(module)
    names = tuple(module.parametrizations.keys())  # type: ignore[operator,union-attr]
    return _new_parametrized, (kind, names), _state_of(kind, module), None, None, _set_parametrized_state


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


_GraphModule: Any = torch.fx.GraphModule
_OF_GRAPH = ("_graph", "_code", "_lineno_map", "_prologue_start")
# torch puts the code that it traces on a class, one for all threads, and its reader of exported programs in a global.
_one_at_a_time = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Earlier:
    """Stands for a node among the arguments of a later one."""

    number: int


def _reduce_traced(module: Any, failure: Callable[[object], Exception | None]) -> Any:
    """Describe a GraphModule by its nodes, or by its code where these do not pickle, as `failure` tells.

    The code is traced to have nodes again, and torch changes `nn.Module` itself while it traces: whoever calls a
    model in another thread meanwhile gets an error.
    """
    nodes = _nodes_of(module.graph)
    if nodes is None or failure(nodes):
        return _rebuild_traced, module.__reduce__()[1]
    state = {name: value for name, value in module.__dict__.items() if name not in _OF_GRAPH}
    return _rebuild_of_nodes, (type(module).__name__, state, nodes)


def _nodes_of(graph: Any) -> list[tuple[Any, ...]] | None:
    """Return op, target, arguments, name and type of each node; None where these are not all there is to a graph."""
    if type(graph._codegen) is not torch.fx.graph.CodeGen or graph._codegen._body_transformer is not None:
        return None
    nodes: list[tuple[Any, ...]] = []
    numbers: dict[Any, _Earlier] = {}
    try:
        for node in graph.nodes:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)  # type: ignore[arg-type]
            target = _found_again(node.target) if node.op == "call_function" else node.target
            numbers[node] = _Earlier(len(nodes))
            nodes.append((node.op, target, args, kwargs, node.name, node.type))
    except Exception:
        return None
    return nodes


def _found_again(function: Any) -> Any:
    """Return a function as it can be pickled, or its name; LookupError where neither leads back to it."""
    with contextlib.suppress(Exception):
        if pickle.loads(pickle.dumps(function)) is function:
            return function
    name = torch.fx.node._get_qualified_name(function)
    if pkgutil.resolve_name(name) is not function:
        raise LookupError(name)
    return name


def _rebuild_of_nodes(name: str, state: dict[str, Any], nodes: list[tuple[Any, ...]]) -> torch.nn.Module:
    graph = torch.fx.Graph(tracer_cls=state.get("_tracer_cls"), tracer_extras=state.get("_tracer_extras"))
    made: list[Any] = []

    def known(part: Any) -> Any:
        return made[part.number] if type(part) is _Earlier else part

    for op, target, args, kwargs, called, kind in nodes:
        if op == "call_function" and isinstance(target, str):
            target = pkgutil.resolve_name(target)
        given = torch.fx.node.map_aggregate((args, kwargs), known)
        made.append(graph.create_node(op, target, *given, called, kind))
    root = torch.nn.Module()
    root.__dict__.update(state)
    module: torch.nn.Module = _GraphModule(root, graph, name)
    module.__dict__.update(state)
    return module


def _rebuild_traced(body: dict[str, Any], imports: str) -> torch.nn.Module:
    """Make a GraphModule as torch does, but with the hooks, names and order that it had."""
    with _one_at_a_time:
        module = torch.fx.graph_module.reduce_graph_module(body, imports)
    module.__dict__.update((name, value) for name, value in body.items() if name not in _OF_GRAPH)
    return module


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.__dict__ and _has_own_bytes(tensor)


def _has_own_bytes(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_nested
        and torch._C._has_storage(tensor)
    )


def components(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with bytes of their own that `tensor` is made of: itself, or a sparse one's values, ..."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from components(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif torch._C._has_storage(tensor):
        yield tensor


def packed_bytes(obj: torch.ScriptObject) -> int:
    """Return the bytes of the weights that a quantized layer has packed for the processor, and owns."""
    try:
        parts = obj.unpack() if hasattr(obj, "unpack") else obj.__getstate__()
    except RuntimeError:
        return 0
    return sum(part.untyped_storage().nbytes() for part in _script_parts.within(parts))


def _is_decorated(tensor: Tensor) -> bool:
    kind = type(tensor)
    if kind is Tensor:
        return _has_own_bytes(tensor)
    return (
        kind.__reduce_ex__ in (Parameter.__reduce_ex__, Tensor.__reduce_ex__)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and not hasattr(kind, "__tensor_flatten__")
        and _has_own_bytes(tensor)
    )


def _reduce_decorated(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        arguments = (Tensor.detach(tensor).as_subclass(Tensor), type(tensor), tensor.requires_grad)
    state = torch._utils._get_obj_state(tensor)  # type: ignore[no-untyped-call]
    return _rebuild_decorated, arguments, state, None, None, _set_attributes


def _rebuild_decorated(data: Tensor, kind: type, requires_grad: bool) -> Tensor:
    if kind is Tensor:
        return data.requires_grad_(requires_grad)
    return Tensor._make_subclass(kind, data, requires_grad)


def _reduce_quantized(tensor: Tensor) -> Any:
    """Describe a quantized tensor as torch does, but by an untyped storage: a typed one warns when it is read."""
    scheme = tensor.qscheme()
    quantizer: tuple[Any, ...]
    if scheme == torch.per_tensor_affine:
        quantizer = (tensor.q_scale(), tensor.q_zero_point())
    elif scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        quantizer = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis())
    else:
        return NotImplemented
    place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    arguments = (tensor.untyped_storage(), tensor.dtype, place, quantizer)
    return _rebuild_quantized, arguments, dict(tensor.__dict__), None, None, _set_attributes


def _rebuild_quantized(
    storage: torch.UntypedStorage, dtype: torch.dtype, place: tuple[int, Any, Any], quantizer: tuple[Any, ...]
) -> Tensor:
    offset, shape, stride = place
    options: Any = {"dtype": dtype, "device": storage.device}
    if len(quantizer) == 2:
        scale, zero_point = quantizer
        tensor = torch._empty_affine_quantized((0,), scale=scale, zero_point=zero_point, **options)
    else:
        scales, zero_points, axis = quantizer
        # Of the final shape, which the quantizer is checked against; nothing touches these pages.
        tensor = torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zero_points, axis=axis, **options
        )
    return tensor.set_(storage, offset, shape, stride)


def _set_attributes(tensor: Tensor, state: Any) -> None:
    if type(tensor).__setstate__ is not Tensor.__setstate__:
        tensor.__setstate__(state)  # type: ignore[no-untyped-call]
    elif isinstance(state, dict):
        tensor.__dict__.update(state)
    else:
        torch._utils._set_obj_state(tensor, state)  # type: ignore[no-untyped-call]


def _trains(module: torch.nn.Module) -> bool:
    return getattr(module, "training", False)  # a frozen TorchScript module has no such attribute


def _in_training(modules: list[torch.nn.Module]) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """Return what to give eval mode: roots, by their `eval()`; and single modules, by their flag alone.

    The latter where some class means something else by `train` than torch does, such as a training loop, and for
    what an `eval` of one's own leaves undone.
    """
    # TorchScript's own flags are cleared in its archive.
    modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    if not any(map(_trains, modules)):
        return [], []
    below = {id(child) for module in modules for child in module.children()}
    roots, single = [], []
    for root in modules:
        if id(root) in below:
            continue
        parts = list(root.modules())
        if any(_trains(part) for part in parts):
            called = _eval_may_be_called(root, parts)
            if called:
                roots.append(root)
            if not called or type(root).eval is not torch.nn.Module.eval:
                single += [part for part in parts if _trains(part)]
    return roots, single


def _eval_may_be_called(root: torch.nn.Module, parts: list[torch.nn.Module]) -> bool:
    """Tell whether `root.eval()` is torch's, or at least called like it, and so are the `train`s that it calls."""
    if "eval" in root.__dict__ or not all(_has_torchs_train(type(part)) for part in parts):
        return False
    own = type(root).eval
    return own is torch.nn.Module.eval or (callable(own) and list(inspect.signature(own).parameters) == ["self"])


def _has_torchs_train(kind: type[torch.nn.Module]) -> bool:
    if kind.train is torch.nn.Module.train or issubclass(kind, torch.jit.ScriptModule):
        return True
    return "mode" in inspect.signature(kind.train).parameters


# ---------------------------------------------------------------- putting together


def put_together(
    skeleton: bytes | memoryview,
    tensors: Sequence[Tensor],
    arrays: Sequence[object] = (),
    carried: Sequence[object] = (),
    *,
    keep_flags: bool = False,
    arrived: Callable[[], None] | None = None,
) -> tuple[Any, float]:
    """Rebuild the object from its skeleton around `tensors`, which take the places of those taken out.

    Where their bytes are still on the way, `arrived` waits for them; it is called before any code runs that might
    look at them.

    Returns it, and the seconds spent importing the modules of its classes: once per process, and often more
    than all else.

    Unless `keep_flags`, modules are put in eval mode and every tensor has `requires_grad=False`; the flags of
    plain tensors are the caller's to set.
    """
    unpickler = _Unpickler(io.BytesIO(skeleton), buffers=arrays)
    unpickler.tensors = tensors
    unpickler.carried = carried
    unpickler.keep_flags = keep_flags
    unpickler.arrived = arrived
    obj = unpickler.load()
    roots, single, flagged, opaque, recurrent = unpickler.load()
    if arrived is not None:
        arrived()  # eval() below may run a class's own train()
    if not keep_flags:
        for root in roots:
            root.eval()
        for module in single:
            module.training = False
        for module in opaque:  # a __reduce__ of its own built it anew, and knows of no flags
            again, left = _in_training([module])
            for root in again:
                root.eval()
            for part in left:
                part.training = False
            flagged.extend(module.parameters())
        for tensor in flagged:
            if tensor.requires_grad:
                tensor.requires_grad = False  # a lazy one has no requires_grad_()
    if recurrent:
        _lay_out_for_cudnn(recurrent, tensors)
    return obj, unpickler.import_seconds


def _lay_out_for_cudnn(modules: Sequence[torch.nn.RNNBase], tensors: Sequence[Tensor]) -> None:
    """Bring an RNN's weights on a CUDA device into one block, as cuDNN wants them; else it does so in each call.

    Only where a load could not place them so at once (`Parts.recurrent`): they are twice there meanwhile. Not where
    they are in one storage already, nor where another tensor sees one of them: that tie would go.
    """
    seen = collections.Counter(tensor.untyped_storage()._cdata for tensor in tensors)
    for module in modules:
        storages = [w.untyped_storage()._cdata for w in module._flat_weights if isinstance(w, Tensor) and w.is_cuda]
        if storages and all(seen[storage] == 1 for storage in storages):
            module.flatten_parameters()


class _Unpickler(pickle.Unpickler):
    tensors: Sequence[Tensor]
    carried: Sequence[object]
    keep_flags: bool
    arrived: Callable[[], None] | None
    import_seconds = 0.0

    def find_class(self, module: str, name: str) -> Any:
        begin = time.perf_counter()
        try:
            with _collector.put_off_to_import(module):
                found = super().find_class(module, name)
        finally:
            self.import_seconds += time.perf_counter() - begin
        if self.arrived is not None and not _looks_at_nothing(found):
            self.arrived()
            self.arrived = None
        return found

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is int:
            return self.tensors[pid]
        if pid[0] == "carried":
            return self.carried[pid[1]]
        if pid[0] == "keep_flags":
            return self.keep_flags
        _, number, dtype = pid
        storage = self.tensors[number].untyped_storage()
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


_LOOK_AT_NOTHING = (_new, _set_state, _rebuild_decorated, _set_attributes)


def _looks_at_nothing(found: Any) -> bool:
    """Tell whether unpickling with this class, function or constant reads no tensor's bytes.

    It is asked where not `Parts.constructs`: then objects are made empty and given their state, and the functions
    that are called are those of this package and of cloudpickle; any other is only referred to.
    """
    if not isinstance(found, type):
        module = getattr(found, "__module__", None) or ""
        runs = module.startswith(("ray.cloudpickle", f"{__package__}."))
        return not runs or any(found is known for known in _LOOK_AT_NOTHING)
    known = str(found.__module__).startswith(("torch.nn.modules.", "builtins", "collections", f"{__package__}."))
    if known or issubclass(found, (enum.Enum, Tensor)):
        return True
    own_set = found.__setattr__ not in (object.__setattr__, torch.nn.Module.__setattr__)
    return (
        found.__new__ is object.__new__
        and getattr(found, "__setstate__", None) in (None, torch.nn.Module.__setstate__)
        and getattr(found, "__getattr__", None) in (None, torch.nn.Module.__getattr__)
        and found.__hash__ in (None, object.__hash__)  # called where it is the key of a dict
        and not (own_set and any("__slots__" in kind.__dict__ for kind in found.__mro__))
    )
