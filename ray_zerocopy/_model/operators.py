"""Operators that a model uses, and the modules that register them.

An operator is known to torch only after its module was imported, or its library loaded. So a model has a list of
both, which a worker imports before it rebuilds the model (`imports.py`).
"""

from __future__ import annotations

import dis
import functools
import mmap
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .classes import functions_in
from .imports import Import, has_operator, is_library, missing_operator_error
from .kinds import Refusal, Walk, reduces
from .names import travels_by_name
from .script.parts import operator_names

__all__ = [
    "has_foreign_operators",
    "note_class_operators",
    "note_code_operators",
    "note_graph_operators",
    "note_script_operators",
]

_ops: Any = torch._ops
# Namespaces that torch itself registers.
_OF_TORCH = frozenset(
    [
        "aten",
        "prim",
        "prims",
        "quantized",
        "quantization",
        "sparse",
        "mkl",
        "mkldnn",
        "mkldnn_prepacked",
        "onednn",
        "onnx",
        "onnx_symbolic",
        "c10d",
        "c10d_functional",
        "debugprims",
        "debug_mode_ops",
        "export",
        "flex_lib",
        "fsdp",
        "inductor",
        "inductor_prims",
        "profiler",
        "rngprims",
        "static_runtime",
        "streams",
        "symm_mem",
        "cuda",
        "cudnn",
        "xpu",
        "mps",
        "higher_order",
    ]
)


# ---------------------------------------------------------------- who registers an operator


def is_of_torch(operator: str) -> bool:
    namespace = operator.partition("::")[0]
    return namespace in _OF_TORCH or namespace.startswith("_")


@functools.lru_cache
def _registered_by(operator: str) -> str:
    """Return the module or the library that registers an operator; `__main__` for a script's, empty if unknown."""
    definition = _definition_of(operator)
    if definition is not None:
        return str(definition._init_fn.__module__)
    file = _registration_file(operator)
    if file.endswith(".py") or file.startswith("<"):
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) == file and not name.startswith("torch."):
                return name
        if file.startswith(os.path.dirname(torch.__file__)):
            return _module_that_names(operator)
        return "" if os.path.exists(file) else "__main__"  # a cell of a notebook
    return _library_of(operator)


def _definition_of(operator: str) -> Any:
    return getattr(torch._library.custom_ops, "OPDEFS", {}).get(operator)


def _registration_file(operator: str) -> str:
    """Return the source file that registers an operator, as torch's dispatcher tells it."""
    try:
        text = torch._C._dispatch_dump(operator)
    except RuntimeError:
        return ""
    for line in text.splitlines():
        if line.startswith("debug: registered at "):
            return line.removeprefix("debug: registered at ").rpartition(":")[0]
    return ""


def _module_that_names(operator: str) -> str:
    """Return the module whose source calls `torch.library.define` for an operator."""
    pattern = re.compile(rf"define\(\s*[\"']{re.escape(operator)}\b")
    skipped = (*sys.stdlib_module_names, "torch", "ray", "numpy", "pandas", "pyarrow", "transformers")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.endswith(".py") and (name.partition(".")[0] not in skipped or name == "__main__"):
            try:
                with open(file, encoding="utf-8", errors="replace") as source:
                    if pattern.search(source.read()):
                        return name
            except OSError:
                continue
    return "__main__" if not hasattr(sys.modules["__main__"], "__file__") else ""


def _library_of(operator: str) -> str:
    """Return the package or the path of the shared library that registers an operator, among those loaded by path."""
    namespace, _, name = operator.partition("::")
    for path in sorted(torch.ops.loaded_libraries):
        if _has_bytes(path, namespace.encode()) and _has_bytes(path, name.encode()):
            return _package_of(path) or path
    return ""


def _has_bytes(path: str, text: bytes) -> bool:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(text) >= 0
    except (OSError, ValueError):
        return False


def _package_of(path: str) -> str:
    """Return the imported top-level package in whose folder a library is, which loads it when imported."""
    for name, module in list(sys.modules.items()):
        folders = getattr(module, "__path__", None) if "." not in name else None
        if any(os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep) for folder in folders or ()):
            return name
    return ""


# ---------------------------------------------------------------- what a model uses


