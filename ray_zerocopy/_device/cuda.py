"""The interface between an upload and a device, and its implementation for CUDA."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.backends.cudnn.rnn import get_cudnn_mode

from ..errors import ZeroCopyError
from .choose import cpus_near

__all__ = ["CudaEngine", "Engine", "Recurrent"]


class Recurrent(NamedTuple):
    """The settings of a `torch.nn.RNNBase`; the fields have the names of its attributes."""

    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool


class Engine(Protocol):
    """What an upload needs of a device. The tests implement it without a GPU."""

    cpus: set[int]
    """The CPUs on which the threads of an upload run."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized bytes on the device. The engine's stream may write to them at once."""

    def page_locked(self, nbytes: int) -> torch.Tensor:
        """Return page-locked bytes on the host."""

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device and the engine's stream current in the calling thread."""

    def recurrent(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, settings: Recurrent
    ) -> tuple[torch.Tensor, list[int]] | None:
        """Return uninitialized bytes for an RNN's weights, in the device's order; None if it needs none.

        Returns:
            The flat bytes, and the offset of each weight. The stream may write to them after a call of `allocate`.
        """

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Any:
        """Start a copy of host bytes to the device, and return an event that is set when the copy is done."""

    def is_done(self, event: Any) -> bool:
        """Tell whether the copy of an event is done."""

    def wait(self, event: Any) -> None:
        """Wait until the copy of an event is done."""


class CudaEngine:
    """One stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self.cpus = cpus_near(_pci_address(torch.cuda.get_device_properties(device)), allowed)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self.explain_out_of_memory("the model", nbytes):
            arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # Kernels that are queued on the current stream may still use this memory.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return arena

    def recurrent(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, settings: Recurrent
    ) -> tuple[torch.Tensor, list[int]] | None:
        nbytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        with torch.cuda.device(self.device), self.explain_out_of_memory("an RNN of the model", nbytes):
            one_each = torch.zeros(len(shapes), dtype=dtype, device=self.device)
            acceptable = torch.backends.cudnn.is_acceptable(one_each)  # type: ignore[no-untyped-call]
            if not acceptable or not torch._use_cudnn_rnn_flatten_weight():
                return None
            # torch asks cuDNN for the order, allocates, and sets the weights to copies in that order. The real
            # weights have not arrived yet. Tensors of stride 0 have their shapes, and take no memory.
            weights = [
                torch.empty(0, dtype=dtype, device=self.device).set_(
                    one_each.untyped_storage(), i, shape, [0] * len(shape)
                )
                for i, shape in enumerate(shapes)
            ]
            torch._cudnn_rnn_flatten_weight(
                weights,
                (4 if settings.bias else 2) + (settings.proj_size > 0),  # weights of a layer
                settings.input_size,
                get_cudnn_mode(settings.mode),  # type: ignore[no-untyped-call]
                settings.hidden_size,
                settings.proj_size,
                settings.num_layers,
                settings.batch_first,
                bool(settings.bidirectional),
            )
        block = torch.empty(0, dtype=torch.uint8, device=self.device).set_(weights[0].untyped_storage())
        return block, [int(weight.storage_offset()) * dtype.itemsize for weight in weights]

    @contextlib.contextmanager
    def explain_out_of_memory(self, what: str, nbytes: int) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            free, total = (part / (1 << 30) for part in torch.cuda.mem_get_info(self.device))
            raise ZeroCopyError(
                f"{what} needs {nbytes / (1 << 30):.2f} GiB ({nbytes} bytes) in one piece on {self.device}, which "
                f"has {free:.2f} of {total:.2f} GiB free. Free other tensors of this process on that device, put "
                f"fewer actors on the GPU (a larger num_gpus), or load with a smaller dtype (dtype=torch.bfloat16)."
            ) from error

    def page_locked(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self.cpus)  # on Linux, 0 means the calling thread
        with torch.cuda.stream(self.stream):
            yield

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        to.copy_(source, non_blocking=True)  # copy: a device has memory of its own
        # blocking=True sleeps while it waits. A spinning thread would take a CPU from the threads that fill slots.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def is_done(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()


def _pci_address(properties: Any) -> str:
    if not hasattr(properties, "pci_bus_id"):  # an earlier torch; the NUMA node stays unknown
        return "unknown"
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
