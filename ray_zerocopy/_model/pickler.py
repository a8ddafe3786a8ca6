"""The walk over an object graph: a pickler that takes the tensors out. See Note [Skeletons] in `graph.py`."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import io
import pickle
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.cloudpickle import CloudPickler

from . import aoti, functions, operators, resources  # noqa: F401  # they register their kinds
from .classes import complete_class
from .hooks import filled_names, warn_of_filled_globals
from .imports import Import
from .kinds import Reduce, Refusal, belongs_to_process, has_default_reduce, reducer_for
from .names import ByValueModules, is_found_by_name, is_importable_global, pickled_names
from .objects import lacks_arguments, unusable_state
from .patches import warn_of_replaced_methods
from .paths import pickled_children, walk
from .registries import find_registrations
from .script.archive import KeepFlags
from .script.identity import RestartPickle, Scripts
from .tensors import is_plain

__all__ = ["SMALLEST_ARRAY", "Options", "Pickler"]

Tensor = torch.Tensor
Parameter = torch.nn.Parameter
# A numpy or Arrow array of fewer bytes than this stays in the skeleton, because a separate buffer costs more.
SMALLEST_ARRAY = 4096


class Options:
    """What a pickler and its trial picklers share.

    Args:
        root: The root of the graph.
        by_value: The packages that travel by value.
        leave_out: Instances of these types are listed in `Pickler.carried` instead of being pickled.
        local_model_types: As for `graph.take_apart`.
        user_imports: Whether the user listed modules to import.
    """

    def __init__(
        self,
        root: object,
        by_value: ByValueModules,
        leave_out: tuple[type, ...] = (),
        local_model_types: tuple[type, ...] = (),
        user_imports: bool = False,
    ) -> None:
        self.user_imports = user_imports
        self.by_value = by_value
        self.reads_code = not local_model_types and operators.has_foreign_operators()
        self.leave_out = leave_out
        self.local_model_types = local_model_types
        # By id of an object in a module's globals: the module and name if it is pickled by name, or None.
        self.module_level: dict[int, tuple[str, str] | None] = {}
        self.root = root

    def is_reachable(self, part: object) -> bool:
        """Tell whether a part is held by the graph, not only by weak references."""
        found = isinstance(part, (type, types.FunctionType)) and is_found_by_name(part)
        return found or id(part) in self._reachable

    @functools.cached_property
    def _reachable(self) -> dict[int, Any]:
        # With the parts, so that no id is used again: a state that `__getstate__` returns may be new objects.
        return {id(part): part for _, part in walk(self.root, children_of=pickled_children)}


class Pickler(CloudPickler):  # type: ignore[misc]
    def __init__(
        self,
        stream: io.BytesIO,
        options: Options,
        scripts: Scripts,
        objects: Sequence[object] = (),
        *,
        strict: bool = False,
    ) -> None:
        self.arrays: list[pickle.PickleBuffer] = []
        # Set before super().__init__ reads it. A flat copy, because lookups in cloudpickle's ChainMap take a quarter
        # of the time to pickle BERT. Ray's reducer for torch.Tensor (RAY_ENABLE_ZERO_COPY_TORCH_TENSORS) is removed,
        # because it hides storages and loses strides and flags. cloudpickle's reducer for open text files is removed,
        # because it reads the file to its end and sends the text.
        unwanted = (Tensor, Parameter, io.TextIOWrapper)
        self.dispatch_table = {k: v for k, v in CloudPickler.dispatch_table.items() if k not in unwanted}
        super().__init__(stream, protocol=5, buffer_callback=self._take_array)
        self.options = options
        self._stream = stream
        self.leave_out = options.leave_out
        self.objects = {id(part) for part in objects}
        self.tensors: list[Tensor] = []
        self.carried: list[Any] = []
        self.modules: list[torch.nn.Module] = []
        self.flagged_tensors: list[Tensor] = []
        self.opaque_modules: list[torch.nn.Module] = []
        self.scripts = scripts
        self._reducers: dict[type, Reduce | None] = {}
        self.fixed_dtype_class = ""
        self.fixed_dtype_ids: set[int] = set()
        self.tensors_without_bytes: list[Tensor] = []
        self.runs_constructors = False
        self.imports: dict[str, Import] = {}
        self.operators: dict[str, None] = {}
        self.definitions: dict[str, Any] = {}
        self.user_imports = options.user_imports
        self.functions: list[types.FunctionType] = []  # those that travel by value
        self._reads_code = options.reads_code
        self._types: set[type] = set()
        self._module_level = options.module_level
        self._strict = strict
        self._numbers: dict[int, int] = {}
        self._keep_alive: list[object] = []
        self._default_id_function = self._id_of_new_type
        self._id_functions: dict[type, Callable[[Any], Any] | None] = {
            Tensor: self._plain_id,
            Parameter: self._plain_id,
            torch.UntypedStorage: self._storage_id,
            torch.storage.TypedStorage: self._storage_id,
            KeepFlags: lambda _: ("keep_flags",),
        }
        if options.local_model_types:
            self._id_functions[types.FunctionType] = self._function_id
            self.leave_out = (*options.leave_out, type)

    def note_operators(self) -> None:
        """Note the operators that the code of the modules' classes calls."""
        if self._reads_code:
            operators.note_class_operators(self, {type(module) for module in self.modules} | self._types)

    def note_registrations(self) -> None:
        """Note the functions of the driver that the modules use by a name in a registry of transformers."""
        if not self.options.local_model_types:
            self.definitions.update(find_registrations(self.modules))

    def warn_of_unseen_changes(self) -> None:
        """Warn of what the script changes in its modules and in classes of libraries, and workers do not see."""
        if self.options.local_model_types:
            return
        root = self.options.root
        warn_of_filled_globals(root, self.modules, self.functions)
        warn_of_replaced_methods(type(root).__qualname__, self._types, self.options.by_value.names())

    def check_names(self) -> None:
        """Raise Refusal if the pickle refers to something in this process by a name that no worker finds."""
        if self.options.local_model_types:
            return
        for name in pickled_names(self._stream.getvalue(), self.options.by_value.names()):
            raise Refusal(
                f"it travels as the name {name}, which no worker can import",
                "Define it in a module that workers can import, or give its class a __reduce__ that describes it.",
            )

    def pickle_error(self, part: object) -> Exception | None:
        """Pickle a part with a new pickler of the same options. Return the exception that it raises, or None."""
        return Pickler(io.BytesIO(), self.options, Scripts()).dump_error(part)

    def is_reachable(self, part: object) -> bool:
        """Tell whether a part is held by the graph, not only by weak references."""
        return self.options.is_reachable(part)

    def dump_error(self, part: object) -> Exception | None:
        try:
            self.dump(part)
            self.check_names()
        except RestartPickle:
            return None
        except Exception as failure:
            return failure
        return None

    def flat_weight_numbers(self, module: torch.nn.RNNBase) -> tuple[int, ...]:
        """Return the numbers of an RNN's weights; an empty tuple if the user has changed how they are stored."""
        weights = module.__dict__.get("_flat_weights", ())
        numbers = [self._numbers.get(id(weight), -1) for weight in weights]
        pairs = zip(numbers, weights, strict=True)
        known = all(0 <= n < len(self.tensors) and self.tensors[n] is weight for n, weight in pairs)
        complete = 0 < len(set(numbers)) == len(numbers) == len(module.__dict__.get("_flat_weights_names", ()))
        standard = getattr(module.flatten_parameters, "__func__", None) is torch.nn.RNNBase.flatten_parameters
        return tuple(numbers) if known and complete and standard else ()

    def persistent_id(self, obj: Any) -> Any:
        # Called for every object of the graph, strings included. One lookup is enough for nearly all of them.
        identify = self._id_functions.get(type(obj), self._default_id_function)
        return identify(obj) if identify is not None else None

    def _id_of_new_type(self, obj: Any) -> Any:
        """Choose the function for a type that is seen for the first time, and call it."""
        kind = type(obj)
        self._types.add(kind)
        if kind in weakref.ProxyTypes:
            # isinstance() and `__class__` of a proxy answer for its referent, which would be pickled instead.
            raise Refusal(
                "it is a weak reference that acts as its referent",
                "Hold the object itself, or a weakref.ref to it.",
            )
        identify = self._carried_id if issubclass(kind, self.leave_out) else None
        if identify is None and self.objects:
            identify = self._carried_id_if_listed
        self._id_functions[kind] = identify
        return identify(obj) if identify is not None else None

    def _plain_id(self, tensor: Tensor) -> Any:
        return self._add_tensor(tensor, tensor) if is_plain(tensor) else None

    def _carried_id(self, obj: Any) -> Any:
        number = self._numbers.get(id(obj))
        if number is None:
            if isinstance(obj, torch.jit.ScriptModule):
                self.scripts.add(obj)
            number = self._numbers[id(obj)] = len(self.carried)
            self.carried.append(obj)
        return ("carried", number)

    def _function_id(self, function: types.FunctionType) -> Any:
        model_types = self.options.local_model_types
        by_value = any(isinstance(part, model_types) for _, part in walk(function, stop_at=model_types))
        return self._carried_id_if_listed(function) if by_value else self._carried_id(function)

    def _carried_id_if_listed(self, obj: Any) -> Any:
        return self._carried_id(obj) if id(obj) in self.objects else None

    def _dynamic_function_reduce(self, function: types.FunctionType) -> Any:
        """Reduce a function by value, but some globals of an importable module by name.

        These are containers that the function fills, objects that belong to a process, such as a lock, and objects of
        the module's own classes that hold one. Example: the hooks of transformers' models write hidden states to such
        a global.
        """
        reduced = super()._dynamic_function_reduce(function)
        self.functions.append(function)
        if self._reads_code:
            operators.note_code_operators(self, [function], of_script=function.__module__ == "__main__")
        module = function.__module__
        for name, value in reduced[2][1]["__globals__"].items():
            if id(value) not in self._module_level and is_importable_global(module, name, value):
                self._module_level[id(value)] = None  # set first, because the value's functions may use it
                own = type(value).__module__ == module
                filled = isinstance(value, (dict, list, set)) and name in filled_names(function.__code__)
                if filled or belongs_to_process(type(value)) or (own and self._holds_process(value)):
                    self._note_global(value, (module, name))
        return reduced

    def _holds_process(self, value: object) -> bool:
        return Pickler(io.BytesIO(), self.options, Scripts(), strict=True).dump_error(value) is not None

    def _note_global(self, value: object, place: tuple[str, str]) -> None:
        self._module_level[id(value)] = place
        self._id_functions[type(value)] = self._global_id

    def _global_id(self, obj: Any) -> Any:
        place = self._module_level.get(id(obj))
        return self._carried_id_if_listed(obj) if place is None else ("global", *place)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is collections.OrderedDict:
            # A module has eleven, most of them empty, and `OrderedDict.__reduce__` is slow.
            return NotImplemented if obj or obj.__dict__ else (collections.OrderedDict, ())
        if kind not in self._reducers:
            self._reducers[kind] = reducer_for(kind)
            own = self._reducers[kind] is not None and not isinstance(obj, torch.nn.Module)
            if not own and kind not in copyreg.dispatch_table and (missing := lacks_arguments(obj)):
                refusal = Refusal(
                    f"its class could not make it again in the worker ({missing})",
                    "Give the class a __reduce__, or a __getnewargs__ that returns the arguments.",
                )
                refusal.part = obj
                raise refusal
        reduce = self._reducers[kind]
        if reduce is not None:
            try:
                if self._strict and belongs_to_process(kind):
                    raise Refusal("it belongs to this process", "")
                reduced = reduce(obj, self)
            except Refusal as refusal:
                refusal.part = obj
                raise
            if reduced is not NotImplemented or isinstance(obj, (torch.nn.Module, Tensor)):
                return reduced
        if isinstance(obj, (type, types.FunctionType)):
            self.options.by_value.check(obj.__module__)
        elif kind is types.ModuleType:
            self.options.by_value.check(obj.__name__)
        if isinstance(obj, types.FunctionType) and not issubclass(kind, types.FunctionType):
            raise Refusal(  # cloudpickle would send the function in it alone
                "it stands for a function and is none",
                "Write the decorator with functools.wraps, or move its use to a module that workers can import.",
            )
        if not isinstance(obj, type) and not issubclass(kind, _REDUCED_BY_TORCH_OR_PYTHON):
            if kind in self.dispatch_table:
                self.runs_constructors = True
            elif not has_default_reduce(kind):
                self.runs_constructors = True
                return _reduced_by_its_class(obj)
        reduced = super().reducer_override(obj)
        return complete_class(obj, reduced) if isinstance(obj, type) and type(reduced) is tuple else reduced

    def _add_tensor(self, key: object, tensor: Tensor) -> int:
        number = self._numbers.get(id(key))
        if number is None:
            number = self._numbers[id(key)] = len(self.tensors)
            self.tensors.append(tensor)
            self._keep_alive.append(key)  # so that Python does not reuse its id
        return number

    def _storage_id(self, storage: Any) -> Any:
        if isinstance(storage, torch.UntypedStorage):
            untyped, dtype = storage, None
        else:
            untyped, dtype = storage._untyped_storage, storage.dtype
        if untyped.device.type == "meta":
            return None
        whole = torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)
        return ("storage", self._add_tensor(storage, whole), dtype)

    def _take_array(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            small = buffer.raw().nbytes < SMALLEST_ARRAY
        except BufferError:  # not contiguous: pickle copies it into the stream
            small = True
        if not small:
            self.arrays.append(buffer)
        return small


def _reduced_by_its_class(obj: Any) -> Any:
    """Return what `__reduce__` of an object's class gives. Raise Refusal if unpickling could not use it."""
    reduced = obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    if reason := unusable_state(obj, reduced):
        refusal = Refusal(
            f"unpickling could not set the state that its __reduce__ gives ({reason})",
            "Give the class a __setstate__ that takes this state, or return a dict of attributes.",
        )
        refusal.part = obj
        raise refusal
    return reduced


_REDUCED_BY_TORCH_OR_PYTHON = (
    *(type, enum.Enum, functools.partial, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(torch.nn.Module, Tensor, torch.dtype, torch.Size, torch.device, torch.layout, torch.memory_format),
)