def use_operator(walk: Walk, operator: str, *, required: bool = True) -> None:
    """Note that a model uses an operator, `namespace::name`, and the module that registers it."""
    if is_of_torch(operator):
        return
    place = _registered_by(operator)
    if place.partition(".")[0] in ("torch", "torchgen"):
        return
    if required:
        walk.operators[operator] = None
    if place and (travels_by_name(place) or is_library(place)):
        known = walk.imports.get(place)
        if known is None or (required and not known.required):
            walk.imports[place] = Import(place, f"registers the operator {operator}", required)
    elif place and (definition := _definition_of(operator)) is not None:
        walk.definitions[operator] = definition
    elif place and required and not walk.user_imports:
        raise Refusal(
            f"it calls the operator {operator}, which {place} registers and no worker can import",
            "Move the registration to a module, and pass imports=['that_module'] where the model is prepared.",
        )


def note_graph_operators(walk: Walk, module: Any) -> None:
    """Note the operators that the nodes of a GraphModule, and of those in it, call."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if isinstance(node.target, (_ops.OpOverload, _ops.OpOverloadPacket)):
                use_operator(walk, _qualified_name(node.target))


def note_script_operators(walk: Walk, script: Any) -> None:
    """Note the operators that a TorchScript module or function calls."""
    if not has_foreign_operators():
        return
    for name in sorted(operator_names(script)):
        use_operator(walk, name)


def operators_in_code(code: types.CodeType, names: dict[str, Any]) -> Iterator[str]:
    """Yield the operators that a function calls as `torch.ops.namespace.name`, with the globals `names`."""
    chain: list[str] = []
    calls_any = not _foreign_namespaces().isdisjoint(code.co_names)
    for instruction in dis.get_instructions(code) if calls_any else ():
        if instruction.opname == "LOAD_GLOBAL":
            value = names.get(instruction.argval)
            chain = ["torch"] if value is torch else ["torch", "ops"] if value is torch.ops else []
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(instruction.argval)
            if len(chain) == 4 and chain[:2] == ["torch", "ops"]:
                yield f"{chain[2]}::{chain[3]}"
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "PRECALL"):
            chain = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from operators_in_code(constant, names)


def operators_in_words(words: set[str]) -> Iterator[str]:
    """Yield the operators whose namespace and name are both among the names and texts of some code.

    The code may call them in any form: by another name of torch, by `getattr`, through a variable.
    """
    for namespace in _foreign_namespaces() & words:
        known = (name.partition(".")[0] for name in _all_operators() if name.startswith(f"{namespace}::"))
        yield from dict.fromkeys(name for name in known if name.partition("::")[2] in words)
    yield from (word for word in words if "::" in word and word.partition("::")[0] in _foreign_namespaces())


def _words_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _words_of(constant)


def note_code_operators(walk: Walk, functions: Iterable[types.FunctionType], *, of_script: bool = False) -> None:
    """Note the operators that functions call by name. Whether they do so in each call is not known.

    Raises:
        Refusal: With `of_script`, a function calls an operator that the script registers for itself only.
    """
    for function in functions:
        called = {name for name in operators_in_code(function.__code__, function.__globals__) if has_operator(name)}
        for operator in dict.fromkeys((*called, *operators_in_words(set(_words_of(function.__code__))))):
            if has_operator(operator):
                only_here = of_script and operator in called and _registered_by(operator) == "__main__"
                use_operator(walk, operator, required=only_here and _definition_of(operator) is None)


def note_class_operators(walk: Walk, kinds: Iterable[type]) -> None:
    """Note the operators that the methods of classes call by name, and those of the modules that the methods use.

    Not those of large libraries, which import what they need themselves.
    """
    bases = {
        base
        for kind in kinds
        for base in kind.__mro__
        if not _imports_itself(base.__module__, _TORCH if issubclass(kind, torch.nn.Module) else _TORCH | _LARGE)
    }
    functions = [function for base in bases for held in vars(base).values() for function in functions_in(held)]
    note_code_operators(walk, functions)
    modules = {base.__module__ for base in bases}
    for function in functions:
        modules.update(_modules_used_by(function))
    for name in sorted(modules - {"__main__"}):
        held_here = vars(sys.modules.get(name, types)).values()
        own = [held for held in held_here if getattr(held, "__module__", "") == name]
        note_code_operators(walk, [function for held in own for function in functions_in(held)])


_TORCH = frozenset({"torch", "builtins"})
_LARGE = frozenset(
    {"transformers", "diffusers", "numpy", "pandas", "pyarrow", "ray", "scipy", "sklearn", "ray_zerocopy"}
)


def _imports_itself(module: str | None, packages: frozenset[str]) -> bool:
    top = (module or "").partition(".")[0]
    return top in packages or top in sys.stdlib_module_names


def _modules_used_by(function: types.FunctionType) -> Iterator[str]:
    """Yield the modules of the globals that a function's code names."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if isinstance(module, str) and not _imports_itself(module, _TORCH | _LARGE):
            yield module


