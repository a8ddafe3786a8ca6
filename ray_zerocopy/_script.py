"""A TorchScript module or function <-> code and storages. Knows torch, no Ray.

Note [TorchScript without weights]

A `ScriptModule` lives in C++, out of a pickler's reach, and `torch.jit.save` writes its weights between its code.
`torch.package`, though, writes several script modules into one archive that share weights with eager code: its
serializer keeps a table of the storages that are in the archive already, and skips them. We enter every storage
of the module into that table first, so that an archive without weights results; on the way back we enter
the same storages, now views of shared memory, into the reader's table, and it finds them there::

    ScriptModule --+-- classes, methods ------> code      compiled once per process and prepared model
                   +-- attributes, flags -----> objects                             [storage 0] [storage 1]
                   +-- tensors ---------------> tensors   shared like any other tensor
                   +-- graph constants -------> tensors   (a frozen module's weights): one uint8 view a storage

Reading `objects` into a `CompilationUnit` that has the classes compiles nothing: the archive need not even hold
code. That makes the second load in a process an order of magnitude faster than the first. It also writes down how
the objects hang together, as a graph of TorchScript's own: "create an object of this class, set its attribute
weight to tensor 7". The loads after that run this graph, in the interpreter, forty times as fast as reading.
Loads in one process share their classes and compiled methods, as two instances of one scripted class do; never
attributes or tensors.

The module travels inside a holder, `_held`. The reader looks through a root module's methods, and its children's, for
operators of old releases to rewrite, which costs more than reading it; what an attribute holds it leaves alone.

What cannot be shared is what a class makes of its tensors while it is read: a quantized layer packs its weights
for the processor, in memory of its own. `Script.private` counts it. What a frozen module has in its graphs is
shared; `_script_parts.baked_bytes` counts it, because it is in no `state_dict`.
"""

from __future__ import annotations

import io
import math
import pickle
import threading
import types
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.jit import ScriptFunction, ScriptModule
from torch.jit._script import OrderedModuleDict, RecursiveScriptModule

from . import _layout, _script_parts

__all__ = [
    "KEEP_FLAGS",
    "Asked",
    "BeginAgain",
    "Script",
    "Scripts",
    "rebuild_script",
    "reduce_script",
]

Tensor = torch.Tensor

# Prepared models whose compiled code a process keeps, a few MB each, for the next load.
MOST_COMPILED = 8
# Graph constants of up to so many bytes are copied where the code is compiled: kept code must not keep a
# model's pages.
SMALL_CONSTANTS = 64 * 1024


class Asked:
    """The type of `KEEP_FLAGS`."""

    def __reduce__(self) -> str:
        return "KEEP_FLAGS"


# Stands in a reduced module where `rebuild_script` takes whether to keep requires_grad: a pickler that has an
# answer gives it a persistent id, and its unpickler a bool. Left in place, it means no.
KEEP_FLAGS = Asked()


class _Signature(NamedTuple):
    """What a function is called; and the source of one with its arguments and defaults that calls it as `inner`.

    No source where torch does not read the names of the types that it writes: classes.
    """

    name: str
    inner: str
    source: str | None


class BeginAgain(Exception):
    """Parts of a script module, or its methods, were pickled before it was met: start over, now that it is known."""


