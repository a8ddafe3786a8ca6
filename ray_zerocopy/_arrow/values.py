"""The values of a tensor as a numpy array of a type that Arrow has."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from .columns import DTYPES

__all__ = ["to_numpy"]

_AS_FLOAT32 = frozenset(
    getattr(torch, name)
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
    if hasattr(torch, name)  # torch has gained them one by one
)
_TO_ARROW = frozenset(DTYPES.values()) | _AS_FLOAT32 | {torch.bool}


def to_numpy(tensor: torch.Tensor, what: str) -> npt.NDArray[Any]:
    """Return a tensor's values as a contiguous array of a type that Arrow has, over its memory where possible."""
    if tensor.is_nested:  # of layout strided, or jagged
        raise TypeError(f"{what} is nested, and Arrow has no such column. Give a list: list(tensor.unbind()).")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{what} has layout {tensor.layout}, and Arrow has no such column. Make it dense: tensor.to_dense()."
        )
    if tensor.dtype not in _TO_ARROW:
        remedy = "tensor.dequantize()" if tensor.is_quantized else "a tensor of another dtype"
        if tensor.dtype.is_complex:
            remedy = "torch.view_as_real(tensor)"
        raise TypeError(f"{what} is {tensor.dtype}, and Arrow has no such type. Give {remedy}.")
    if tensor.device.type == "meta":
        raise TypeError(f"{what} is on the meta device, so it has no values. Load its values first.")
    tensor = tensor.detach().cpu()  # copy: only from a device
    if tensor.dtype in _AS_FLOAT32:
        tensor = tensor.to(torch.float32)  # copy: Arrow has no such type; float32 holds each value exactly
    tensor = tensor.resolve_neg().contiguous()  # copy: only of a negated or strided view
    return tensor.numpy()
