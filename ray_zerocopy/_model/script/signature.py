"""Keep the signature of a TorchScript function: its graph loses the names, types and defaults of arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.jit import ScriptFunction

from .archive import Signature

__all__ = ["function_of", "signature_of"]


def signature_of(function: ScriptFunction[Any, Any], cpp: Any) -> Signature:
    """Return the signature of `function`; `cpp` is a module that has this function as its forward method."""
    schema: Any = function.schema
    given = []
    names = [argument.name for argument in schema.arguments]
    inner = "inner"
    while inner in (function.name, *names):
        inner += "_"
    for argument in schema.arguments:
        if argument.kwarg_only and "*" not in given:
            given.append("*")
        default = f" = {_source_of(argument.default_value)}" if argument.has_default_value() else ""
        given.append(f"{argument.name}: {argument.type.annotation_str}{default}")
    source = f"def {function.name}({', '.join(given)}):\n    return {inner}({', '.join(names)})\n"
    signature = Signature(str(function.name), inner, source)
    try:
        function_of(cpp, signature)
    except RuntimeError as error:
        if any(argument.has_default_value() for argument in schema.arguments):
            raise ValueError(
                f"TorchScript cannot read back the signature {schema}, so its defaults would be lost. "
                f"Share a function without defaults, or a scripted module"
            ) from error
        return signature._replace(source=None)
    return signature


def _source_of(value: object) -> str:
    """Return TorchScript source for a default value."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if isinstance(value, tuple):
        return f"({''.join(_source_of(held) + ', ' for held in value)})"
    return repr(value)


def function_of(cpp: Any, signature: Signature) -> Any:
    """Return the forward method of `cpp` as a function with the given signature."""
    graph = cpp._get_method("forward").inlined_graph.copy()
    graph.eraseInput(0)  # the argument `self`, which the function does not use
    return _define(signature, torch._C._create_function_from_graph(signature.name, graph))


def _define(signature: Signature, inner: Any) -> Any:
    """Return `inner` with the names and defaults that its graph has lost."""
    if signature.source is None:
        return inner
    unit: Any = torch._C.CompilationUnit()
    unit.define(signature.source, {signature.inner: inner, "torch": torch}.get)
    function = unit.find_function(signature.name)
    torch._C._jit_pass_inline(function.graph)
    return function
