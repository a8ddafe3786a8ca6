"""The signature of an exported program: which arguments it takes, and which outputs it returns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from .pytrees import pytree_registrations, register_pytree_types

__all__ = ["BoundSignature", "ConstantInput", "Signature", "TensorInput", "signature_of"]


class TensorInput(NamedTuple):
    """What a program expects of a tensor.

    Attributes:
        name: The path of the argument.
        dtype: Its dtype.
        sizes: Its sizes: a number, the name of a dynamic size, or an expression of such names.
        order: The dimensions by falling stride. The compiled code reads memory in this order.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    order: tuple[int, ...]


class ConstantInput(NamedTuple):
    """An argument whose value the compiled code contains.

    Attributes:
        name: The path of the argument.
        value: Its value in the export.
    """

    name: str
    value: Any


class Signature(NamedTuple):
    """The signature of a program, picklable.

    Attributes:
        names: The names of the positional arguments.
        keywords: The names of the keyword-only arguments, in the order of the export.
        inputs: What the program expects of each leaf of the arguments.
        outputs: For each leaf of the result None for a tensor, `int` for a size, or a constant in a tuple.
        specs: The serialized TreeSpecs of the arguments and of the result.
        registrations: The pytree types in them.
        ranges: The smallest and largest value of each dynamic size.
        derived: Expressions `a * size + b`, such as an even number of rows: the name of the size, a and b.
    """

    names: tuple[str, ...]
    keywords: tuple[str, ...]
    inputs: tuple[TensorInput | ConstantInput, ...]
    outputs: tuple[Any, ...]
    specs: tuple[str, str]
    registrations: list[tuple[Any, ...]]
    ranges: dict[str, tuple[int, float]]
    derived: dict[str, tuple[str, int, int]]


# ---------------------------------------------------------------- reading it from a program


