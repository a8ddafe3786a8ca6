"""Which modules of a graph are in train mode, and how each is put into eval mode."""

from __future__ import annotations

import inspect

import torch

__all__ = ["find_training"]


def _trains(module: torch.nn.Module) -> bool:
    return getattr(module, "training", False)  # a frozen TorchScript module has no such attribute


def find_training(modules: list[torch.nn.Module]) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """Return what to give eval mode: roots, by their `eval()`; and single modules, by their flag alone.

    The latter where some class means something else by `train` than torch does, such as a training loop, and for
    what an `eval` of one's own leaves undone.
    """
    # TorchScript's own flags are cleared in its archive.
    modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    if not any(map(_trains, modules)):
        return [], []
    below = {id(child) for module in modules for child in module.children()}
    roots, single = [], []
    for root in modules:
        if id(root) in below:
            continue
        parts = list(root.modules())
        if any(_trains(part) for part in parts):
            called = _eval_may_be_called(root, parts)
            if called:
                roots.append(root)
            if not called or type(root).eval is not torch.nn.Module.eval:
                single += [part for part in parts if _trains(part)]
    return roots, single


def _eval_may_be_called(root: torch.nn.Module, parts: list[torch.nn.Module]) -> bool:
    """Tell whether `root.eval()` is torch's, or at least called like it, and so are the `train`s that it calls."""
    if "eval" in root.__dict__ or not all(_has_torchs_train(type(part)) for part in parts):
        return False
    own = type(root).eval
    return own is torch.nn.Module.eval or (callable(own) and list(inspect.signature(own).parameters) == ["self"])


def _has_torchs_train(kind: type[torch.nn.Module]) -> bool:
    if kind.train is torch.nn.Module.train or issubclass(kind, torch.jit.ScriptModule):
        return True
    return "mode" in inspect.signature(kind.train).parameters
