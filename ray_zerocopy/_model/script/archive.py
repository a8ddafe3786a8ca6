"""The archive format for a TorchScript module without its weights.

Note [TorchScript without weights]

A `ScriptModule` is a C++ object, so a pickler cannot look inside it. `torch.jit.save` writes weights and code into
one archive. `torch.package` can write several script modules into one archive, and they share weights with eager
code: its serializer has a table of the storages that are already in the archive, and skips them. The writer here
enters every storage of the module into that table first, so the archive has no weights. The reader gets the same
storages, now views of shared memory, and finds each of them by its number::

    ScriptModule --+-- classes, methods ------> code      compiled once per process and prepared model
                   +-- attributes, flags -----> objects                             [storage 0] [storage 1]
                   +-- tensors ---------------> tensors   shared like any other tensor
                   +-- graph constants -------> tensors   (a frozen module's weights): one uint8 view per storage

A process loads one prepared model in three ways:

1. The first load reads `code` and compiles it.
2. The second load reads `objects` into the same `CompilationUnit`. Nothing is compiled, so this load is ten times as
   fast. If `Script.is_plain`, the load also records how the objects refer to each other, as a TorchScript graph:
   "create an object of this class, set its attribute weight to tensor 7".
3. Later loads run this graph in the interpreter. That is forty times as fast as reading `objects`.

Loads in one process share their classes and compiled methods, as two instances of one scripted class do. They never
share attributes or tensors, except for graph constants.

`wrap_in_attribute` makes the module an attribute of another module before it is written. The reader searches the
methods of a root module and its children for operators of old releases. This search takes longer than reading the
module, and the reader does not search the values of attributes.

Memory that a class allocates while it is read is not shared: a quantized layer packs its weights for the processor.
`Script.private` counts these bytes. Graph constants are shared. `parts.constant_bytes` counts them, because they are
in no `state_dict`.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch

__all__ = [
    "CONSTANTS_RECORD",
    "DATA_RECORD",
    "EMPTY_TUPLE",
    "KEEP_FLAGS",
    "KeepFlags",
    "Script",
    "Signature",
    "write_archive",
]


class KeepFlags:
    """The type of `KEEP_FLAGS`."""

    def __reduce__(self) -> str:
        return "KEEP_FLAGS"


# The placeholder for the argument `keep_flags` of `rebuild_script`. The pickler of `graph.py` gives it a persistent
# id, and the unpickler replaces it by a bool. Any other pickler leaves it in place, and then it means False.
KEEP_FLAGS = KeepFlags()


class Signature(NamedTuple):
    """The signature of a TorchScript function.

    `source` defines a function with the original name, arguments and defaults that calls the graph by the name
    `inner`. It is None if torch cannot parse the types that it prints, which are classes.
    """

    name: str
    inner: str
    source: str | None


class Script(NamedTuple):
    """A module without its tensors.

    Attributes:
        key: Identifies the prepared model in a process's cache of compiled code.
        code: The archive, with everything except the storages.
        objects: The archive without code as well.
        has_flags: Whether both archives have a second set of objects, with `requires_grad` and `training` set.
        is_plain: Whether `record_construction` can make every attribute: modules, ordinary tensors, numbers, strings,
            and lists and tuples of numbers and strings. False if a method may make two lists one object.
        has_mixed_dtypes: Whether tensors of several dtypes view one storage. torch reads them with one dtype.
        cache: 'strong' if compiled code may outlive the modules made with it. 'weak' if the code holds shared tensors
            (graph constants). 'none' if a method writes to constants or returns them, so each module needs a copy.
        storages: For each storage of the archives, the number of a tensor that views all of the storage.
        first_constant: The storages from this number on are graph constants.
        first_serialized: The storages from this number on were made by a class's `__getstate__`.
        private: Bytes of the storages from `first_serialized` on. Every load has a copy of them.
        function: The signature, for a function; None for a module.
    """

    key: bytes
    code: Any
    objects: Any
    has_flags: bool
    is_plain: bool
    has_mixed_dtypes: bool
    cache: str
    storages: list[int]
    first_constant: int
    first_serialized: int
    private: int
    function: Signature | None


DATA_RECORD = ".data/ts_code/{}/data.pkl"
CONSTANTS_RECORD = ".data/ts_code/{}/constants.pkl"
EMPTY_TUPLE = b"\x80\x02)."  # pickle of ()


def write_archive(records: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name, record in records.items():
        if name.startswith(".data/") and not name.endswith("serialization_id"):  # the writer writes the other records
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return stream.getvalue()