def signature_of(program: torch.export.ExportedProgram) -> Signature:
    """Return the signature of a program.

    Raises:
        ValueError: The program has no example inputs, or takes an argument that is neither a tensor nor constant.
    """
    if program.example_inputs is None:
        raise ValueError(
            "the exported program has no example inputs, which AOTInductor needs. Export it again: "
            "torch.export.export(model, args)."
        )
    arguments, keywords = in_spec_parts(program.call_spec.in_spec)
    call = program.module_call_graph[0].signature
    known = list(getattr(call, "forward_arg_names", None) or ())
    names = tuple([*known, *(f"argument {n}" for n in range(len(known), arguments))][:arguments])
    examples, _ = _pytree.tree_flatten_with_path(program.example_inputs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    kinds = torch.export.graph_signature
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is kinds.InputKind.USER_INPUT]
    inputs: list[Any] = []
    derived: dict[str, tuple[str, int, int]] = {}
    for spec, (path, example) in zip(specs, examples, strict=True):
        name = _argument_name(path, names)
        if isinstance(spec.arg, kinds.ConstantArgument):
            inputs.append(ConstantInput(name, spec.arg.value))
        elif isinstance(spec.arg, kinds.TensorArgument):
            inputs.append(_tensor_input(name, example, values[spec.arg.name]))
            derived |= _derived_sizes(values[spec.arg.name])
        else:
            raise ValueError(
                f"the argument {name} of the program is a dynamic {type(example).__name__}. Compiled programs take "
                f"tensors and constants. Export it as a tensor, or without a dynamic shape for it."
            )
    _check_names_are_known(inputs, derived)
    return Signature(
        names,
        tuple(keywords),
        tuple(inputs),
        tuple(_output(spec.arg) for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"),
        (_pytree.treespec_dumps(program.call_spec.in_spec), _pytree.treespec_dumps(program.call_spec.out_spec)),
        pytree_registrations([program.call_spec.in_spec, program.call_spec.out_spec]),
        {
            str(symbol): (int(found.lower), _upper(found.upper))
            for symbol, found in program.range_constraints.items()
            if symbol.is_symbol  # torch also lists expressions, such as twice another size
        },
        derived,
    )


def _derived_sizes(value: Any) -> dict[str, tuple[str, int, int]]:
    """Return the sizes of a tensor that are `a * size + b`, as sympy expressions of the export."""
    found = {}
    for size in value.shape:
        expression = None if isinstance(size, int) else size.node.expr
        if expression is not None and not expression.is_symbol and len(expression.free_symbols) == 1:
            (symbol,) = expression.free_symbols
            factor = expression.coeff(symbol, 1)
            rest = expression - factor * symbol
            if factor.is_Integer and rest.is_Integer and factor > 0:
                found[str(expression)] = (str(symbol), int(factor), int(rest))
    return found


def _check_names_are_known(inputs: Sequence[Any], derived: dict[str, tuple[str, int, int]]) -> None:
    """Refuse sizes that a call could not check: expressions of names that are the size of no input."""
    sizes = {size: item.name for item in inputs if isinstance(item, TensorInput) for size in item.sizes}
    known = {size for size in sizes if isinstance(size, str) and size.isidentifier()}
    known |= {name for name, _, _ in derived.values()}
    for size, name in sizes.items():
        if isinstance(size, str) and size not in derived and not set(re.findall(r"[A-Za-z_]\w*", size)) <= known:
            raise ValueError(
                f"the argument {name} has the size {size}, and no input has that name as a size, so calls could not "
                f"be checked. Export with a torch.export.Dim for this size, or with a fixed size."
            )


def in_spec_parts(spec: Any) -> tuple[int, list[str]]:
    positional, keywords = spec.children()
    return len(positional.children()), list(keywords.context or ())


def _argument_name(path: Sequence[Any], names: Sequence[str]) -> str:
    """Return `x['ids'][0]` for the path of a leaf in (args, kwargs)."""
    which, first, *rest = path
    name = names[first.idx] if which.idx == 0 else str(first.key)
    return name + _pytree.keystr(tuple(rest))


def _tensor_input(name: str, example: Any, value: Any) -> TensorInput:
    order = tuple(sorted(range(example.dim()), key=lambda n: (-example.stride(n), n)))
    if not example.permute(order).is_contiguous():
        raise ValueError(
            f"the example of the argument {name} is a tensor of size {tuple(example.shape)} and stride "
            f"{example.stride()}, which has gaps or overlaps. Export with a dense example: x.contiguous()."
        )
    sizes = tuple(size if isinstance(size, int) else str(size.node.expr) for size in value.shape)
    return TensorInput(name, value.dtype, sizes, tuple(range(len(order))) if example.is_contiguous() else order)


def _output(argument: Any) -> Any:
    if hasattr(argument, "value"):
        return (argument.value,)
    return int if type(argument).__name__ == "SymIntArgument" else None


def _upper(bound: Any) -> float:
    try:
        number = int(bound)
    except (TypeError, ValueError, OverflowError):
        return math.inf
    return number if number < 2**62 else math.inf


# ---------------------------------------------------------------- calling by it


class BoundSignature:
    """A signature in a process: turns arguments into a flat list of tensors, and a flat list into the result."""

    def __init__(self, signature: Signature, device: torch.device | None) -> None:
        register_pytree_types(signature.registrations)
        self._signature = signature
        self._device = device
        self._in_spec, self._out_spec = map(_pytree.treespec_loads, signature.specs)
        self._leaves = [spec.num_leaves for part in self._in_spec.children() for spec in part.children()]

    def __reduce__(self) -> Any:
        return BoundSignature, (self._signature, self._device)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return the tensors of a call.

        Raises:
            TypeError: An argument is missing, unknown or of another structure.
            ValueError: A tensor has another dtype, device or size, or a constant another value, than in the export.
        """
        bound = self._bind(args, kwargs)
        try:
            leaves = self._in_spec.flatten_up_to(bound)
        except ValueError as error:
            raise TypeError(f"the arguments have another structure than in the export: {error}") from None
        sizes: dict[str, int] = {}
        tensors: list[torch.Tensor] = []
        later: list[tuple[TensorInput, torch.Tensor]] = []
        for leaf, expected in zip(leaves, self._signature.inputs, strict=True):
            if isinstance(expected, ConstantInput):
                _check_constant(leaf, expected)
                continue
            tensors.append(self._checked(leaf, expected, sizes))
            if any(isinstance(size, str) and size not in sizes for size in expected.sizes):
                later.append((expected, leaf))
        for expected, leaf in later:
            _check_expressions(expected, leaf, sizes)
        return tensors

    def unflatten(self, flat: list[Any]) -> Any:
        """Return the result of the program from its flat outputs."""
        outputs = self._signature.outputs
        if len(flat) != len(outputs):  # torch leaves constants out
            tensors = iter(flat)
            flat = [None if isinstance(kind, tuple) else next(tensors) for kind in outputs]
        leaves = [
            value if kind is None else kind[0] if isinstance(kind, tuple) else int(value)
            for kind, value in zip(outputs, flat, strict=True)
        ]
        return _pytree.tree_unflatten(leaves, self._out_spec)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names, keywords = self._signature.names, self._signature.keywords
        if len(args) == len(names) and kwargs.keys() == set(keywords):
            return args, kwargs
        takes = f"It takes {', '.join((*names, *keywords))}."
        if len(args) > len(names):
            raise TypeError(f"the program got {len(args)} positional arguments and takes {len(names)}. {takes}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in (*names, *keywords):
                raise TypeError(f"the program got the argument {name} {'twice' if name in given else 'too'}. {takes}")
            given[name] = value
        first = 0
        for name, count in zip((*names, *keywords), self._leaves, strict=True):
            expected = self._signature.inputs[first] if count == 1 else None
            first += count
            if name not in given:
                if not isinstance(expected, ConstantInput):
                    raise TypeError(f"the program got no argument {name}. {takes}")
                given[name] = expected.value
        return tuple(given[name] for name in names), {name: given[name] for name in keywords}

    def _checked(self, leaf: Any, expected: TensorInput, sizes: dict[str, int]) -> torch.Tensor:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                f"the argument {expected.name} is a {type(leaf).__name__}, and the program takes a tensor."
            )
        if leaf.dtype != expected.dtype:
            raise ValueError(
                f"the argument {expected.name} is of {leaf.dtype}, and the program was compiled for "
                f"{expected.dtype}. Cast it: {expected.name}.to({expected.dtype})."
            )
        if self._device is not None and leaf.device.type != self._device.type:
            raise ValueError(
                f"the argument {expected.name} is on {leaf.device}, and the program on {self._device}. Move it: "
                f"{expected.name}.to('{self._device}')."
            )
        if leaf.dim() != len(expected.sizes):
            raise self._size_error(leaf, expected)
        for size, wanted in zip(leaf.shape, expected.sizes, strict=True):
            if isinstance(wanted, int):
                fits = size == wanted
            elif wanted in self._signature.ranges or wanted in self._signature.derived:
                name, factor, rest = self._signature.derived.get(wanted, (wanted, 1, 0))
                value, remainder = divmod(size - rest, factor)
                low, high = self._signature.ranges.get(name, (0, math.inf))
                fits = not remainder and low <= value <= high and sizes.setdefault(name, value) == value
            else:
                continue
            if not fits:
                raise self._size_error(leaf, expected)
        return _in_order(leaf, expected.order)

    def _size_error(self, leaf: torch.Tensor, expected: TensorInput) -> ValueError:
        ranges = self._signature.ranges
        derived = self._signature.derived
        used = [derived[str(size)][0] if size in derived else str(size) for size in expected.sizes]
        used = [name for name in used if name in ranges]
        where = "; ".join(f"{name} from {ranges[name][0]} to {ranges[name][1]}" for name in dict.fromkeys(used))
        return ValueError(
            f"the argument {expected.name} has the size {tuple(leaf.shape)}, and the program was exported for "
            f"({', '.join(map(str, expected.sizes))}){f' with {where}' if where else ''}. Sizes of one name are "
            f"equal in all arguments. Export with other dynamic_shapes, or split or pad the batch."
        )


def _check_constant(leaf: Any, expected: ConstantInput) -> None:
    is_tensor = isinstance(leaf, torch.Tensor)
    if is_tensor or (leaf is not expected.value and leaf != expected.value):
        what = "a tensor" if is_tensor else repr(leaf)
        raise ValueError(
            f"the argument {expected.name} is {what}, and the program was exported with {expected.value!r}, which is "
            f"a constant of the compiled code. Export and compile once for each value."
        )


def _check_expressions(expected: TensorInput, leaf: torch.Tensor, sizes: dict[str, int]) -> None:
    for size, wanted in zip(leaf.shape, expected.sizes, strict=True):
        if isinstance(wanted, str) and wanted not in sizes:
            try:
                value = eval(wanted, {"__builtins__": {}}, sizes)
            except (NameError, TypeError, SyntaxError, ZeroDivisionError):
                continue  # an expression of sympy that is not Python
            if size != value:
                raise ValueError(
                    f"the argument {expected.name} has the size {tuple(leaf.shape)}, and {wanted} is {value} here, "
                    f"with {sizes}."
                )


def _in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor with its memory in the order of the example: the compiled code assumes these strides."""
    if order == tuple(range(len(order))):
        return tensor.contiguous()
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)
