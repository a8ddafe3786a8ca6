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
import enum
import functools
import io
import pickle
import sys
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ray.cloudpickle import CloudPickler
from ray.cloudpickle.cloudpickle import _should_pickle_by_reference

from .gc_pause import gc_paused_to_import
from .kinds import Reduce, has_default_reduce, reducer_for
from .modules import flatten_recurrent, new_object, set_module_state
from .paths import unpicklable, walk
from .script.archive import KeepFlags
from .script.identity import RestartPickle, Scripts
from .tensors import is_plain, rebuild_decorated, set_tensor_attributes
from .training import find_training

__all__ = ["Parts", "put_together", "take_apart"]

Tensor = torch.Tensor
Parameter = torch.nn.Parameter
_PACKAGE = f"{__name__.partition('.')[0]}."
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
    scripts = Scripts()
    while True:
        stream = io.BytesIO()
        pickler = _Pickler(stream, leave_out, objects, scripts, in_process)
        try:
            pickler.dump(obj)
            # A second pickle in the same stream, with the same memo: which of the objects just pickled must be
            # touched to give eval mode and requires_grad=False.
            recurrent = [module for module in pickler.modules if isinstance(module, torch.nn.RNNBase)]
            pickler.dump((*find_training(pickler.modules), pickler.flagged, pickler.opaque, recurrent))
        except RestartPickle:
            scripts.restart()
        except Exception as error:

            def fails(part: object) -> Exception | None:
                return _Pickler(io.BytesIO(), leave_out, objects, Scripts(), in_process)._try(part)

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
        scripts: Scripts,
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
        self._reducers: dict[type, Reduce | None] = {}
        self.composed = ""
        self.constructs = False
        # Names of objects that are pickled by name, by id; empty for one that is not.
        self._module_level: dict[int, str] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []
        self._identify_new = self._decide
        self._identify: dict[type, Callable[[Any], Any] | None] = {
            Tensor: self._plain_id,
            Parameter: self._plain_id,
            torch.UntypedStorage: self._storage_id,
            torch.storage.TypedStorage: self._storage_id,
            KeepFlags: lambda _: ("keep_flags",),
        }
        if in_process:
            self._identify[types.FunctionType] = functools.partial(self._function_id, in_process)
            self.leave_out = (*leave_out, type)

    def failure(self, part: object) -> Exception | None:
        """Try to pickle a part with a pickler like this one, and return what was raised, or None."""
        return self._trial()._try(part)

    def _try(self, part: object) -> Exception | None:
        try:
            self.dump(part)
        except RestartPickle:
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
        identify = self._identify.get(type(obj), self._identify_new)
        return identify(obj) if identify is not None else None

    def _decide(self, obj: Any) -> Any:
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
        return self._number(tensor, tensor) if is_plain(tensor) else None

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
        return self.failure(value) is None

    def _trial(self) -> _Pickler:
        """Return a pickler like this one, to try a part with."""
        trial = _Pickler(io.BytesIO(), self.leave_out, (), Scripts(), self.in_process)
        trial._module_level = self._module_level
        return trial

    def reducer_override(self, obj: Any) -> Any:
        if name := self._module_level.get(id(obj)):
            return name
        kind = type(obj)
        if kind is collections.OrderedDict:
            # A module has eleven, nearly all empty, and OrderedDict's own reduce is slow.
            return NotImplemented if obj or obj.__dict__ else (collections.OrderedDict, ())
        if kind not in self._reducers:
            self._reducers[kind] = reducer_for(kind)
        reduce = self._reducers[kind]
        if reduce is not None:
            return reduce(obj, self)
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
            again, left = find_training([module])
            for root in again:
                root.eval()
            for part in left:
                part.training = False
            flagged.extend(module.parameters())
        for tensor in flagged:
            if tensor.requires_grad:
                tensor.requires_grad = False  # a lazy one has no requires_grad_()
    if recurrent:
        flatten_recurrent(recurrent, tensors)
    return obj, unpickler.import_seconds


class _Unpickler(pickle.Unpickler):
    tensors: Sequence[Tensor]
    carried: Sequence[object]
    keep_flags: bool
    arrived: Callable[[], None] | None
    import_seconds = 0.0

    def find_class(self, module: str, name: str) -> Any:
        begin = time.perf_counter()
        try:
            with gc_paused_to_import(module):
                found = super().find_class(module, name)
        finally:
            self.import_seconds += time.perf_counter() - begin
        if self.arrived is not None and not _reads_no_tensor(found):
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


_READ_NO_TENSOR = (new_object, set_module_state, rebuild_decorated, set_tensor_attributes)


def _reads_no_tensor(found: Any) -> bool:
    """Tell whether unpickling with this class, function or constant reads no tensor's bytes.

    It is asked where not `Parts.constructs`: then objects are made empty and given their state, and the functions
    that are called are those of this package and of cloudpickle; any other is only referred to.
    """
    if not isinstance(found, type):
        module = getattr(found, "__module__", None) or ""
        runs = module.startswith(("ray.cloudpickle", _PACKAGE))
        return not runs or any(found is known for known in _READ_NO_TENSOR)
    known = str(found.__module__).startswith(("torch.nn.modules.", "builtins", "collections", _PACKAGE))
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
