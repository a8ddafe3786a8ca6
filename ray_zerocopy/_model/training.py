"""Find the modules in train mode, and decide how to put each into eval mode."""

from __future__ import annotations

import inspect

import torch

__all__ = ["find_training", "set_eval_mode"]


def _is_training(module: torch.nn.Module) -> bool:
    return getattr(module, "training", False)  # a frozen TorchScript module has no such attribute


def find_training(modules: list[torch.nn.Module]) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """Return the modules to put in eval mode: roots to call `eval()` of, and single modules to set `training` of.

    A module is set singly if a class in its tree overrides `train` with another meaning, such as a training loop.
    Modules below a root that overrides `eval` are also set singly, because the override may skip some of them.
    """
    # The flags of TorchScript modules are cleared in their archives.
    modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    if not any(map(_is_training, modules)):
        return [], []
    below = {id(child) for module in modules for child in module.children()}
    roots, single = [], []
    for root in modules:
        if id(root) in below:
            continue
        parts = list(root.modules())
        if any(_is_training(part) for part in parts):
            calls_eval = _can_call_eval(root, parts)
            if calls_eval:
                roots.append(root)
            if not calls_eval or type(root).eval is not torch.nn.Module.eval:
                single += [part for part in parts if _is_training(part)]
    return roots, single


def _can_call_eval(root: torch.nn.Module, parts: list[torch.nn.Module]) -> bool:
    """Tell whether `root.eval()`, and every `train` that it calls, have the signatures of torch's methods."""
    if "eval" in root.__dict__ or not all(_has_standard_train(type(part)) for part in parts):
        return False
    method = type(root).eval
    if method is torch.nn.Module.eval:
        return True
    return callable(method) and list(inspect.signature(method).parameters) == ["self"]


def _has_standard_train(kind: type[torch.nn.Module]) -> bool:
    if kind.train is torch.nn.Module.train or issubclass(kind, torch.jit.ScriptModule):
        return True
    return "mode" in inspect.signature(kind.train).parameters


def set_eval_mode(root: torch.nn.Module) -> None:
    """Call `root.eval()`. Modules nested too deep for that get the flag only."""
    try:
        root.eval()
    except RecursionError:
        pending = [root]
        while pending:
            module = pending.pop()
            module.training = False
            pending += module.children()
