"""What a call returns, on its way from the task to the caller: its bytes go into the store once."""

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
from .._model.packing import pack
from .._store import pages
from .._store.get import rebuild
from .._store.host import address_range
from .._store.put import CARRIED
from ..errors import ZeroCopyError

__all__ = ["Result"]


# Bytes of a result up to which it is copied, not mapped: Ray itself keeps those under 100 KiB out of the store.
SMALL_RESULT = 64 << 10


class Result:
    """What a call returned, until Ray pickles it; what is unpickled is the value itself."""

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
            return _same, (self.value,)  # Ray's own message says more of a result than ours of a model
        packed = pack(parts.tensors, parts.arrays)
        buffers = [pickle.PickleBuffer(buffer.memory()) for buffer in packed.buffers]
        return _rebuild_result, (parts.skeleton, packed.layout, buffers, parts.carried)

    def __iter__(self) -> Iterator[Result]:  # Ray's num_returns=2 and more
        return (Result(item) for item in self.value)

    def __len__(self) -> int:
        return len(self.value)


def _same(value: Any) -> Any:
    return value


class _SmallPickler(pickle.Pickler):
    """The short way for small results: ordinary tensors in tuples, lists, dicts and Hugging Face's outputs.

    Raises for any other, which then goes the way of a model. That takes 0.3 ms more on either side.
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
            if named or isinstance(obj, (OrderedDict, torch.dtype)) or obj is _small_tensor:
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
    return rebuild(layout, skeleton, _own_memory(stored), carried)


def _own_memory(stored: list[Any]) -> list[tuple[Any, int]]:
    """Return writable memory for the buffers: a private view of those in the store, a copy of small ones."""
    if sum(memoryview(buffer).nbytes for buffer in stored) >= SMALL_RESULT:
        begin, nbytes, offsets = address_range(stored)
        region = pages.region_at(begin)
        if region is not None and region.shared:
            try:
                memory, base = pages.private_view(begin, nbytes, stored)
                return [(memory, base + offset) for offset in offsets]
            except (pages.Unmappable, ZeroCopyError):  # the latter: out of mappings
                pass
    return [(bytearray(buffer), 0) for buffer in stored]  # copy: Ray gave heap memory, or no view can be had
