"""The result of a call, on its way from the task to the caller. Its bytes go into the store once."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from .._model import graph
from .._model.layout import Layout
from .._model.objects import needs_arguments, new_instance, reduce_ordered_dict, set_object_state
from .._model.packing import pack
from .._pages import views
from .._pages.store_file import Unmappable
from .._store.get import rebuild
from .._store.host import address_range
from .._store.put import CARRIED
from ..errors import ZeroCopyError

__all__ = ["Result"]


# A result of fewer bytes is copied. Ray keeps results under 100 KiB out of the store.
SMALL_RESULT = 64 << 10


class Result:
    """The value that a call returned. Ray pickles this object, and unpickling gives the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        if isinstance(self.value, (str, bytes, int, float, bool, type(None))):
            return _same, (self.value,)
        with contextlib.suppress(Exception):
            return _rebuild_small, (_SmallPickler.dumps(self.value),)
        try:
            parts = graph.take_apart(self.value, leave_out=CARRIED)
        except TypeError:
            return _same, (self.value,)  # Ray's error about a result says more than an error about a model
        packed = pack(parts.tensors, parts.arrays)
        buffers = [pickle.PickleBuffer(buffer.memory()) for buffer in packed.buffers]
        return _rebuild_result, (parts.skeleton, packed.layout, buffers, parts.carried)

    def __iter__(self) -> Iterator[Result]:  # for num_returns=2 and more
        return (Result(item) for item in self.value)

    def __len__(self) -> int:
        return len(self.value)


def _same(value: Any) -> Any:
    return value


class _SmallPickler(pickle.Pickler):
    """A fast pickler for small results: ordinary tensors in tuples, lists, dicts and Hugging Face's outputs.

    It raises for all other values. They are taken apart like a model, which takes 0.3 ms more on either side.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self._nbytes = 0
        self._storages: set[int] = set()

    @classmethod
    def dumps(cls, value: object) -> bytes:
        stream = io.BytesIO()
        cls(stream).dump(value)
        return stream.getvalue()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor:
            named = isinstance(obj, type) and issubclass(obj, OrderedDict) and obj.__module__ != "__main__"
            if needs_arguments(type(obj)) and type(obj).__module__ != "__main__":
                return reduce_ordered_dict(obj)
            known = (_small_tensor, new_instance, set_object_state)
            if named or isinstance(obj, (OrderedDict, torch.dtype)) or any(obj is function for function in known):
                return NotImplemented
            raise pickle.PicklingError
        storage = obj.untyped_storage()
        self._nbytes += obj.nbytes
        here = obj.layout is torch.strided and obj.device.type == "cpu" and obj.is_contiguous()
        if not here or obj.requires_grad or obj.is_quantized or obj.__dict__:
            raise pickle.PicklingError
        if self._nbytes > SMALL_RESULT or storage._cdata in self._storages:
            raise pickle.PicklingError
        self._storages.add(storage._cdata)
        return _small_tensor, (obj.reshape(-1).view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _small_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _rebuild_small(stream: bytes) -> Any:
    with torch.inference_mode(False):
        return pickle.loads(stream)


def _rebuild_result(skeleton: bytes, layout: Layout, stored: list[Any], carried: list[Any]) -> Any:
    return rebuild(layout, skeleton, _private_memory(stored), carried)


def _private_memory(stored: list[Any]) -> list[tuple[Any, int]]:
    """Return writable memory for the buffers: a private view of large ones in the store, a copy of small ones."""
    if sum(memoryview(buffer).nbytes for buffer in stored) >= SMALL_RESULT:
        begin, nbytes, offsets = address_range(stored)
        with contextlib.suppress(Unmappable, ZeroCopyError):  # ZeroCopyError: the process is out of mappings
            memory, base = views.private_view(begin, nbytes, stored)
            return [(memory, base + offset) for offset in offsets]
    return [(bytearray(buffer), 0) for buffer in stored]  # copy: small, or no view is possible
