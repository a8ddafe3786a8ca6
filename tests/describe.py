"""Describe an object graph without the library, so that tests can compare two graphs part by part."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def describe(obj: object, *, flags: bool = True) -> list[tuple[Any, ...]]:
    """Return one line per part of the graph: path, type, and for tensors everything that a user can see.

    Objects and storages are numbered in the order of the walk, so equal descriptions mean equal aliasing.
    With `flags=False`, train mode and requires_grad are left out.
    """
    lines: list[tuple[Any, ...]] = []
    numbers: dict[int, int] = {}
    storages: dict[int, int] = {}
    alive: list[object] = []

    def visit(part: Any, path: str) -> None:
        if isinstance(part, _ATOMS):
            if flags or not path.endswith(".training"):
                lines.append((path, repr(part)))
            return
        known = numbers.get(id(part))
        if known is not None:
            lines.append((path, "same as", known))
            return
        numbers[id(part)] = len(numbers)
        alive.append(part)
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        if isinstance(part, torch.jit.ScriptModule):
            kind = "ScriptModule"
        lines.append((path, kind))
        if isinstance(part, torch.Tensor):
            lines.append((path, *tensor_facts(part, storages, alive, flags)))
            if not part.is_nested:  # its attributes are numbers that differ by process
                visit(dict(vars(part)), path + ".__dict__")
        elif isinstance(part, torch.jit.ScriptModule):
            if flags:
                lines.append((path, getattr(part, "training", None)))
            # As torch.jit.load returns them: a RecursiveScriptModule, with tensors that are no Parameters in Python.
            named = [*part.named_parameters(), *part.named_buffers()]
            visit([(name, tensor.detach(), flags and tensor.requires_grad) for name, tensor in named], path)
            lines.append((path, re.sub(r"___torch_mangle_\d+\.", "", part.code)))
        elif type(part).__name__ == "ExportedProgram":
            visit([dict(part.state_dict), dict(part.constants)], path)
            lines.append((path, part.graph_module.code, str(part.graph_signature)))
        elif isinstance(part, dict):
            for key, value in part.items():
                visit(value, f"{path}[{key!r}]")
        elif isinstance(part, (list, tuple)):
            for number, value in enumerate(part):
                visit(value, f"{path}[{number}]")
        elif hasattr(part, "__dict__") and not isinstance(part, type) and not callable_only(part):
            for name, value in sorted(vars(part).items()):
                if name.startswith("__"):
                    continue  # set by functools.update_wrapper, and not pickled
                if isinstance(part, torch.fx.GraphModule) and name == "_graph":
                    value = part.code  # torch pickles a graph as its code
                visit(value, f"{path}.{name}")

    visit(obj, "")
    return lines


def callable_only(part: object) -> bool:
    """Tell whether a part is a function, module, method or weak reference, whose attributes are not the model's."""
    return type(part).__name__ in ("function", "builtin_function_or_method", "module", "method", "weakref")


def tensor_facts(tensor: torch.Tensor, storages: dict[int, int], alive: list[object], flags: bool) -> tuple[Any, ...]:
    """Return everything that distinguishes two tensors: dtype, shape, stride, bits, values, storage, flags."""
    if torch.nn.parameter.is_lazy(tensor):
        return ("uninitialized", str(type(tensor)))
    if tensor.is_nested and tensor.layout is torch.strided:
        return ("nested", tensor.dtype, digest(tensor))
    facts: list[Any] = [
        tensor.dtype,
        re.sub(r"j\d+", "j", str(tuple(tensor.shape))),
        tensor.layout,
        tensor.device.type,
    ]
    if flags:
        facts += [tensor.requires_grad]
    if tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested and not tensor.is_meta:
        storage = tensor.untyped_storage()
        alive.append(storage)
        facts += [tensor.stride(), tensor.is_conj(), tensor.is_neg()]
        facts += ["storage", storages.setdefault(storage._cdata, len(storages))]
    facts += [digest(tensor)]
    return tuple(facts)


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of the bits of a tensor's values."""
    with torch.no_grad():
        plain = tensor.detach()
        if plain.is_meta:
            return "meta"
        if plain.is_nested:
            return "+".join(digest(part) for part in plain.unbind())
        if plain.layout is not torch.strided:
            plain = plain.to_dense()
        if plain.is_quantized:
            plain = plain.int_repr()
        if type(plain) is not torch.Tensor and hasattr(plain, "__tensor_flatten__"):
            names, _ = plain.__tensor_flatten__()
            return "+".join(digest(getattr(plain, name)) for name in names)
        plain = plain.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
        plain = plain.as_strided((plain.numel(),), (1,))
        if plain.numel() == 0:
            return "empty"
        return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors whose storages hold the bytes of a tensor."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        return [piece for name in tensor.__tensor_flatten__()[0] for piece in pieces(getattr(tensor, name))]
    match tensor.layout:
        case torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        case torch.sparse_csr | torch.sparse_bsr:
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor]


def storage_bytes(obj: object) -> int:
    """Return the bytes of the distinct storages under the strided tensors of a graph."""
    seen: dict[int, int] = {}
    alive: list[object] = []
    visited: set[int] = set()

    def visit(part: Any) -> None:
        if isinstance(part, _ATOMS) or id(part) in visited:
            return
        visited.add(id(part))
        alive.append(part)
        if isinstance(part, torch.Tensor):
            for inner in pieces(part):
                storage = inner.untyped_storage()
                alive.append(storage)
                seen[storage._cdata] = storage.nbytes()
            visit(vars(part))
        elif isinstance(part, dict):
            for value in part.values():
                visit(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                visit(value)
        elif isinstance(part, torch.jit.ScriptModule):
            visit([*part.parameters(), *part.buffers()])
        elif hasattr(part, "__dict__") and not isinstance(part, type) and not callable_only(part):
            visit(vars(part))

    visit(obj)
    return sum(seen.values())
