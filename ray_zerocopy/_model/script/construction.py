"""A TorchScript module -> a TorchScript graph that creates the same objects around other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import parts

__all__ = ["element_types", "exchange_tensors", "record_construction", "view_over"]


Tensor = torch.Tensor


def record_construction(cpp: Any, tensors: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """Return a function that makes a copy of the module `cpp`, with other tensors in the places of `tensors`."""
    numbers = match_tensors(cpp, tensors)
    graph: Any = torch._C.Graph()
    inputs = graph.addInput()
    inputs.setType(torch._C.ListType.ofTensors())
    unpack = graph.insertNode(graph.create("prim::ListUnpack", [inputs], 0))
    order: list[int] = []
    values: dict[Any, Any] = {}
    keep_alive = []  # `values` has modules by their hash

    def add_value(held: Any, kind: Any) -> Any:
        kinds = element_types(kind, len(held)) if type(held) in (list, tuple) else None
        if kinds is not None:  # never reused, because a method can write to a list
            elements = [add_value(element, of) for element, of in zip(held, kinds, strict=True)]
            operator = f"prim::{'List' if type(held) is list else 'Tuple'}Construct"
            value = graph.insertNode(graph.create(operator, elements, 1)).output()
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

    def add_object(module: Any) -> Any:
        if hash(module) in values:
            return values[hash(module)]
        keep_alive.append(module)
        held = [(name, add_value(module.getattr(name), kind)) for name, kind in parts.attribute_types(module).items()]
        held += [(name, add_object(child)) for name, child in torch._C.ModuleDict(module).items()]
        created = graph.insertNode(graph.create("prim::CreateObject", 1)).output()
        created.setType(module._type())
        values[hash(module)] = created
        for name, value in held:
            graph.insertNode(graph.create("prim::SetAttr", [created, value], 0)).s_("name", name)
        return created

    graph.registerOutput(add_object(cpp))
    function: Any = torch._C._create_function_from_graph("rebuild", graph)

    def rebuild(others: list[Tensor]) -> Any:
        optimizing = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # optimization takes long and finds nothing here
        try:
            return function([others[place] for place in order])
        finally:
            torch._C._set_graph_executor_optimize(optimizing)

    return rebuild


def exchange_tensors(cpp: Any, tensors: list[Tensor]) -> None:
    """Replace each tensor that the reader made by the tensor of `tensors` over the same bytes."""
    numbers = match_tensors(cpp, tensors)
    for module in list(parts.modules(cpp)):
        for name in parts.attribute_types(module):
            held = module.getattr(name)
            if isinstance(held, Tensor) and held._cdata in numbers:
                module.setattr(name, tensors[numbers[held._cdata]])


def match_tensors(cpp: Any, tensors: list[Tensor]) -> dict[int, int]:
    """Return, by the address of each C++ tensor of a module, the number of the matching tensor in `tensors`."""
    places: dict[Any, list[int]] = {}
    for place, tensor in reversed(list(enumerate(tensors))):
        places.setdefault(_match_key(tensor), []).append(place)
    in_cpp = {tensor._cdata: tensor for tensor in parts.tensors_of(cpp)}
    return {known: places[_match_key(tensor)].pop() for known, tensor in in_cpp.items()}


def _match_key(tensor: Tensor) -> Any:
    # Without the dtype, because torch may read a wrong one: see `Script.has_mixed_dtypes`. Tensors that differ in
    # their dtype only are matched by their order.
    view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.requires_grad)
    return (tensor.untyped_storage()._cdata, *view)


def element_types(kind: Any, count: int) -> list[Any] | None:
    """Return the types of the elements of a TorchScript list or tuple type, or None for another type."""
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    if kind.kind() == "ListType":
        return [kind.getElementType()] * count
    return list(kind.elements()) if kind.kind() == "TupleType" else None


def view_over(tensor: Tensor, storage: torch.UntypedStorage, offset: Any) -> Tensor:
    """Return a tensor with the dtype, shape and stride of `tensor` over `storage`, from `offset` on (in elements)."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return view.set_(storage, offset, tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)
