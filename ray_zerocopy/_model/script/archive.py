"""A TorchScript module without its weights: what travels in its place, and how its records are named.

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

The module travels as an attribute of another module (`held_in_attribute`). The reader looks through the methods of a
root module and its children for operators of old releases, which costs more than reading the module. It skips what an
attribute holds.

What cannot be shared is what a class makes of its tensors while it is read: a quantized layer packs its weights
for the processor, in memory of its own. `Script.private` counts it. What a frozen module has in its graphs is
shared; `_script_parts.baked_bytes` counts it, because it is in no `state_dict`.
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


# Stands in a reduced module where `rebuild_script` takes whether to keep requires_grad: a pickler that has an
# answer gives it a persistent id, and its unpickler a bool. Left in place, it means no.
KEEP_FLAGS = KeepFlags()


class Signature(NamedTuple):
    """What a function is called; and the source of one with its arguments and defaults that calls it as `inner`.

    No source where torch does not read the names of the types that it writes: classes.
    """

    name: str
    inner: str
    source: str | None


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
    function: Signature | None


DATA_RECORD = ".data/ts_code/{}/data.pkl"
CONSTANTS_RECORD = ".data/ts_code/{}/constants.pkl"
EMPTY_TUPLE = b"\x80\x02)."  # pickle of ()


def write_archive(records: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name, record in records.items():
        if name.startswith(".data/") and not name.endswith("serialization_id"):  # the writer adds the others itself
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return stream.getvalue()
