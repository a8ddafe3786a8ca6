"""Parts that work only inside their training job. Sharing refuses them and says what to share instead.

A worker has no process group, no shards of the other ranks and no engine, so it could neither load nor call these.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["RefusedPart", "refusal_for"]

_FULL_STATE = (
    "Collect the weights on every rank, state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)), load them into a model that is not sharded, "
    "plain.load_state_dict(state), and share that"
)
_MODULE = "Share the module in it: {path}.module"

# Packages that define the classes below.
_PACKAGES = frozenset({"torch", "deepspeed", "accelerate", "fairscale", "apex", "megatron"})
# By name, because importing torch.distributed takes seconds: what the class needs, and what to share instead.
_REFUSED = {
    "DistributedDataParallel": ("needs the process group of its training job", _MODULE),
    "ShardedDataParallel": ("needs the process group of its training job", _MODULE),
    "DeepSpeedEngine": ("needs the engine and the optimizer of its training job", _MODULE),
    "FullyShardedDataParallel": ("has only this rank's shards of the weights", _FULL_STATE),
    "FSDPModule": ("has only this rank's shards of the weights", _FULL_STATE),
    "_ReplicateState": ("belongs to replicate() and needs its process group", "Share the module before replicate()"),
    "UnflattenedModule": (
        "refers to its own parts in a way that torch cannot pickle",
        "Share the ExportedProgram, and call torch.export.unflatten(program) in the worker",
    ),
    "DTensor": (
        "is distributed over a device mesh that workers do not have",
        f"Use {{path}}.full_tensor() for one tensor. {_FULL_STATE}",
    ),
    "ConvertOutputsToFp32": (
        "was put around the forward by accelerator.prepare(model), for mixed precision in training",
        "Share accelerator.unwrap_model(model, keep_fp32_wrapper=False), and let workers run it under torch.autocast "
        "(dtype=torch.bfloat16 of a ZeroCopyPredictor)",
    ),
}


class RefusedPart(Exception):
    """Raised while an object is taken apart: `part` cannot be shared, for a reason that its class gives."""

    def __init__(self, part: object, name: str) -> None:
        super().__init__(part, name)
        self.part = part
        self._name = name

    def message(self, root: str, path: str) -> str:
        """Return the error for a user who finds the part at `path` of an object of class `root`."""
        kind = type(self.part)
        reason, remedy = _REFUSED[self._name]
        return (
            f"{root}{path} cannot be shared: it is a {kind.__module__}.{kind.__qualname__}, which {reason}. "
            f"{remedy.format(path=f'{root}{path}' if path else 'model')}."
        )


def refusal_for(kind: type) -> Any:
    """Return a function that raises `RefusedPart` for objects of a class that is refused; None for other classes."""
    for base in kind.__mro__:
        name = base.__name__
        if name in _REFUSED and base.__module__.partition(".")[0] in _PACKAGES:

            def refuse(part: object, walk: object, name: str = name) -> NoReturn:
                raise RefusedPart(part, name)

            return refuse
    return None
