"""Choose the device for a worker's model, and the CPUs near that device. Imports torch, not Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

__all__ = ["DeviceLike", "cpus_near", "resolve_device", "set_current_device"]


DeviceLike = str | int | torch.device | None


def resolve_device(device: DeviceLike, assigned: Sequence[str] | None) -> torch.device:
    """Return the torch device for a user's `device` argument.

    Args:
        device: What the user gave. `None` and `"auto"` mean the first assigned GPU, or the CPU without one.
        assigned: The GPUs that Ray assigned to this worker, by number or UUID. None in the driver, where every device
            of the machine is allowed.

    Raises:
        ValueError: torch does not know the device, the machine does not have it, or Ray did not assign it.
    """
    if device is None or device == "auto":
        return torch.device("cuda", _ordinal(assigned[0])) if assigned else torch.device("cpu")
    try:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device that torch knows ({error}). Give None or 'auto' for the one that "
            f"Ray assigned to this worker, or a name such as 'cpu', 'cuda' or 'cuda:0'."
        ) from error
    if wanted.type == "meta":
        raise ValueError("device='meta' holds no weights. Give None, 'auto', 'cpu' or an accelerator.")
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type == "cuda":
        return _check_assigned(device, wanted, assigned)
    present = torch.accelerator.current_accelerator()
    if present is None or present.type != wanted.type:
        raise ValueError(f"device={device!r}: this machine has no {wanted.type} device that torch can use.")
    return wanted


def _check_assigned(device: DeviceLike, wanted: torch.device, assigned: Sequence[str] | None) -> torch.device:
    if assigned is not None and not assigned:
        raise ValueError(
            f"device={device!r}, but Ray assigned no GPU to this worker. Ask for one where the worker is started "
            f"(num_gpus=1, or a fraction), or give device=None to follow Ray's assignment."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}, but torch {torch.__version__} finds no usable CUDA device here. Leave device out to "
            f"load on the CPU, or install a torch with CUDA."
        )
    allowed = [_ordinal(gpu) for gpu in assigned] if assigned is not None else list(range(torch.cuda.device_count()))
    default = allowed[0] if assigned is not None else torch.cuda.current_device()
    ordinal = default if wanted.index is None else wanted.index
    if ordinal not in allowed:
        raise ValueError(
            f"device={device!r} is not among the GPUs of this worker: {[f'cuda:{i}' for i in allowed]}. "
            f"Give device=None to follow Ray's assignment."
        )
    return torch.device("cuda", ordinal)


def _ordinal(gpu: str) -> int:
    """Return torch's index of a GPU that Ray names: its position in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return int(gpu)
    names = [name.strip() for name in visible.split(",")]
    if gpu not in names:
        raise ValueError(
            f"Ray assigned GPU {gpu} to this worker, but CUDA_VISIBLE_DEVICES={visible!r} hides it. Leave that "
            f"variable to Ray, or give device='cpu'."
        )
    return names.index(gpu)


def set_current_device(device: torch.device) -> None:
    """Make a CUDA device the current one, so that code in the model can say `"cuda"`. Do nothing for other devices.

    Raises:
        ValueError: Ray assigned a GPU, but torch finds no CUDA device.
    """
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"Ray assigned {device} to this worker, but torch {torch.__version__} finds no usable CUDA device here. "
            f"Install a torch with CUDA, or give device='cpu'."
        )
    torch.cuda.set_device(device)


def cpus_near(pci_address: str, allowed: set[int], root: str = "/sys/bus/pci/devices") -> set[int]:
    """Return the CPUs in `allowed` on the NUMA node of a PCI device, or all of `allowed` if the node is unknown."""
    folder = os.path.join(root, pci_address)
    try:
        with open(os.path.join(folder, "numa_node")) as file:
            node = int(file.read())
        with open(os.path.join(folder, "local_cpulist")) as file:
            listed = file.read().strip()
    except (OSError, ValueError):
        return allowed
    if node < 0:
        return allowed
    near: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        near.update(range(int(first), int(last or first) + 1))
    return near & allowed or allowed
