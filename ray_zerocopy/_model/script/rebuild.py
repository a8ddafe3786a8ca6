"""Archives without weights, and tensors -> a TorchScript module or function.

See Note [TorchScript without weights] in `archive.py`.
"""

from __future__ import annotations

import io
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import ScriptModule
from torch.jit._script import OrderedModuleDict, RecursiveScriptModule

from . import parts
from .archive import Script
from .construction import exchange_tensors, record_construction
from .signature import function_of

__all__ = ["MAX_COMPILED", "SMALL_CONSTANTS", "part_at", "rebuild_script"]


Tensor = torch.Tensor
# The number of prepared models whose compiled code a process keeps for the next load. The code takes a few MB each.
MAX_COMPILED = 8
# Graph constants of at most this many bytes are copied when the code is compiled, so that the kept code does not keep
# the model's pages in memory.
SMALL_CONSTANTS = 64 * 1024


def rebuild_script(
    script: Script, tensors: list[Tensor], python_state: dict[str, dict[str, Any]], keep_flags: object = False
) -> Any:
    """Rebuild the module or function around the storages of `tensors`, without copying them."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    number = 1 if script.has_flags and keep_flags is True else 0
    key = (script.key, device, number)
    with _compile_lock:
        compiled = _compiled.get(key)
        if compiled is not None and compiled.construct is not None:
            cpp = compiled.construct(tensors)
        else:
            fresh = compiled is None
            if compiled is None:
                compiled = _CompiledModule(torch._C.CompilationUnit())
            cpp = read_module(compiled.unit, script, tensors, device, number, fresh)
            if script.is_plain and (script.has_mixed_dtypes or not fresh):
                compiled.construct = record_construction(cpp, tensors)
            if script.has_mixed_dtypes and compiled.construct is not None:
                cpp = compiled.construct(tensors)
            elif script.is_plain:
                exchange_tensors(cpp, tensors)
            if script.cache != "none":
                _compiled[key] = compiled
        if script.cache == "strong":
            _keep_recent(key, compiled)
    if script.function is not None:
        return function_of(cpp, script.function)
    if compiled.concrete is None:
        compiled.concrete = torch._C.ConcreteModuleType.from_jit_type(cpp._type())
    module = wrap_module(cpp, compiled.concrete)
    # A module keeps its code alive: the cache holds a weak reference, see `Script.cache`.
    module.__dict__["_compiled"] = compiled
    for path, state in python_state.items():
        part = part_at(module, path)
        for name, value in state.items():
            if isinstance(value, parts.OwnMethod):
                part.__dict__[name] = types.MethodType(value.function, part)
            else:
                part.__dict__[name] = value
    return module


def part_at(whole: ScriptModule, path: str) -> Any:
    """Return the submodule at a dotted path; the module itself for an empty path."""
    for name in path.split(".") if path else ():
        whole = whole._modules[name]  # type: ignore[assignment]
    return whole


class _CompiledModule:
    """The compiled code of a prepared module, which the loads of a process share.

    Attributes:
        unit: The classes and their methods.
        concrete: The type that Python needs to wrap the module; None until the first load.
        construct: Makes the module from its tensors; None until `record_construction` has run.
    """

    def __init__(self, unit: Any) -> None:
        self.unit = unit
        self.concrete: Any = None
        self.construct: Callable[[list[Tensor]], Any] | None = None


_Key = tuple[bytes, torch.device | None, int]
_compile_lock = threading.Lock()
_compiled: weakref.WeakValueDictionary[_Key, _CompiledModule] = weakref.WeakValueDictionary()
_recent: OrderedDict[_Key, _CompiledModule] = OrderedDict()


def read_module(unit: Any, script: Script, tensors: list[Tensor], device: Any, number: int, fresh: bool) -> Any:
    """Read the module from `script.code` if `fresh`, else from `script.objects` with the classes of `unit`."""
    storages = torch._C.DeserializationStorageContext()
    places: dict[int, torch.UntypedStorage] = {}
    for place, index in enumerate(script.storages):
        tensor = tensors[index]
        if device is not None:
            # The reader accepts only host storages. Empty ones take their places until `_move_to_device`. A class's
            # `__setstate__` reads its storages at once, so they are copied to the host.
            host = tensor.cpu() if place >= script.first_serialized else torch.empty_like(tensor, device="cpu")
            places[host.untyped_storage()._cdata] = tensor.untyped_storage()
            tensor = host
        elif script.cache == "strong" and script.first_constant <= place < script.first_serialized:
            tensor = tensor.clone()  # copy: a few KB of graph constants, see SMALL_CONSTANTS
        storages.add_storage(f"{place}.storage", tensor)
    reader = torch._C.PyTorchFileReader(io.BytesIO(script.code if fresh else script.objects))
    root: Any = torch._C._import_ir_module_from_package(unit, reader, storages, torch.device("cpu"), str(number))
    cpp = root.getattr("held")
    if places:
        _move_to_device(cpp, places, fresh)
    return cpp


def _move_to_device(cpp: Any, places: dict[int, torch.UntypedStorage], constants: bool) -> None:
    """Replace the host storage of each tensor, and of each graph constant if `constants`, by one on the device."""
    done = set()
    for tensor in (*parts.tensors_of(cpp), *(parts.constants(cpp) if constants else ())):
        place = places.get(tensor.untyped_storage()._cdata) if torch._C._has_storage(tensor) else None
        if place is None or tensor._cdata in done:
            continue
        done.add(tensor._cdata)
        there = torch.empty(0, dtype=tensor.dtype, device=place.device)
        tensor.data = there.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())


def _keep_recent(key: _Key, compiled: _CompiledModule) -> None:
    _recent[key] = compiled
    _recent.move_to_end(key)
    while len(_recent) > MAX_COMPILED:
        _recent.popitem(last=False)


class _LazyModules(OrderedModuleDict):
    """A module's children, wrapped in Python objects on first access. A call of the module does not need them."""

    def __init__(self, cpp: Any) -> None:
        self._c = torch._C.ModuleDict(cpp)

    def __getattr__(self, name: str) -> Any:
        if name != "_python_modules":
            raise AttributeError(name)
        self._python_modules = {child: wrap_module(cpp) for child, cpp in self._c.items()}
        return self._python_modules


def wrap_module(cpp: Any, concrete: Any = None) -> RecursiveScriptModule:
    def initialize(module: Any) -> None:
        module._concrete_type = concrete or torch._C.ConcreteModuleType.from_jit_type(cpp._type())
        module._forward_pre_hooks.update(enumerate(cpp._get_forward_pre_hooks()))
        module._forward_hooks.update(enumerate(cpp._get_forward_hooks()))

    module: RecursiveScriptModule = RecursiveScriptModule._construct(cpp, initialize)  # type: ignore[no-untyped-call]
    module.__dict__["_modules"] = _LazyModules(cpp)
    return module