class Scripts:
    """The script modules of one pickle: a part of one, wherever it is held, is reduced to a path in the whole."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[ScriptModule, str]] = {}  # by the C++ object: Python has several for one
        self._stand_ins: set[int] = set()
        self._reduced: set[int] = set()

    def begin_again(self) -> None:
        """Forget what has been reduced, but not what has been met."""
        self._reduced.clear()

    def add(self, module: ScriptModule) -> None:
        """Take note of a module and its parts."""
        number = hash(module._c)
        known = self._places.get(number)
        if known is not None and (known[0] is module or number not in self._stand_ins):
            return
        self._stand_ins.discard(number)
        parts = {hash(part._c): (module, path) for path, part in module.named_modules()}
        self._places |= parts
        if known is not None or not self._reduced.isdisjoint(parts):
            raise BeginAgain

    def reduce(self, module: ScriptModule) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what `reduce_script` does, or where in a larger module this one is."""
        self.add(module)
        whole, path = self._places[hash(module._c)]
        if whole is not module:
            return _part_of, (whole, path)
        self._reduced.add(hash(module._c))
        return reduce_script(module)

    def reduce_method(self, method: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Describe a module's method by the module and its name."""
        number = hash(method.owner)
        if number not in self._places:
            stand_in = torch.jit._recursive.wrap_cpp_module(method.owner)  # type: ignore[no-untyped-call]
            try:
                self.add(stand_in)
            finally:
                self._stand_ins.add(number)
        whole, path = self._places[number]
        return _method, (whole, path, method.name)


def _part_of(whole: ScriptModule, path: str) -> Any:
    for name in path.split(".") if path else ():
        whole = whole._modules[name]  # type: ignore[assignment]
    return whole


def _method(whole: ScriptModule, path: str, name: str) -> Any:
    return getattr(_part_of(whole, path), name)


class Script(NamedTuple):
    """A module without its tensors.

    `code` is an archive with everything but storages, `objects` the same without code. `flagged` says whether they
    have a second set of objects in which tensors require gradients and modules train. `plain` says whether all
    attributes are modules, ordinary tensors, numbers, strings, and lists and tuples of these two, of which no method
    makes two one; `mixed`, whether tensors of several dtypes are over one storage, which torch reads as one dtype.
    `cache` is 'strong' where the compiled code may outlive the modules made with it, 'weak' where it holds shared
    tensors (graph constants), and 'none' where a method writes to them or returns them, so that each module needs
    its own. `storages` has, for each storage of the archives, which of the tensors beside it reaches all of it. Of
    the storages, those from `baked` on are only in graphs, those from `made` on only in what classes made of
    themselves to be saved; `private` is the bytes of these, which every load has of its own. `function` is what a
    function is called and how.
    """

    key: bytes
    code: Any
    objects: Any
    flagged: bool
    plain: bool
    mixed: bool
    cache: str
    storages: list[int]
    baked: int
    made: int
    private: int
    function: _Signature | None


# ---------------------------------------------------------------- taking apart


def reduce_script(module: ScriptModule | ScriptFunction[Any, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return `rebuild_script` and its arguments, in the way of `__reduce__`; `module` is not changed.

    The tensors among the arguments are on the devices of the module's, and share their storages.
    Raises RuntimeError, from torch, for a module that `torch.jit.save` refuses; ValueError for one that it writes
    and cannot read.
    """
    if isinstance(module, ScriptFunction):
        # copy: graph constants, the only tensors that a function can have
        unit = torch._C.CompilationUnit()
        holder = torch._C.import_ir_module_from_buffer(unit, module.save_to_buffer({}), None, {}, False)  # type: ignore[call-arg, arg-type]
        script, tensors = _take_apart(holder, _signature(module, holder))
        return rebuild_script, (script, tensors, {}, KEEP_FLAGS)
    script, tensors = _take_apart(module._c, None)
    return rebuild_script, (script, tensors, _script_parts.python_state(module), KEEP_FLAGS)


def _take_apart(cpp: Any, function: _Signature | None) -> tuple[Script, list[Tensor]]:
    _refuse_packed_for_mkldnn(cpp)
    constants = list(_script_parts.constants(cpp))
    plain = function is None and all(_is_plain(value, kind) for value, kind in _script_parts.attributes(cpp))
    plain = plain and not _script_parts.may_tie_lists(cpp)
    if plain and _storages(_script_parts.tensors_of(cpp)).isdisjoint(_storages(constants)):
        cpp = _compacted(cpp)
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    serializer = torch._C.ScriptModuleSerializer(writer)
    known: Any = serializer.storage_context()
    found: list[torch.UntypedStorage] = []
    dtypes: list[set[torch.dtype]] = []

    def enter(tensor: Tensor) -> int:
        """Return the number of the tensor's storage; -1 if it has no bytes to share."""
        if tensor.is_meta:
            raise ValueError(
                f"a {cpp.qualified_name} with a tensor on the meta device has no bytes to share: fill it."
            )
        if tensor.layout is not torch.strided or not torch._C._has_storage(tensor):
            return -1
        storage = tensor.untyped_storage()
        number: int = known.get_or_add_storage(storage)
        if number == len(found):
            found.append(storage)
            dtypes.append(set())
        dtypes[number].add(tensor.dtype)
        return number

    tensors: list[Tensor] = []
    whole: dict[int, int] = {}
    seen: set[int] = set()
    for tensor in _script_parts.tensors_of(cpp):
        number = enter(tensor)
        if plain and tensor._cdata not in seen:
            seen.add(tensor._cdata)
            if tensor.is_contiguous() and tensor.nbytes == found[number].nbytes():
                whole.setdefault(number, len(tensors))
            # The very object, so that it is one with what others hold of it; but not what Python has put on it.
            bare = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.__dict__
            tensors.append(tensor if bare else _view(tensor, tensor.untyped_storage(), tensor.storage_offset()))
    first = len(found)
    entered = [enter(tensor) for tensor in constants]
    apart = not any(0 <= number < first for number in entered)
    last = len(found)
    mixed = any(len(known) > 1 for known in dtypes)
    if mixed and (not plain or any(len(dtypes[number]) > 1 for number in entered if number >= 0)):
        raise ValueError(
            f"a {cpp.qualified_name} has tensors of different dtypes over one storage, of which torch.jit.save "
            f"writes one dtype only: clone one of them"
        )
    small = apart and sum(storage.nbytes() for storage in found[first:]) <= SMALL_CONSTANTS
    serializer.serialize(_held(cpp), 0)
    serializer.write_files()
    writer.write_end_of_file()

    reader = torch._C.PyTorchFileReader(io.BytesIO(stream.getbuffer()))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader, writer, serializer
    # The storages that `tensors_of` does not see: made by a __getstate__.
    private = 0
    for number in range(last, last + len(records)):
        record = records.pop(f".data/{number}.storage", None)
        if record is None:
            break
        private += len(record)
        made = torch.frombuffer(bytearray(record), dtype=torch.uint8) if record else _no_bytes()
        found.append(made.untyped_storage())
    storages = []
    for number, storage in enumerate(found):
        if number not in whole:
            whole[number] = len(tensors)
            tensors.append(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
        storages.append(whole[number])
    flagless = _without_flags(records[_DATA.format(0)], cpp)
    flagged = flagless != records[_DATA.format(0)]
    if flagged:
        records[_DATA.format(1)] = records[_DATA.format(0)]
        records[_CONSTANTS.format(1)] = records[_CONSTANTS.format(0)]
        records[_DATA.format(0)] = flagless
    cache = "strong"
    if constants and _script_parts.lets_constants_change(cpp):
        cache = "none"
    elif records[_CONSTANTS.format(0)] != _NOTHING and not (small and private == 0):
        cache = "weak"
    objects = {_CONSTANTS.format(n): _NOTHING for n in range(1 + flagged)}
    objects |= {_DATA.format(n): records[_DATA.format(n)] for n in range(1 + flagged)}
    # Out of the skeleton, which every load reads: these are read twice in a process.
    archives = pickle.PickleBuffer(_archive(records)), pickle.PickleBuffer(_archive(objects))
    script = Script(
        uuid.uuid4().bytes, *archives, flagged, plain, mixed, cache, storages, first, last, private, function
    )
    return script, tensors


def _is_plain(value: object, kind: Any) -> bool:
    """Tell whether `_write_down` can make an attribute: a number, a string, a list of them, or a tensor's view."""
    if isinstance(value, Tensor):
        own = value.layout is torch.strided and torch._C._has_storage(value) and not value.is_nested
        return own and not (value.is_meta or value.is_quantized or value.is_conj() or value.is_neg())
    return _is_written(value, kind)


def _is_written(value: object, kind: Any) -> bool:
    if type(value) in (list, tuple):
        kinds = _kinds_within(kind, len(value))  # type: ignore[arg-type]
        return kinds is not None and all(map(_is_written, value, kinds))  # type: ignore[call-overload]
    return value is None or type(value) in (bool, int, float, str)


def _kinds_within(kind: Any, count: int) -> list[Any] | None:
    """Return the types of the elements of a list or tuple of TorchScript's, None for another type."""
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    if kind.kind() == "ListType":
        return [kind.getElementType()] * count
    return list(kind.elements()) if kind.kind() == "TupleType" else None


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if torch._C._has_storage(tensor)}


def _view(tensor: Tensor, storage: torch.UntypedStorage, offset: Any) -> Tensor:
    """Return a tensor as `tensor` is over another storage, or a second one over the same."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return view.set_(storage, offset, tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


def _compacted(cpp: Any) -> Any:
    """Return the module, or one like it in which storages of which little is reachable are cut down to that."""
    tensors = list({tensor._cdata: tensor for tensor in _script_parts.tensors_of(cpp)}.values())
    storages, numbers, ranges = _layout.reachable(tensors)
    pieces: dict[int, torch.UntypedStorage] = {}
    for number, (storage, (low, high)) in enumerate(zip(storages, ranges, strict=True)):
        if high - low < storage.nbytes():
            reached = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (high - low,), (1,))
            pieces[number] = reached.clone().untyped_storage()  # copy: the small part
    if not pieces:
        return cpp
    others = []
    for tensor, number in zip(tensors, numbers, strict=True):
        if number in pieces:
            offset = tensor.storage_offset() - ranges[number][0] // tensor.element_size() if tensor.numel() else 0
            tensor = _view(tensor, pieces[number], offset)
        others.append(tensor)
    return _write_down(cpp, tensors)(others)


def _refuse_packed_for_mkldnn(cpp: Any) -> None:
    """Refuse what `torch.jit.save` writes without its weights, and then cannot read."""
    for module in _script_parts.modules(cpp):
        for name in module._method_names():
            if module._get_method(name).graph.findNode("prim::ConstantMKLDNNTensor") is not None:
                raise ValueError(
                    f"the graph of its {name}() has weights packed for this processor, by "
                    f"torch.jit.optimize_for_inference, which torch.jit.save loses. Share the module as it was "
                    f"before that, frozen or not, and optimize it in the worker"
                )


_DATA = ".data/ts_code/{}/data.pkl"
_CONSTANTS = ".data/ts_code/{}/constants.pkl"
_NOTHING = b"\x80\x02)."  # pickle of ()


def _no_bytes() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _held(cpp: Any) -> Any:
    holder: Any = torch._C.ScriptModule("Held", torch._C.CompilationUnit(), True)  # type: ignore[call-arg]
    holder._register_attribute("held", torch._C.AnyType.get(), cpp)
    return holder


def _archive(records: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name, record in records.items():
        if name.startswith(".data/") and not name.endswith("serialization_id"):  # the writer adds the others itself
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return stream.getvalue()


class _Flag(NamedTuple):
    """A bool in a pickle, by its place there."""

    position: int


class _Object:
    """Stands for whatever a pickle makes by calling a class or function."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


_InPython: Any = pickle._Unpickler  # the one that reads byte by byte


class _Flags(_InPython):  # type: ignore[misc]
    """Reads a pickle of TorchScript objects, and notes where the flags of its tensors are."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        super().__init__(self.stream)
        self.of_tensors: list[_Flag] = []

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        return self._tensor if module == "torch._utils" else _Object

    def _tensor(self, *given: Any) -> _Object:
        self.of_tensors += [value for value in given if isinstance(value, _Flag)]
        return _Object()

    def _flag(self) -> None:
        self.append(_Flag(self.stream.tell() - 1))

    def _reduce(self) -> None:
        given = self.stack.pop()  # a tuple, but for enums
        self.stack[-1] = self.stack[-1](*given) if isinstance(given, tuple) else _Object()

    dispatch: ClassVar[dict[int, Any]] = {
        **_InPython.dispatch,
        pickle.NEWTRUE[0]: _flag,
        pickle.NEWFALSE[0]: _flag,
        pickle.REDUCE[0]: _reduce,
    }


def _without_flags(data: bytes, cpp: Any) -> bytes:
    """Return a pickle of a module in which no tensor requires a gradient and no module trains."""
    reader = _Flags(data)
    held = reader.load().state["held"]
    flags = reader.of_tensors
    pending = [(held, cpp)]
    while pending:
        made, module = pending.pop()
        if isinstance(made.state, dict):  # else a __getstate__ of its own chose what to save
            flags += [flag for flag in [made.state.get("training")] if isinstance(flag, _Flag)]
            pending += [(made.state[name], child) for name, child in torch._C.ModuleDict(module).items()]
    changed = bytearray(data)
    for flag in flags:
        changed[flag.position] = pickle.NEWFALSE[0]
    return bytes(changed)


def _signature(function: ScriptFunction[Any, Any], cpp: Any) -> _Signature:
    """Return the signature of a function, of which `cpp` is a module with that function as its forward."""
    schema: Any = function.schema
    given = []
    names = [argument.name for argument in schema.arguments]
    inner = "inner"
    while inner in (function.name, *names):
        inner += "_"
    for argument in schema.arguments:
        if argument.kwarg_only and "*" not in given:
            given.append("*")
        default = f" = {_written(argument.default_value)}" if argument.has_default_value() else ""
        given.append(f"{argument.name}: {argument.type.annotation_str}{default}")
    source = f"def {function.name}({', '.join(given)}):\n    return {inner}({', '.join(names)})\n"
    signature = _Signature(str(function.name), inner, source)
    try:
        _as_function(cpp, signature)
    except RuntimeError as error:
        if any(argument.has_default_value() for argument in schema.arguments):
            raise ValueError(
                f"TorchScript does not read back the signature {schema}, so its defaults would be lost: "
                f"share a function without defaults, or a scripted module"
            ) from error
        return signature._replace(source=None)
    return signature


def _written(value: object) -> str:
    """Return a default as TorchScript reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if isinstance(value, tuple):
        return f"({''.join(_written(held) + ', ' for held in value)})"
    return repr(value)


# ---------------------------------------------------------------- putting together


def rebuild_script(
    script: Script, tensors: list[Tensor], python_state: dict[str, dict[str, Any]], keep_flags: object = False
) -> Any:
    """Make the module or function from its code around the storages of `tensors`, without copying them."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    number = 1 if script.flagged and keep_flags is True else 0
    key = (script.key, device, number)
    with _compiling:
        compiled = _compiled.get(key)
        if compiled is not None and compiled.again is not None:
            cpp = compiled.again(tensors)
        else:
            fresh = compiled is None
            if compiled is None:
                compiled = _Compiled(torch._C.CompilationUnit())
            cpp = _read(compiled.unit, script, tensors, device, number, fresh)
            if script.plain and (script.mixed or not fresh):
                compiled.again = _write_down(cpp, tensors)
            if script.mixed and compiled.again is not None:
                cpp = compiled.again(tensors)
            elif script.plain:
                _put_in(cpp, tensors)
            if script.cache != "none":
                _compiled[key] = compiled
        if script.cache == "strong":
            _keep(key, compiled)
    if script.function is not None:
        return _as_function(cpp, script.function)
    if compiled.concrete is None:
        compiled.concrete = torch._C.ConcreteModuleType.from_jit_type(cpp._type())
    module = _wrap(cpp, compiled.concrete)
    # The compiled code of graphs with shared constants is kept for as long as a module made with it lives.
    module.__dict__["_compiled"] = compiled
    for path, state in python_state.items():
        part = _part_of(module, path)
        for name, value in state.items():
            if isinstance(value, _script_parts.OwnMethod):
                part.__dict__[name] = types.MethodType(value.function, part)
            else:
                part.__dict__[name] = value
    return module


class _Compiled:
    """What a process keeps of a prepared module: its classes, and how to make another one of tensors."""

    def __init__(self, unit: Any) -> None:
        self.unit = unit
        self.concrete: Any = None
        self.again: Callable[[list[Tensor]], Any] | None = None


_Key = tuple[bytes, torch.device | None, int]
_compiling = threading.Lock()
_compiled: weakref.WeakValueDictionary[_Key, _Compiled] = weakref.WeakValueDictionary()
_kept: OrderedDict[_Key, _Compiled] = OrderedDict()


def _read(unit: Any, script: Script, tensors: list[Tensor], device: Any, number: int, fresh: bool) -> Any:
    """Read the module's objects, and its code if the unit is a fresh one, from the archives."""
    storages = torch._C.DeserializationStorageContext()
    places: dict[int, torch.UntypedStorage] = {}
    for place, index in enumerate(script.storages):
        tensor = tensors[index]
        if device is not None:
            # The reader takes only host storages. These are never touched, and exchanged below; but classes make
            # something of the last ones while they are read.
            host = tensor.cpu() if place >= script.made else torch.empty_like(tensor, device="cpu")
            places[host.untyped_storage()._cdata] = tensor.untyped_storage()
            tensor = host
        elif script.cache == "strong" and script.baked <= place < script.made:
            tensor = tensor.clone()  # copy: a few KB of graph constants, see SMALL_CONSTANTS
        storages.add_storage(f"{place}.storage", tensor)
    reader = torch._C.PyTorchFileReader(io.BytesIO(script.code if fresh else script.objects))
    root: Any = torch._C._import_ir_module_from_package(unit, reader, storages, torch.device("cpu"), str(number))
    cpp = root.getattr("held")
    if places:
        _exchange(cpp, places, fresh)
    return cpp


def _write_down(cpp: Any, tensors: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """Return a function that makes a module as `cpp` is one of `tensors`, of others in their places."""
    numbers = _numbers(cpp, tensors)
    graph: Any = torch._C.Graph()
    given = graph.addInput()
    given.setType(torch._C.ListType.ofTensors())
    unpack = graph.insertNode(graph.create("prim::ListUnpack", [given], 0))
    order: list[int] = []
    values: dict[Any, Any] = {}
    alive = []

    def value_of(held: Any, kind: Any) -> Any:
        kinds = _kinds_within(kind, len(held)) if type(held) in (list, tuple) else None
        if kinds is not None:  # each time: a list can be written to
            parts = [value_of(part, of) for part, of in zip(held, kinds, strict=True)]
            made = f"prim::{'List' if type(held) is list else 'Tuple'}Construct"
            value = graph.insertNode(graph.create(made, parts, 1)).output()
            value.setType(kind.getElementType() if kind.kind() == "OptionalType" else kind)
            return value
        is_tensor = isinstance(held, Tensor)
        key: Any = held._cdata if is_tensor else (type(held), repr(held))
        if key not in values:
            values[key] = unpack.addOutput() if is_tensor else graph.insertConstant(held)
            if is_tensor:
                values[key].setType(torch._C.TensorType.get())
                order.append(numbers[key])
        return values[key]

    def object_of(module: Any) -> Any:
        if hash(module) in values:
            return values[hash(module)]
        alive.append(module)
        held = [(name, value_of(module.getattr(name), kind)) for name, kind in _script_parts.kinds(module).items()]
        held += [(name, object_of(child)) for name, child in torch._C.ModuleDict(module).items()]
        made = graph.insertNode(graph.create("prim::CreateObject", 1)).output()
        made.setType(module._type())
        values[hash(module)] = made
        for name, value in held:
            graph.insertNode(graph.create("prim::SetAttr", [made, value], 0)).s_("name", name)
        return made

    graph.registerOutput(object_of(cpp))
    function: Any = torch._C._create_function_from_graph("again", graph)

    def again(others: list[Tensor]) -> Any:
        optimizing = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # which would take long, and finds nothing
        try:
            return function([others[place] for place in order])
        finally:
            torch._C._set_graph_executor_optimize(optimizing)

    return again


def _put_in(cpp: Any, tensors: list[Tensor]) -> None:
    """Exchange a module's tensors, which were just read, for those that they are like."""
    numbers = _numbers(cpp, tensors)
    for module in list(_script_parts.modules(cpp)):
        for name in _script_parts.kinds(module):
            held = module.getattr(name)
            if isinstance(held, Tensor) and held._cdata in numbers:
                module.setattr(name, tensors[numbers[held._cdata]])


def _numbers(cpp: Any, tensors: list[Tensor]) -> dict[int, int]:
    """Return, by the C++ object of each tensor of a module, the number of the one that it is like."""
    places: dict[Any, list[int]] = {}
    for place, tensor in reversed(list(enumerate(tensors))):
        places.setdefault(_place_of(tensor), []).append(place)
    in_cpp = {tensor._cdata: tensor for tensor in _script_parts.tensors_of(cpp)}
    return {known: places[_place_of(tensor)].pop() for known, tensor in in_cpp.items()}


def _place_of(tensor: Tensor) -> Any:
    # Without the dtype, see `Script.mixed`: what is alike then comes in one order.
    place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.requires_grad)
    return (tensor.untyped_storage()._cdata, *place)


def _exchange(cpp: Any, places: dict[int, torch.UntypedStorage], constants: bool) -> None:
    """Give each tensor of a module, and each constant, the storage on the device for the one it has on the host."""
    done = set()
    for tensor in (*_script_parts.tensors_of(cpp), *(_script_parts.constants(cpp) if constants else ())):
        place = places.get(tensor.untyped_storage()._cdata) if torch._C._has_storage(tensor) else None
        if place is None or tensor._cdata in done:
            continue
        done.add(tensor._cdata)
        there = torch.empty(0, dtype=tensor.dtype, device=place.device)
        tensor.data = there.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())


def _keep(key: _Key, compiled: _Compiled) -> None:
    _kept[key] = compiled
    _kept.move_to_end(key)
    while len(_kept) > MOST_COMPILED:
        _kept.popitem(last=False)


class _LazyModules(OrderedModuleDict):
    """A module's children, wrapped for Python when first looked at: calling the module needs none of them."""

    def __init__(self, cpp: Any) -> None:
        self._c = torch._C.ModuleDict(cpp)

    def __getattr__(self, name: str) -> Any:
        if name != "_python_modules":
            raise AttributeError(name)
        self._python_modules = {child: _wrap(cpp) for child, cpp in self._c.items()}
        return self._python_modules


def _wrap(cpp: Any, concrete: Any = None) -> RecursiveScriptModule:
    def initialize(module: Any) -> None:
        module._concrete_type = concrete or torch._C.ConcreteModuleType.from_jit_type(cpp._type())
        module._forward_pre_hooks.update(enumerate(cpp._get_forward_pre_hooks()))
        module._forward_hooks.update(enumerate(cpp._get_forward_hooks()))

    module: RecursiveScriptModule = RecursiveScriptModule._construct(cpp, initialize)  # type: ignore[no-untyped-call]
    module.__dict__["_modules"] = _LazyModules(cpp)
    return module


def _as_function(cpp: Any, signature: _Signature) -> Any:
    graph = cpp._get_method("forward").inlined_graph.copy()
    graph.eraseInput(0)  # the module, which a function does not use
    return _define(signature, torch._C._create_function_from_graph(signature.name, graph))


def _define(signature: _Signature, inner: Any) -> Any:
    """Return a function with the signature that does as `inner`, whose graph has lost defaults and names."""
    if signature.source is None:
        return inner
    unit: Any = torch._C.CompilationUnit()
    unit.define(signature.source, {signature.inner: inner, "torch": torch}.get)
    function = unit.find_function(signature.name)
    torch._C._jit_pass_inline(function.graph)
    return function
