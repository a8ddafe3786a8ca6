"""Tensors without bytes in this process: on the meta device, in lazy modules, offloaded to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .paths import attributes_of, walk

__all__ = ["check_has_bytes"]

# How many tensors an error names.
_MOST_NAMED = 5


def check_has_bytes(model: object, tensors: Sequence[torch.Tensor], freed: Sequence[torch.Tensor] = ()) -> None:
    """Raise ValueError unless the bytes of `tensors`, parts of `model`, are in this process.

    A module that accelerate offloaded to the CPU has its parameters on the meta device and their values in the
    `weights_map` of its hook. These values travel with the hook, so nothing is missing. Values that accelerate
    offloaded to disk are in a folder of this machine. `freed` has tensors whose storage was made smaller.
    """
    if freed:
        raise ValueError(
            f"{_named(_paths_of(model, freed))} without values: the storage was freed or made smaller "
            f"(untyped_storage().resize_), as FSDP and offloading do. Gather or load the weights before sharing."
        )
    if not tensors:
        return
    missing = {_identity(tensor) for tensor in tensors}
    name = type(model).__qualname__
    on_disk: dict[str, str] = {}
    for path, part in walk(model):
        if isinstance(part, torch.nn.Module):
            for key, tensor, folder in _offloaded(part):
                if folder is not None:
                    on_disk[f"{name}{path}.{key}"] = folder
                missing.discard(_identity(tensor))
    if on_disk:
        raise ValueError(
            f"{_named(list(on_disk))} offloaded to disk: the values are in {next(iter(on_disk.values()))}, which "
            f"workers on other nodes cannot read. Load the model without disk offload (no device_map with 'disk', no "
            f"offload_folder): the object store takes the place of the folder."
        )
    if not missing:
        return
    paths = _paths_of(model, [tensor for tensor in tensors if _identity(tensor) in missing])
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors if _identity(tensor) in missing):
        raise ValueError(
            f"{_named(paths)} not initialized: a lazy module knows its shapes only after the first forward. Call the "
            f"model once on an example before sharing it, or pass allow_meta=True to share it as it is."
        )
    raise ValueError(
        f"{_named(paths)} on the meta device, so there are no values to share. Load the weights before sharing: "
        f"model.load_state_dict(weights, assign=True), then model.tie_weights() if the model has it. Pass "
        f"allow_meta=True if these tensors are meant to be empty."
    )


def _paths_of(model: object, tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the paths of tensors in a model."""
    wanted, name = {_identity(tensor) for tensor in tensors}, type(model).__qualname__
    found: dict[int, str] = {}
    for path, part in walk(model):
        if isinstance(part, torch.Tensor) and _identity(part) in wanted:
            found.setdefault(id(part), f"{name}{path}")
    return list(found.values()) or [f"tensors of {name}"]


def _identity(tensor: torch.Tensor) -> int:
    """Return a number that a tensor shares with its `detach()` and `data`: torch pickles a Parameter as its data."""
    return (
        tensor.untyped_storage()._cdata
        if tensor.is_meta and torch._C._has_storage(tensor) and not torch.nn.parameter.is_lazy(tensor)
        else id(tensor)
    )


def _named(paths: list[str]) -> str:
    named = ", ".join(paths[:_MOST_NAMED])
    more = f" and {len(paths) - _MOST_NAMED} more tensors" if len(paths) > _MOST_NAMED else ""
    return f"{named}{more} {'is' if len(paths) == 1 else 'are'}"


def _offloaded(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, str | None]]:
    """Yield the tensors of a module that accelerate offloaded: the name, and the folder of the values if on disk."""
    values = _values_of_hook(attributes_of(module).get("_hf_hook"))
    if values is None:
        return
    prefix, weights, folder, on_disk = values
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta and f"{prefix}{key}" in weights:
            yield key, tensor, folder if f"{prefix}{key}" in on_disk else None


def _values_of_hook(hook: Any) -> tuple[str, Any, str | None, Any] | None:
    """Return prefix, mapping, folder and index of the values that an accelerate hook brings back; None without them.

    Source: `AlignDevicesHook`, `SequentialHook`, `PrefixedDataset` and `OffloadedWeightsLoader` of accelerate 1.x.
    """
    for single in getattr(hook, "hooks", (hook,)):
        weights = getattr(single, "weights_map", None)
        if weights is None:
            continue
        prefix = getattr(weights, "prefix", "")
        weights = getattr(weights, "dataset", weights)
        in_memory = getattr(weights, "state_dict", weights)
        folder = getattr(weights, "save_folder", None)
        on_disk = {key for key in getattr(weights, "index", ()) if key not in (in_memory or ())}
        return prefix, weights, None if folder is None else str(folder), on_disk
    return None
