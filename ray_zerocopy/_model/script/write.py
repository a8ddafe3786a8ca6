"""A TorchScript module or function -> archives without weights, and its tensors.

See Note [TorchScript without weights] in `archive.py`.
"""

from __future__ import annotations

import io
import pickle
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.jit import ScriptFunction, ScriptModule

from ..packing import reachable_ranges
from . import parts
from .archive import (
    CONSTANTS_RECORD,
    DATA_RECORD,
    EMPTY_TUPLE,
    KEEP_FLAGS,
    Script,
    Signature,
    write_archive,
)
from .construction import element_types, record_construction, view_over
from .flags import clear_flags
from .rebuild import SMALL_CONSTANTS, rebuild_script
from .signature import signature_of

__all__ = ["reduce_script"]


Tensor = torch.Tensor


def reduce_script(module: ScriptModule | ScriptFunction[Any, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return `rebuild_script` and its arguments, as `__reduce__` does, without changing `module`.

    The tensors among the arguments share the storages of the module's tensors.

    Raises:
        RuntimeError: `torch.jit.save` cannot write the module.
        ValueError: `torch.jit.save` writes the module, but loses weights, dtypes or defaults.
    """
    if isinstance(module, ScriptFunction):
        # copy: graph constants; a function has no other tensors
        unit = torch._C.CompilationUnit()
        holder = torch._C.import_ir_module_from_buffer(unit, module.save_to_buffer({}), None, {}, False)  # type: ignore[call-arg, arg-type]
        script, tensors = _take_apart(holder, signature_of(module, holder))
        return rebuild_script, (script, tensors, {}, KEEP_FLAGS)
    script, tensors = _take_apart(module._c, None)
    return rebuild_script, (script, tensors, parts.python_state(module), KEEP_FLAGS)


def _take_apart(cpp: Any, function: Signature | None) -> tuple[Script, list[Tensor]]:
    _refuse_packed_for_mkldnn(cpp)
    constants = list(parts.constants(cpp))
    plain = function is None and all(_is_plain(value, kind) for value, kind in parts.attributes(cpp))
    plain = plain and not parts.may_tie_lists(cpp)
    if plain and _storage_ids(parts.tensors_of(cpp)).isdisjoint(_storage_ids(constants)):
        cpp = _compact(cpp)
    writer = _WeightlessWriter(cpp)
    tensors, whole = _enter_attributes(cpp, writer, keep_objects=plain)
    first = len(writer.storages)
    entered = [writer.enter(tensor) for tensor in constants]
    constants_apart = not any(0 <= number < first for number in entered)
    last = len(writer.storages)
    mixed = any(len(dtypes) > 1 for dtypes in writer.dtypes)
    if mixed and (not plain or any(len(writer.dtypes[number]) > 1 for number in entered if number >= 0)):
        raise ValueError(
            f"a {cpp.qualified_name} has tensors of different dtypes over one storage. torch.jit.save keeps only one "
            f"dtype per storage. Clone one of them"
        )
    small = constants_apart and sum(storage.nbytes() for storage in writer.storages[first:]) <= SMALL_CONSTANTS
    records, private = writer.records()
    numbers = []
    for number, storage in enumerate(writer.storages):
        if number not in whole:
            whole[number] = len(tensors)
            tensors.append(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
        numbers.append(whole[number])
    has_flags = _add_flagless_objects(records, cpp)
    cache = "strong"
    if constants and parts.has_mutable_constants(cpp):
        cache = "none"
    elif records[CONSTANTS_RECORD.format(0)] != EMPTY_TUPLE and not (small and private == 0):
        cache = "weak"
    objects = {CONSTANTS_RECORD.format(n): EMPTY_TUPLE for n in range(1 + has_flags)}
    objects |= {DATA_RECORD.format(n): records[DATA_RECORD.format(n)] for n in range(1 + has_flags)}
    # Out of band: every load reads the skeleton, but a process reads each archive at most twice.
    archives = pickle.PickleBuffer(write_archive(records)), pickle.PickleBuffer(write_archive(objects))
    script = Script(
        uuid.uuid4().bytes, *archives, has_flags, plain, mixed, cache, numbers, first, last, private, function
    )
    return script, tensors


class _WeightlessWriter:
    """Writes a module with torch's serializer, without the bytes of the storages that were entered before.

    Attributes:
        storages: The entered storages, by their number in the archive.
        dtypes: For each storage, the dtypes of the tensors over it.
    """

    def __init__(self, cpp: Any) -> None:
        self._cpp = cpp
        self._stream = io.BytesIO()
        self._writer = torch._C.PyTorchFileWriter(self._stream)
        self._serializer = torch._C.ScriptModuleSerializer(self._writer)
        self._known: Any = self._serializer.storage_context()
        self.storages: list[torch.UntypedStorage] = []
        self.dtypes: list[set[torch.dtype]] = []

    def enter(self, tensor: Tensor) -> int:
        """Enter the tensor's storage. Return its number, or -1 if the tensor has no storage."""
        if tensor.is_meta:
            raise ValueError(
                f"a {self._cpp.qualified_name} has a tensor on the meta device, which has no bytes. Fill the tensor"
            )
        if tensor.layout is not torch.strided or not torch._C._has_storage(tensor):
            return -1
        storage = tensor.untyped_storage()
        number: int = self._known.get_or_add_storage(storage)
        if number == len(self.storages):
            self.storages.append(storage)
            self.dtypes.append(set())
        self.dtypes[number].add(tensor.dtype)
        return number

    def records(self) -> tuple[dict[str, bytes], int]:
        """Write the module. Return the records of the archive, and the bytes of storages that were not entered.

        A class's `__getstate__` makes such storages. This method adds them to `storages`.
        """
        self._serializer.serialize(wrap_in_attribute(self._cpp), 0)
        self._serializer.write_files()
        self._writer.write_end_of_file()
        reader = torch._C.PyTorchFileReader(io.BytesIO(self._stream.getbuffer()))
        records = {name: reader.get_record(name) for name in reader.get_all_records()}
        private = 0
        while (record := records.pop(f".data/{len(self.storages)}.storage", None)) is not None:
            private += len(record)
            data = torch.frombuffer(bytearray(record), dtype=torch.uint8) if record else _empty_bytes()
            self.storages.append(data.untyped_storage())
        return records, private


def _enter_attributes(
    cpp: Any, writer: _WeightlessWriter, *, keep_objects: bool
) -> tuple[list[Tensor], dict[int, int]]:
    """Enter the storages of a module's attributes.

    With `keep_objects`, return the tensors of the attributes, and a dict from the number of a storage to the number
    of a tensor that views all of it, where there is one. Otherwise return an empty list and an empty dict.
    """
    tensors: list[Tensor] = []
    whole: dict[int, int] = {}
    seen: set[int] = set()
    for tensor in parts.tensors_of(cpp):
        number = writer.enter(tensor)
        if keep_objects and tensor._cdata not in seen:
            seen.add(tensor._cdata)
            if tensor.is_contiguous() and tensor.nbytes == writer.storages[number].nbytes():
                whole.setdefault(number, len(tensors))
            # The same object, so that ties with eager code stay. A view if it has Python attributes or a subclass.
            bare = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.__dict__
            tensors.append(tensor if bare else view_over(tensor, tensor.untyped_storage(), tensor.storage_offset()))
    return tensors, whole


def _add_flagless_objects(records: dict[str, bytes], cpp: Any) -> bool:
    """Make the objects without flags number 0, and those with flags number 1. Return False if no flag is set."""
    flagless = clear_flags(records[DATA_RECORD.format(0)], cpp)
    if flagless == records[DATA_RECORD.format(0)]:
        return False
    records[DATA_RECORD.format(1)] = records[DATA_RECORD.format(0)]
    records[CONSTANTS_RECORD.format(1)] = records[CONSTANTS_RECORD.format(0)]
    records[DATA_RECORD.format(0)] = flagless
    return True


def _is_plain(value: object, kind: Any) -> bool:
    """Tell whether `record_construction` can make an attribute: numbers, strings, lists of them, strided tensors."""
    if isinstance(value, Tensor):
        has_bytes = value.layout is torch.strided and torch._C._has_storage(value) and not value.is_nested
        return has_bytes and not (value.is_meta or value.is_quantized or value.is_conj() or value.is_neg())
    return _is_plain_constant(value, kind)


def _is_plain_constant(value: object, kind: Any) -> bool:
    if type(value) in (list, tuple):
        kinds = element_types(kind, len(value))  # type: ignore[arg-type]
        return kinds is not None and all(map(_is_plain_constant, value, kinds))  # type: ignore[call-overload]
    return value is None or type(value) in (bool, int, float, str)


def _storage_ids(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if torch._C._has_storage(tensor)}


def _compact(cpp: Any) -> Any:
    """Return the module, or a copy without the unreachable bytes of storages that are mostly unreachable."""
    tensors = list({tensor._cdata: tensor for tensor in parts.tensors_of(cpp)}.values())
    storages, numbers, ranges = reachable_ranges(tensors)
    pieces: dict[int, torch.UntypedStorage] = {}
    for number, (storage, (low, high)) in enumerate(zip(storages, ranges, strict=True)):
        if high - low < storage.nbytes():
            reached = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (high - low,), (1,))
            pieces[number] = reached.clone().untyped_storage()  # copy: the reachable part, at most half the storage
    if not pieces:
        return cpp
    others = []
    for tensor, number in zip(tensors, numbers, strict=True):
        if number in pieces:
            offset = tensor.storage_offset() - ranges[number][0] // tensor.element_size() if tensor.numel() else 0
            tensor = view_over(tensor, pieces[number], offset)
        others.append(tensor)
    return record_construction(cpp, tensors)(others)


def _refuse_packed_for_mkldnn(cpp: Any) -> None:
    """Raise ValueError for weights packed by oneDNN: `torch.jit.save` writes the module without them."""
    for module in parts.modules(cpp):
        for name in module._method_names():
            if module._get_method(name).graph.findNode("prim::ConstantMKLDNNTensor") is not None:
                raise ValueError(
                    f"the graph of its {name}() has weights packed by torch.jit.optimize_for_inference, and "
                    f"torch.jit.save loses them. Share the module without this optimization, frozen or not, and call "
                    f"torch.jit.optimize_for_inference in the worker"
                )


def _empty_bytes() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def wrap_in_attribute(cpp: Any) -> Any:
    """Return a module that holds `cpp` in an attribute; see Note [TorchScript without weights]."""
    holder: Any = torch._C.ScriptModule("Held", torch._C.CompilationUnit(), True)  # type: ignore[call-arg]
    holder._register_attribute("held", torch._C.AnyType.get(), cpp)
    return holder