def has_foreign_operators() -> bool:
    """Tell whether any operator that is not torch's is registered in this process."""
    return bool(torch.ops.loaded_libraries) or bool(_foreign_namespaces())


def _foreign_namespaces() -> frozenset[str]:
    # Asking torch for all operators takes 20 ms, so it is asked again only after an import or a registration.
    return _read_namespaces(len(sys.modules), len(torch.library._defs), len(torch.ops.loaded_libraries))


@functools.lru_cache(maxsize=1)
def _read_namespaces(modules: int, definitions: int, libraries: int) -> frozenset[str]:
    return frozenset(name.partition("::")[0] for name in _all_operators() if not is_of_torch(name))


def _all_operators() -> list[str]:
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return names


# ---------------------------------------------------------------- operators as objects


def _qualified_name(operator: Any) -> str:
    name: str = operator._schema.name if isinstance(operator, _ops.OpOverload) else operator._qualified_op_name
    return name


@reduces(_ops.OpOverload)
def _reduce_overload(overload: Any, walk: Walk) -> Any:
    use_operator(walk, _qualified_name(overload))
    return find_operator, (*_qualified_name(overload).split("::"), overload._overloadname)


@reduces(_ops.OpOverloadPacket)
def _reduce_packet(packet: Any, walk: Walk) -> Any:
    use_operator(walk, packet._qualified_op_name)
    return find_operator, tuple(packet._qualified_op_name.split("::"))


@reduces(_ops._OpNamespace)
def _reduce_namespace(namespace: Any, walk: Walk) -> Any:
    for operator in _all_operators():
        if operator.partition("::")[0] == namespace.name:
            use_operator(walk, operator.partition(".")[0], required=False)
    return find_operator, (namespace.name,)


@reduces(type(_ops.ops))
def _reduce_ops(ops: Any, walk: Walk) -> Any:
    return find_operator, ()


@reduces(_ops.HigherOrderOperator)
def _reduce_higher_order(operator: Any, walk: Walk) -> Any:
    name: str = operator.name()
    if getattr(_ops.ops.higher_order, name, None) is operator:
        return find_operator, ("higher_order", name)
    return NotImplemented


def find_operator(*names: str) -> Any:
    """Return `torch.ops`, a namespace of it, an operator or an overload."""
    found: Any = torch.ops
    try:
        for name in names:
            found = getattr(found, name)
    except AttributeError as error:
        raise missing_operator_error("the model", "::".join(names[:2])) from error
    return found


# ---------------------------------------------------------------- operators that a script defines


@reduces(torch._library.custom_ops.CustomOpDef)
def _reduce_definition(definition: Any, walk: Walk) -> Any:
    place = definition._init_fn.__module__
    if travels_by_name(place):
        use_operator(walk, definition._qualname)
        return _find_definition, (definition._qualname,)
    kernels = {device: _kernel_of(function) for device, function in definition._backend_fns.items()}
    state = {name: getattr(definition, name, None) for name in _REGISTRATIONS}
    arguments = (definition._namespace, definition._name, definition._schema, definition._init_fn)
    return _new_definition, (*arguments, kernels, state)


_REGISTRATIONS = ("_abstract_fn", "_vmap_fn", "_backward_fn", "_setup_context_fn")
_defined: dict[str, Any] = {}  # torch keeps definitions by weak references


def _kernel_of(wrapped: Any) -> Any:
    """Return the user's function in a kernel of `register_kernel`."""
    cells = dict(zip(wrapped.__code__.co_freevars, wrapped.__closure__ or (), strict=True))
    return cells["fn"].cell_contents if "fn" in cells else wrapped


def _find_definition(operator: str) -> Any:
    definition = _definition_of(operator)
    if definition is None:
        raise missing_operator_error("the model", operator)
    return definition


def _new_definition(
    namespace: str, name: str, schema: str, function: Any, kernels: dict[Any, Any], state: dict[str, Any]
) -> Any:
    operator = f"{namespace}::{name}"
    known = _definition_of(operator)
    if known is not None and known._init_fn.__code__ == function.__code__:
        return known
    definition = _defined[operator] = torch._library.custom_ops.CustomOpDef(namespace, name, schema, function)
    for device, kernel in kernels.items():
        definition.register_kernel(device)(kernel)
    if state["_abstract_fn"] is not None:
        definition.register_fake(state["_abstract_fn"])
    if state["_backward_fn"] is not None:
        definition.register_autograd(state["_backward_fn"], setup_context=state["_setup_context_fn"])
    if state["_vmap_fn"] is not None:
        definition.register_vmap(state["_vmap_fn"])
    return definition
