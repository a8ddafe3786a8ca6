"""Copies of tensors to the model's device and back. Needs torch only.

On a GPU with overlapping stages, copies run beside the model: in through one stream, out through another. Both use
page-locked memory, because other copies block the host. Events order them:

    before   page-locked -> device, on stream `into` ........ event 1
    model    waits for 1; forward, on its own stream ......... event 2
    after    waits for 2; device -> page-locked, on `out` .... waits until it is there

`record_stream` tells the allocator that a tensor made on one stream is used on another, so that its memory is not
reused too early.
"""

from __future__ import annotations

from typing import Any

import torch

from .._model.gradients import without_gradients
from .._model.tensors import map_tensors

__all__ = ["Copies"]


class Copies:
    """Copies to a device and back. Floating-point inputs are cast to `cast_to`, if it is set."""

    def __init__(self, device: torch.device, cast_to: torch.dtype | None, *, streams: bool) -> None:
        self.device = device
        self.cast_to = cast_to
        self._into: Any = None
        self._out: Any = None
        if streams:
            self._into, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, inputs: Any) -> tuple[Any, Any]:
        """Start the copy of inputs to the device. `arrive`, in the model's thread, returns the copies."""
        if self._into is None:
            return map_tensors(inputs, self._moved), None
        with torch.cuda.stream(self._into):
            inputs = map_tensors(inputs, self._pinned_to_device)
            return inputs, self._into.record_event()

    def arrive(self, inputs: Any, event: Any) -> Any:
        """Return inputs that the current stream may use."""
        if self._into is None:
            return inputs
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)

        def used(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device != self.device:
                tensor = tensor.to(self.device)  # copy: the device has separate memory
            elif _is_dense(tensor):
                tensor.record_stream(current)
            return self._cast(tensor)

        return map_tensors(inputs, used)

    def leave(self, outputs: Any) -> tuple[Any, Any]:
        """Mark outputs as complete, in the model's thread."""
        outputs = without_gradients(outputs)
        if self._out is None:
            return map_tensors(outputs, lambda tensor: tensor.cpu()), None  # copy: from a device
        return outputs, torch.cuda.current_stream(self.device).record_event()

    def end(self, outputs: Any, event: Any) -> Any:
        """Return outputs on the host."""
        if self._out is None:
            return outputs
        with torch.cuda.stream(self._out):
            self._out.wait_event(event)
            outputs = map_tensors(outputs, self._to_pinned)
            self._out.record_event().synchronize()
        return outputs

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._cast(tensor.to(self.device))  # copy: the device has separate memory

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.cast_to) if self.cast_to and tensor.is_floating_point() else tensor

    def _pinned_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device or not _is_dense(tensor):
            return tensor  # record_stream does not take it, so `arrive` copies it on the stream that uses it
        if tensor.device.type == "cpu":
            if 0 in tensor.stride():
                tensor = tensor.contiguous()  # copy: pin_memory refuses an expanded tensor
            tensor = tensor.pin_memory()  # copy: the device reads page-locked memory without the host
        return tensor.to(self.device, non_blocking=True)

    def _to_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device != self.device or not _is_dense(tensor):
            return tensor.cpu()
        tensor.record_stream(self._out)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # the same strides, so that no kernel reorders
        return host.copy_(tensor, non_blocking=True)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
