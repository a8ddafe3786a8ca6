"""Programs that AOTInductor compiled: compiled in one process, opened in all, with the weights of the store.

The package of a compiled program has the code and no weights. torch gets the tensors of the model as constants that
it does not own, so a worker's constants are views of the store's pages.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import ZeroCopyError, warn
from .kinds import Walk, reduces
from .modules import reduce_exported_program
from .operators import note_graph_operators
from .package import cpu_features, features_of, hash_files, machine, unpack_files
from .signature import BoundSignature, Signature, TensorInput, signature_of

__all__ = ["CompiledModel", "compile_model", "compile_with"]

_MODEL = "model"  # the name of the program in the directories that torch reads
_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # The compilation then returns the constants by name, and writes none.
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


class Built(NamedTuple):
    """Where and for what a program was compiled.

    Attributes:
        key: The hash of the package.
        torch: The version of torch.
        machine: The system and the architecture.
        device: The type of the device.
        features: The instruction sets of the CPU that the code may use.
        signature: The arguments and outputs.
    """

    key: str
    torch: str
    machine: str
    device: str
    features: frozenset[str]
    signature: Signature


class CompiledModel:
    """A compiled program: call it with the arguments of the exported program.

    Calls of several threads take turns. No gradients are recorded.
    """

    def __init__(
        self,
        built: Built,
        files: Mapping[str, np.ndarray[Any, Any]],
        constants: dict[str, torch.Tensor],
        fallback: Any = None,
        graph: Any = None,
    ) -> None:
        device = next((tensor.device for tensor in constants.values()), None)
        _check_place(built, device)
        directory = unpack_files(built.key, files)
        try:
            index = device.index if device is not None and device.index is not None else -1
            self._loader = torch._C._aoti.AOTIModelPackageLoader(directory, _MODEL, False, 1, index)
        except RuntimeError as error:
            raise ZeroCopyError(
                f"torch cannot open the compiled program in {directory}: {_first_line(error)}. If the file system "
                f"forbids programs (mount option noexec), name another directory that exists: in workers "
                f"ray.init(runtime_env={{'env_vars': {{'TMPDIR': '/path'}}}}), in a driver `export TMPDIR=...`."
            ) from error
        # torch keeps the addresses only, so this object keeps the tensors.
        self._constants = {name: tensor.detach() for name, tensor in constants.items()}
        self._loader.load_constants(self._constants, False, True, True)
        self._bound = BoundSignature(built.signature, torch.device(built.device) if device is None else device)
        self._built, self._files, self._fallback, self._graph = built, files, fallback, graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._bound.unflatten(self._loader.boxed_run(self._bound.flatten(args, kwargs)))

    def floating_inputs(self) -> set[torch.dtype]:
        """Return the dtypes of the inputs that are floating-point tensors."""
        inputs = [item for item in self._built.signature.inputs if isinstance(item, TensorInput)]
        return {item.dtype for item in inputs if item.dtype.is_floating_point}

    def __repr__(self) -> str:
        signature = self._built.signature
        takes = ", ".join((*signature.names, *signature.keywords))
        return f"CompiledModel({takes}; {len(self._constants)} constants, for {self._built.device})"

    def __reduce__(self) -> Any:
        return _rebuild_compiled, (self._built, self._files, self._constants, self._fallback)


@reduces(CompiledModel)
def _reduce_compiled(model: CompiledModel, walk: Walk) -> Any:
    walk.fixed_dtype_class = type(model).__name__
    if model._graph is not None:
        note_graph_operators(walk, model._graph)
    return model.__reduce__()


def _rebuild_compiled(
    built: Built, files: Mapping[str, Any], constants: dict[str, torch.Tensor], fallback: Any
) -> Any:
    try:
        return CompiledModel(built, files, constants, fallback)
    except ZeroCopyError as error:
        if fallback is None:
            raise
        warn(f"{error} This worker runs the exported program without the compiled code (fallback=True).")
        rebuild, arguments = fallback
        return rebuild(*arguments).module()


def _check_place(built: Built, device: torch.device | None) -> None:
    """Raise ZeroCopyError if this process cannot run the code."""
    missing = built.features - cpu_features() if cpu_features() else frozenset()
    facts = [
        ("torch", built.torch, torch.__version__),
        ("the machine", built.machine, machine()),
        ("the device", built.device, device.type if device is not None else built.device),
    ]
    remedy = {
        "torch": f"Install torch=={built.torch} on the workers.",
        "the device": f"Load it there: load_model_in_actor(model_ref, device='{built.device}'). Or export the model "
        f"on the device of the workers.",
    }
    for what, there, here in facts:
        if there != here:
            raise ZeroCopyError(
                f"the model was compiled where {what} is {there}, and here it is {here}. "
                f"{remedy.get(what, 'Compile it on a machine like the workers: prepare_model_from.')}"
            )
    if missing:
        raise ZeroCopyError(
            f"the model was compiled for a CPU with {', '.join(sorted(built.features))}, and the CPU of this worker "
            f"has no {', '.join(sorted(missing))}. Compile it for all workers: compile={{'cpp.march': 'x86-64-v3', "
            f"'cpp.simdlen': 256}}. Or pass compile={{'fallback': True}} to run it there without the compiled code."
        )


# ---------------------------------------------------------------- compiling


def compile_with(model: Any, compile: bool | Mapping[str, Any]) -> Any:
    """Compile a model as the option `compile` of `prepare_model_for_actors` says."""
    if compile is False:
        return model
    if compile is not True and not isinstance(compile, Mapping):
        raise TypeError(f"compile is {compile!r}. Give True, False, or a mapping of options.")
    options = {} if compile is True else dict(compile)
    ours = {key: options.pop(key) for key in ("args", "kwargs", "dynamic_shapes", "fallback") if key in options}
    return compile_model(model, **ours, options=options)


def compile_model(
    model: Any,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    fallback: bool = False,
    options: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Compile a program with AOTInductor, for `prepare_model_for_actors` and the loaders of `prepare_model_from`.

    Args:
        model: A `torch.export.ExportedProgram`. Or an `nn.Module` with `args` or `kwargs`, which is exported first.
        args: Example inputs of a module, a tuple; as for `torch.export.export`.
        kwargs: Example keyword arguments of a module.
        dynamic_shapes: Which sizes of the inputs of a module may vary, and in which range.
        fallback: Let a worker that cannot run the compiled code run the exported program instead, with a warning. By
            default the load raises an error.
        options: Options of inductor, as for `torch._inductor.aoti_compile_and_package`.

    Returns:
        A callable with the signature of the program. Its weights are those of `model`.

    Raises:
        TypeError: `model` is neither an exported program nor a module with example inputs.
        ValueError: torch cannot export or compile the program.
        ZeroCopyError: This machine has no C++ compiler, or torch is too old.
    """
    if "check_guards" not in inspect.signature(torch.export.ExportedProgram.module).parameters:
        raise ZeroCopyError(
            f"compile needs a newer torch than {torch.__version__}; torch 2.13 was tested. Upgrade torch on the "
            f"driver and the workers, or leave compile out."
        )
    program = _exported(model, args, kwargs, dynamic_shapes)
    signature = signature_of(program)
    given = dict(options or {})
    if _writes(program):
        # torch 2.13 takes a small buffer, and one of equal values, for a constant, also if the program writes it.
        given |= {"joint_graph_constant_folding": False, "always_keep_tensor_constants": True}
    files, found = _compiled(program, {**given, **_OPTIONS})
    constants = {name: _same_tensor(program, name, tensor) for name, tensor in found.items()}
    opaque = [name for name, tensor in constants.items() if tensor.is_mkldnn or tensor.layout != torch.strided]
    if opaque:
        raise ValueError(
            f"the options change the constants {', '.join(opaque[:3])} to a format of one CPU, which cannot be "
            f"shared. Leave out 'freezing'."
        )
    device = next((tensor.device.type for tensor in constants.values()), _device_of(program))
    built = Built(hash_files(files), torch.__version__, machine(), device, cpu_features(), signature)
    rest = reduce_exported_program(program) if fallback else None
    compiled = CompiledModel(built, files, constants, rest, program.graph_module)
    if march := given.get("cpp.march"):
        may_use = features_of(march, compiled._loader.get_metadata().get("AOTI_CPU_ISA", ""))
        compiled._built = built._replace(features=may_use)
    return compiled


