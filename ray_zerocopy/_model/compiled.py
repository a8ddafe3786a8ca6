"""Functions made by `torch.compile`: they travel as the function and the options, and compile again on first use."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ZeroCopyError
from .kinds import Refusal

__all__ = ["compile_named", "is_compiled", "options_of", "reduce_compiled"]

# torch sets these on a compiled function.
_ORIGINAL = "_torchdynamo_orig_callable"
_CONFIG = "get_compiler_config"
_SET_BY_TORCH = (_ORIGINAL, _CONFIG, "aot_compile", "__wrapped__", "_is_torch_compile", "_isolate_recompiles_id")


def is_compiled(function: types.FunctionType) -> bool:
    return _ORIGINAL in function.__dict__ and _CONFIG in function.__dict__


def reduce_compiled(function: Any) -> Any:
    original = function.__dict__[_ORIGINAL]
    try:
        options = options_of(function)
    except Exception as error:
        raise Refusal(
            f"it was made by torch.compile, and torch {torch.__version__} does not tell its options ({error!r})",
            "Share the function that was compiled, and call torch.compile in the worker.",
        ) from error
    own = {
        name: value
        for name, value in function.__dict__.items()
        if name not in _SET_BY_TORCH and not name.startswith("_torchdynamo")
    }
    return _compile_again, (original, options), own, None, None, _set_attributes


def options_of(function: Any) -> dict[str, Any]:
    """Return the arguments of the call of `torch.compile` that made a function."""
    from torch._dynamo.eval_frame import innermost_backend

    config = function.__dict__[_CONFIG]
    cells = dict(zip(config.__code__.co_freevars, config.__closure__ or (), strict=True))
    context = cells["self"].cell_contents
    options = {"fullgraph": context.fullgraph, "dynamic": context._dynamic}
    if getattr(context, "_isolate_recompiles_id", -1) != -1:
        options["isolate_recompiles"] = True
    limit = getattr(getattr(context.callback, "_torchdynamo_orig_backend", None), "_recompile_limit", None)
    if limit is not None:
        options["recompile_limit"] = limit
    backend: Any = innermost_backend(context.callback)
    if isinstance(backend, torch._TorchCompileWrapper) and isinstance(backend.compiler_fn, _NamedBackend):
        return options | backend.compiler_fn.options
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        return options | {"options": dict(backend.config)} if backend.config else options
    if isinstance(backend, torch._TorchCompileWrapper):
        known = backend.compiler_name in torch._dynamo.list_backends(None)
        return options | {"backend": backend.compiler_name if known else backend.compiler_fn, **backend.kwargs}
    return options | {"backend": backend}


def _compile_again(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return compile_named(function, f"torch.compile of {name}", options)


def _set_attributes(function: Any, attributes: dict[str, Any]) -> None:
    function.__dict__.update(attributes)


def compile_named(function: Callable[..., Any], asked_by: str, options: Mapping[str, Any]) -> Any:
    """Call `torch.compile`. An error of the compiler says who asked for it, such as `Sentiment.compile`."""
    if {"guard_filter_fn", "use_aoti"} & (options.get("options") or {}).keys():  # which are not for the backend
        return torch.compile(function, **options)
    keep = dict(options)
    backend: dict[str, Any] = {name: keep.pop(name) for name in ("backend", "mode", "options") if name in keep}
    return torch.compile(function, backend=_NamedBackend(asked_by, backend, keep.get("dynamic")), **keep)


class _NamedBackend:
    """A backend of `torch.compile` whose errors name what asked for it."""

    def __init__(self, asked_by: str, options: dict[str, Any], dynamic: bool | None) -> None:
        self.options = options
        self.__name__ = str(options.get("backend", "inductor"))
        self._asked_by = asked_by
        mode, backend_options = options.get("mode"), options.get("options")
        backend = options.get("backend", "inductor")
        self._backend: Any
        if backend == "inductor":
            self._backend = torch._TorchCompileInductorWrapper(mode, backend_options, dynamic)  # type: ignore[no-untyped-call]
        else:
            self._backend = torch._TorchCompileWrapper(backend, mode, backend_options, dynamic)  # type: ignore[no-untyped-call]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NamedBackend) and self._backend == other._backend

    __hash__ = object.__hash__

    def __call__(self, graph: Any, inputs: Any) -> Any:
        try:
            return self._backend(graph, inputs)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            raise ZeroCopyError(
                f"{self._asked_by} failed in this process: {type(error).__name__}: {text[0]}. Install what the "
                f"backend {self.__name__!r} needs (inductor needs a C++ compiler: apt-get install g++), or leave the "
                f"compilation out."
            ) from error

    def reset(self) -> None:
        self._backend.reset()
