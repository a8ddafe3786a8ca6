"""Kinds of tensors: a pair of functions that reduce and rebuild each. See Note [Skeletons] in `graph.py`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from . import paths
from .kinds import Walk, reduces
from .script import parts

__all__ = [
    "components",
    "has_storage",
    "is_plain",
    "map_tensors",
    "packed_bytes",
    "rebuild_decorated",
    "set_tensor_attributes",
]

Tensor = torch.Tensor
Parameter = torch.nn.Parameter


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a `torch.Tensor` or `Parameter` is a view of a storage without Python attributes."""
    return not tensor.__dict__ and has_storage(tensor)


def has_storage(tensor: Tensor) -> bool:
    """Tell whether a tensor is a strided view of one storage: not sparse, quantized, nested or on the meta device."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_nested
        and torch._C._has_storage(tensor)
    )


def components(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the bytes of `tensor`: itself, or the indices and values of a sparse one, ..."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        inner = (getattr(tensor, name) for name in flatten()[0])
        yield from (part for held in inner if isinstance(held, Tensor) for part in components(held))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif torch._C._has_storage(tensor):
        yield tensor


def packed_bytes(obj: torch.ScriptObject) -> int:
    """Return the bytes of the weights that a quantized layer has packed for the processor."""
    try:
        packed = obj.unpack() if hasattr(obj, "unpack") else obj.__getstate__()
    except RuntimeError:
        return 0
    return sum(part.untyped_storage().nbytes() for part in parts.tensors_within(packed))


@reduces(Tensor)
def _reduce_tensor(tensor: Tensor, walk: Walk) -> Any:
    kind = type(tensor)
    walk.flagged_tensors.append(tensor)
    if kind not in walk.dispatch_table and is_decorated(tensor):
        if kind is not Tensor and not issubclass(kind, Parameter):
            walk.fixed_dtype_class = f"{kind.__name__} of {tensor.dtype}"
        reduced = reduce_decorated(tensor)
        # A quantized Parameter subclass means nothing without its scales, which hang on its attributes.
        if kind not in (Tensor, Parameter):
            walk.fixed_dtype_ids.add(id(reduced[1][0]))
        attached = (part for _, part in paths.walk(reduced[2], stop_at=(torch.nn.Module,)))
        walk.fixed_dtype_ids.update(id(part) for part in attached if isinstance(part, Tensor))
        return reduced
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        walk.tensors_without_bytes.append(tensor)
    if any(True for _ in components(tensor)):
        walk.fixed_dtype_class = f"{kind.__name__} of {tensor.dtype}"
    if kind is Tensor and tensor.is_quantized:
        return reduce_quantized(tensor)
    if kind is Tensor and tensor.requires_grad and tensor.layout is not torch.strided:
        return Tensor.requires_grad_, (tensor.detach(),), dict(tensor.__dict__), None, None, set_tensor_attributes
    return NotImplemented


# ---------------------------------------------------------------- decorated


def is_decorated(tensor: Tensor) -> bool:
    """Tell whether a tensor is a view of one storage with attributes, or of a subclass that only adds attributes."""
    kind = type(tensor)
    if kind is Tensor:
        return has_storage(tensor)
    return (
        kind.__reduce_ex__ in (Parameter.__reduce_ex__, Tensor.__reduce_ex__)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and not hasattr(kind, "__tensor_flatten__")
        and has_storage(tensor)
    )


def reduce_decorated(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        arguments = (Tensor.detach(tensor).as_subclass(Tensor), type(tensor), tensor.requires_grad)
    state = torch._utils._get_obj_state(tensor)  # type: ignore[no-untyped-call]
    return rebuild_decorated, arguments, state, None, None, set_tensor_attributes


def rebuild_decorated(data: Tensor, kind: type, requires_grad: bool) -> Tensor:
    if kind is Tensor:
        return data.requires_grad_(requires_grad)
    return Tensor._make_subclass(kind, data, requires_grad)


# ---------------------------------------------------------------- quantized


def reduce_quantized(tensor: Tensor) -> Any:
    """Reduce a quantized tensor as torch does, but with an untyped storage: a typed one warns when it is read."""
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
    return _rebuild_quantized, arguments, dict(tensor.__dict__), None, None, set_tensor_attributes


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
        # The final shape, because torch checks the quantizer against it. The allocated pages are never written.
        tensor = torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zero_points, axis=axis, **options
        )
    return tensor.set_(storage, offset, shape, stride)


# ---------------------------------------------------------------- attributes


def set_tensor_attributes(tensor: Tensor, state: Any) -> None:
    if type(tensor).__setstate__ is not Tensor.__setstate__:
        tensor.__setstate__(state)  # type: ignore[no-untyped-call]
    elif isinstance(state, dict):
        tensor.__dict__.update(state)
    else:
        torch._utils._set_obj_state(tensor, state)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- tensors in containers


def map_tensors(values: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `values` with `function` applied to every tensor in it. Containers keep their types.

    Looks into lists, tuples, mappings and dataclasses. A container is returned as it is if no tensor in it changes,
    and so is any other object.
    """
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in values.items()}
        if all(mapped[key] is value for key, value in values.items()):
            return values
        if type(values) is dict or not isinstance(values, MutableMapping):
            return mapped
        result = copy.copy(values)
        for key, value in mapped.items():
            result[key] = value
        return result
    if isinstance(values, (list, tuple)):
        # torch requires the batch sizes of a PackedSequence on the host.
        host_item: Any = values.batch_sizes if isinstance(values, PackedSequence) else None
        items = [value if value is host_item else map_tensors(value, function) for value in values]
        if all(new is old for new, old in zip(items, values, strict=True)):
            return values
        return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.init}
        changed = {key: map_tensors(value, function) for key, value in fields.items()}
        if any(changed[key] is not value for key, value in fields.items()):
            return dataclasses.replace(values, **changed)
    return values
