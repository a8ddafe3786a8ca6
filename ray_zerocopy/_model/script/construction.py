"""How the objects of a TorchScript module hang together, as a TorchScript graph that makes another one like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import parts

__all__ = ["element_types", "exchange_tensors", "record_construction", "view_over"]


Tensor = torch.Tensor


def record_construction(cpp: Any, tensors: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """Return a function that makes a module as `cpp` is one of `tensors`, of others in their places."""
    numbers = match_tensors(cpp, tensors)
    graph: Any = torch._C.Graph()
    given = graph.addInput()
    given.setType(torch._C.ListType.ofTensors())
    unpack = graph.insertNode(graph.create("prim::ListUnpack", [given], 0))
    order: list[int] = []
    values: dict[Any, Any] = {}
    alive = []

    def value_of(held: Any, kind: Any) -> Any:
        kinds = element_types(kind, len(held)) if type(held) in (list, tuple) else None
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
        held = [(name, value_of(module.getattr(name), kind)) for name, kind in parts.kinds(module).items()]
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


def exchange_tensors(cpp: Any, tensors: list[Tensor]) -> None:
    """Exchange a module's tensors, which were just read, for those that they are like."""
    numbers = match_tensors(cpp, tensors)
    for module in list(parts.modules(cpp)):
        for name in parts.kinds(module):
            held = module.getattr(name)
            if isinstance(held, Tensor) and held._cdata in numbers:
                module.setattr(name, tensors[numbers[held._cdata]])


def match_tensors(cpp: Any, tensors: list[Tensor]) -> dict[int, int]:
    """Return, by the C++ object of each tensor of a module, the number of the one that it is like."""
    places: dict[Any, list[int]] = {}
    for place, tensor in reversed(list(enumerate(tensors))):
        places.setdefault(_place_of(tensor), []).append(place)
    in_cpp = {tensor._cdata: tensor for tensor in parts.tensors_of(cpp)}
    return {known: places[_place_of(tensor)].pop() for known, tensor in in_cpp.items()}


def _place_of(tensor: Tensor) -> Any:
    # Without the dtype, see `Script.mixed`: what is alike then comes in one order.
    place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.requires_grad)
    return (tensor.untyped_storage()._cdata, *place)


def element_types(kind: Any, count: int) -> list[Any] | None:
    """Return the types of the elements of a list or tuple of TorchScript's, None for another type."""
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    if kind.kind() == "ListType":
        return [kind.getElementType()] * count
    return list(kind.elements()) if kind.kind() == "TupleType" else None


def view_over(tensor: Tensor, storage: torch.UntypedStorage, offset: Any) -> Tensor:
    """Return a tensor as `tensor` is over another storage, or a second one over the same."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return view.set_(storage, offset, tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)
