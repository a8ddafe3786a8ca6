"""Tensors to the model's device and back. Knows torch, neither Ray nor Arrow.

On a GPU, and where stages overlap, copies run beside the model: in through one stream, out through another, both
from and to page-locked memory, without which a copy waits for the host. Events order them:

    before   page-locked -> device, on stream `into` ........ event 1
    model    waits for 1; forward, on its own stream ......... event 2
    after    waits for 2; device -> page-locked, on `out` .... waits until it is there

`record_stream` tells the allocator that a tensor made on one stream is in use on another, so that its memory is not
given out again before that is done.
"""

from __future__ import annotations

from typing import Any

import torch

from .._model.tensors import map_tensors

__all__ = ["Copies"]


class Copies:
    """The ways to a device and back; `cast_to` is what floating inputs become."""

    def __init__(self, device: torch.device, cast_to: torch.dtype | None, *, streams: bool) -> None:
        self.device = device
        self.cast_to = cast_to
        self._into: Any = None
        self._out: Any = None
        if streams:
            self._into, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, inputs: Any) -> tuple[Any, Any]:
        """Begin to move inputs to the device; `arrive`, in the model's thread, gives them."""
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
                tensor = tensor.to(self.device)  # copy: a device has memory of its own
            elif _is_dense(tensor):
                tensor.record_stream(current)
            return self._cast(tensor)

        return map_tensors(inputs, used)

    def leave(self, outputs: Any) -> tuple[Any, Any]:
        """Mark outputs as complete, in the model's thread."""
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
        return self._cast(tensor.to(self.device))  # copy: a device has memory of its own

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.cast_to) if self.cast_to and tensor.is_floating_point() else tensor

    def _pinned_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device or not _is_dense(tensor):
            return tensor  # what no stream can be recorded for moves in `arrive`, on the stream that uses it
        if tensor.device.type == "cpu":
            if 0 in tensor.stride():
                tensor = tensor.contiguous()  # copy: pin_memory refuses an expanded tensor
            tensor = tensor.pin_memory()  # copy: to memory from which the device copies by itself
        return tensor.to(self.device, non_blocking=True)

    def _to_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device != self.device or not _is_dense(tensor):
            return tensor.cpu()
        tensor.record_stream(self._out)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # with its strides: no kernel need reorder
        return host.copy_(tensor, non_blocking=True)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