def _exported(model: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        if args is not None or kwargs or dynamic_shapes is not None:
            raise TypeError(
                "an ExportedProgram has its inputs and shapes. Leave out args, kwargs and dynamic_shapes."
            )
        return model
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"compile is set, and the model is a {type(model).__qualname__}. Give a torch.export.ExportedProgram, or "
            f"an nn.Module with example inputs."
        )
    if args is None and not kwargs:
        raise TypeError(
            f"compile is set, and the model is a {type(model).__qualname__} without example inputs. Give them: "
            f"compile={{'args': (x,), 'dynamic_shapes': ({{0: torch.export.Dim('rows', max=1024)}},)}}. Or give "
            f"torch.export.export(model, (x,), dynamic_shapes=...)."
        )
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with _without_warnings_of_torch():
            return torch.export.export(model, tuple(args or ()), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise ValueError(
            f"torch.export cannot export {type(model).__qualname__}: {_first_line(error)} The cause above has the "
            f"details. Leave compile out to share the model without compiling."
        ) from error
    finally:
        for module in training:
            module.training = True


def _compiled(
    program: torch.export.ExportedProgram, options: dict[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, torch.Tensor]]:
    """Compile; return the files of the package, and the constants by name."""
    from torch._inductor import aot_compile
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    args, kwargs = program.example_inputs
    try:
        with _without_warnings_of_torch():
            outputs: Any = aot_compile(program.module(check_guards=False), args, kwargs, options=options)
    except Exception as error:
        causes = _causes(error)
        if any(isinstance(cause, (InvalidCxxCompiler, FileNotFoundError)) for cause in causes):
            raise ZeroCopyError(
                f"the model cannot be compiled, because this machine has no working C++ compiler: "
                f"{_first_line(error)} Install one (apt-get install g++), set CXX, or compile on another node: "
                f"prepare_model_from(function_that_returns_compile_model)."
            ) from error
        why = "the C++ compiler refused its code" if any(isinstance(c, CppCompileError) for c in causes) else ""
        raise ValueError(
            f"AOTInductor cannot compile the program: {why or _first_line(error)} The cause above has the details. "
            f"Leave compile out to share the model without compiling."
        ) from error
    files, constants = {}, {}
    for item in outputs:
        if isinstance(item, str):
            if not item.endswith(".cpp"):  # the source
                path = f"data/aotinductor/{_MODEL}/{os.path.basename(item)}"
                files[path] = np.fromfile(item, dtype=np.uint8)
        else:
            constants.update({name: tensor for name, (tensor, _) in item.items()})
    return files, constants


@contextlib.contextmanager
def _without_warnings_of_torch() -> Iterator[None]:
    """Hide the warnings that torch gives about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _same_tensor(program: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the program's tensor of that name if torch has copied it: so it stays tied to others."""
    own = program.state_dict.get(name, program.constants.get(name))
    if isinstance(own, torch.Tensor):
        same = (own.shape, own.stride(), own.dtype, own.device) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        )
        if same:
            return own.detach()
    return tensor.detach()


def _writes(program: Any) -> bool:
    """Tell whether a program may write to its buffers."""
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    schemas = [getattr(node.target, "_schema", None) for part in parts for node in part.graph.nodes]
    return bool(program.graph_signature.buffers_to_mutate) or any(schema and schema.is_mutable for schema in schemas)


def _device_of(program: Any) -> str:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(program.example_inputs) if hasattr(leaf, "device")]
    return str(tensors[0].device.type) if tensors else "cpu"


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"{type(error).__name__}: {line.rstrip('.')}."
