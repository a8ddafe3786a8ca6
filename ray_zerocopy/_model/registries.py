"""Functions that the driver registered with transformers under a name, such as `AttentionInterface.register`.

A model refers to such a function by its name, in `config._attn_implementation`. A worker has not registered it, so
the function travels with the model and is registered before the model is rebuilt.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

__all__ = ["Registration", "find_registrations", "register"]

# The registries of transformers, and the attribute of a configuration that has a name in each.
_REGISTRIES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS", "_attn_implementation"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", "_experts_implementation"),
)


class Registration:
    """A function to register in the worker.

    Args:
        module: The module that has the registry.
        registry: The name of the registry in that module.
        name: The name of the function in the registry.
        function: The function.
    """

    def __init__(self, module: str, registry: str, name: str, function: Callable[..., Any]) -> None:
        self._arguments = (module, registry, name, function)

    def __reduce__(self) -> tuple[Any, ...]:
        return register, self._arguments


def register(module: str, registry: str, name: str, function: Callable[..., Any]) -> None:
    """Register a function under a name. The last one counts, as in transformers."""
    getattr(importlib.import_module(module), registry).register(name, function)


def find_registrations(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[str, Registration]]:
    """Yield a key and a registration for each function of another package that the modules use by name."""
    for module_name, registry_name, attribute in _REGISTRIES:
        registry = getattr(sys.modules.get(module_name), registry_name, None)
        foreign = {name: f for name, f in registry.items() if _is_foreign(f)} if registry is not None else {}
        if foreign:
            configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
            used = {str(getattr(config, attribute, "")) for config in configs.values()}
            for name in sorted(used & foreign.keys()):
                yield f"{registry_name}[{name!r}]", Registration(module_name, registry_name, name, foreign[name])


def _is_foreign(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a partial
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] != "transformers"
