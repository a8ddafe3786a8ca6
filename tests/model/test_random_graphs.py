"""Take random graphs of modules apart and put them together: check every bit, every tie and every stored byte."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from ray_zerocopy._model import graph, packing, pickler
from ray_zerocopy._model.layout import ALIGNMENT, PACKED_BELOW, unpack, unpack_arrays

# The same cases in every run, so that failures in CI can be reproduced.
reproducible = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

# ---------------------------------------------------------------- programs, and the graphs that they build

DTYPES = [
    *(
        torch.uint8,
        torch.float32,
        torch.bfloat16,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
    ),
    *(torch.int8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)),
]
NUMPY_DTYPES = ["u1", "f4", "f8", "i2", "i8", "c8", "c16"]
ELEMENTS = [1, 0, 2, 3, 6, 8, 15, 16, 64, 100, 640]
NBYTES = [64, 100, 720, 4096, 5000, PACKED_BELOW - 16, PACKED_BELOW, 3 * PACKED_BELOW]
ATOMS = [
    None,
    True,
    7,
    2.5,
    float("nan"),
    1j,
    "text",
    b"bytes",
    torch.float16,
    torch.Size([2, 3]),
    torch.device("cpu"),
]
NOISE = np.random.default_rng(0).integers(0, 256, 4 * PACKED_BELOW, dtype=np.uint8)
GUARD = 0xEE
# Kept bytes begin at a multiple of this address, as memory from malloc does, so elements stay aligned in the store.
GRANULE = 16


class Node(nn.Module):
    """A module with any attributes."""


class Stateful(nn.Module):
    """A module that defines __getstate__ and __setstate__."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)


class Special(nn.Parameter):
    """A Parameter subclass."""


class Thing:
    """A plain object."""


class Step(NamedTuple):
    """One operation: its name, three numbers that choose its operands, and the holder of the result (0: none)."""

    do: str
    a: int = 0
    b: int = 0
    c: int = 0
    where: int = 1


class Builder:
    """Builds a graph from a program. Numbers are taken modulo the number of choices, so every program is valid."""

    def __init__(self, program: list[Step]) -> None:
        self.root = Node()
        self.holders: list[Any] = [self.root]
        self.tensors: list[torch.Tensor] = []
        self.memories: list[np.ndarray[Any, Any]] = []
        self.values: list[Any] = [self.root]
        self.names = 0
        with torch.no_grad():
            for step in program:
                self.take(step)

    def take(self, step: Step) -> None:
        made = getattr(self, step.do)(step.a, step.b, step.c)
        if made is None:
            return
        value = made[0]
        if not isinstance(value, (str, bytes, int, float, complex, type(None))):
            self.values.append(value)
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        if step.where:
            self.put(self.holders[step.where // 4 % len(self.holders)], value, step.where % 4)
        if isinstance(value, (nn.Module, list, dict, Thing)) and all(value is not known for known in self.holders):
            self.holders.append(value)

    def put(self, holder: Any, value: Any, how: int) -> None:
        self.names += 1
        name = f"n{self.names}"
        if isinstance(holder, list):
            holder.append(value)
        elif isinstance(holder, dict):
            holder[name if how % 2 else self.names] = value
        elif not isinstance(holder, nn.Module) or how == 0:
            object.__setattr__(holder, name, value)
        elif isinstance(value, nn.Module):
            # torch does not support a cycle of submodules: train() would not end.
            submodule = all(part is not holder for part in value.modules())
            (holder.add_module if submodule else holder.__dict__.__setitem__)(name, value)
        elif isinstance(value, nn.Parameter) and how < 3:
            holder.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            holder.register_buffer(name, value, persistent=how == 1)
        else:
            setattr(holder, name, value)

    def pick(self, number: int) -> torch.Tensor:
        if not self.tensors:
            self.tensors.append(torch.arange(24.0).reshape(4, 6))
        return self.tensors[-1 - number % len(self.tensors)]

    # Sources of bytes.

    def base(self, a: int, b: int, c: int) -> tuple[Any]:
        dtype = DTYPES[a % len(DTYPES)]
        sizes = [elements * dtype.itemsize for elements in ELEMENTS] + [NBYTES[0], *NBYTES[-3:]]
        noise = torch.from_numpy(NOISE)[c : c + sizes[b % len(sizes)]].clone()
        if dtype is torch.bool:
            noise &= 1
        flat = noise.view(dtype)
        rows = next(rows for rows in (4, 3, 2, 1) if flat.numel() % rows == 0)
        return (flat.view(rows, -1) if c % 2 and flat.numel() else flat,)

    def memory(self, a: int, b: int, c: int) -> None:
        self.memories.append(NOISE[c : c + NBYTES[a % len(NBYTES)]].copy())

    def cut(self, a: int, b: int, c: int) -> np.ndarray[Any, Any]:
        if not self.memories:
            self.memory(b, 0, 0)
        memory = self.memories[a % len(self.memories)]
        dtype = np.dtype(NUMPY_DTYPES[b % len(NUMPY_DTYPES)])
        begin = c % 16 * (memory.nbytes // 24) // dtype.itemsize * dtype.itemsize
        end = memory.nbytes - c // 16 % 8 * (memory.nbytes // 24)
        return memory[begin : begin + (end - begin) // dtype.itemsize * dtype.itemsize].view(dtype)

    def from_numpy(self, a: int, b: int, c: int) -> tuple[Any]:
        return (torch.from_numpy(self.cut(a, b, c)),)

    def array(self, a: int, b: int, c: int) -> tuple[Any]:
        array = self.cut(a, b, c)
        if array.nbytes < pickler.SMALLEST_ARRAY:
            array = array.copy()  # pickled by value, so it loses its aliases
        elif c % 5 == 1 and array.size % 2 == 0:
            array = array.reshape(2, -1).T
        elif c % 5 == 2:
            array = np.arange(array.size, dtype=np.uint32)[::3]  # contiguous after the load
        if c % 3 == 0:
            array = array[...]
            array.flags.writeable = False
        return (array,)

    def storage(self, a: int, b: int, c: int) -> tuple[Any]:
        return (self.pick(a).untyped_storage(),)

    # Views of existing tensors.

    def slice(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        if not tensor.dim():
            return (tensor,)
        dim = b % tensor.dim()
        size = tensor.shape[dim]
        begin = c * size // 256
        return (tensor.narrow(dim, begin, (size - begin) * (b // 4 % 5) // 4)[:: b % 3 + 1],)

    def select(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        return (
            tensor.select(b % tensor.dim(), c * tensor.shape[b % tensor.dim()] // 256)
            if tensor.numel() and tensor.dim()
            else tensor,
        )

    def transpose(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        return (tensor.transpose(b % tensor.dim(), c % tensor.dim()) if tensor.dim() else tensor,)

    def expand(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        if tensor.numel() > 4000 or tensor.dim() > 4:
            return (tensor,)
        return (
            tensor.unsqueeze(b % (tensor.dim() + 1)).expand(
                *(c % 4 if i == b % (tensor.dim() + 1) else -1 for i in range(tensor.dim() + 1))
            ),
        )

    def reshape(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        if not tensor.is_contiguous():
            return (tensor,)
        return (tensor.view(-1) if b % 2 else tensor.view(*tensor.shape, 1),)

    def as_dtype(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        dtype = DTYPES[b % len(DTYPES)]
        if dtype is torch.bool or tensor.is_conj() or tensor.is_neg():
            return (tensor,)
        try:
            return (tensor.view(dtype),)
        except RuntimeError:
            return (tensor,)  # the sizes or strides do not allow the view

    def as_strided(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        room = tensor.untyped_storage().nbytes() // tensor.element_size() - 1
        if room < 0:
            return (tensor,)
        offset = c * room // 256
        strides, shape = (b % 4, b // 4 % 8), []
        left = room - offset
        for stride in strides:
            size = b // 32 + 1 if stride == 0 else min(left // stride + 1, b // 32 + 1)
            left -= (size - 1) * stride
            shape.append(size)
        return (tensor.as_strided(shape, strides, offset),)

    def unfold(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        if tensor.dim() not in (1, 2, 3) or tensor.numel() > 4000 or tensor.shape[-1] == 0:
            return (tensor,)
        return (tensor.unfold(-1, min(tensor.shape[-1], b % 4 + 1), c % 3 + 1),)

    def conjugate(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        if not tensor.is_complex():
            return (tensor._neg_view() if tensor.is_floating_point() and tensor.element_size() > 1 else tensor,)
        if b % 4 == 3:
            return (torch.view_as_real(tensor.resolve_conj()),)
        return (tensor.conj().imag if b % 4 == 2 else tensor.conj(),)

    # The same bytes with other flags.

    def alias(self, a: int, b: int, c: int) -> tuple[Any]:
        return (self.pick(a).detach(),)

    def parameter(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        wants = bool(b % 2) and (tensor.is_floating_point() or tensor.is_complex())
        return ((Special if b % 8 == 7 else nn.Parameter)(tensor, requires_grad=wants),)

    def require_grad(self, a: int, b: int, c: int) -> tuple[Any]:
        tensor = self.pick(a).detach()
        return (tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex()),)

    def mark(self, a: int, b: int, c: int) -> None:
        setattr(self.pick(a), f"mark{b % 2}", self.values[c % len(self.values)])

    # Holders and their contents.

    def module(self, a: int, b: int, c: int) -> tuple[Any]:
        return ([Node, Node, Stateful, nn.ModuleList, nn.ModuleDict, nn.Sequential][a % 6]().train(b % 2 == 0),)

    def container(self, a: int, b: int, c: int) -> tuple[Any]:
        return ([list, dict, OrderedDict, Thing][a % 4](),)

    def bundle(self, a: int, b: int, c: int) -> tuple[Any]:
        return (tuple(self.values[-(a % 3) :]) if a % 3 else (self.values[b % len(self.values)], c),)

    def again(self, a: int, b: int, c: int) -> tuple[Any]:
        return (self.values[a % len(self.values)],)

    def atom(self, a: int, b: int, c: int) -> tuple[Any]:
        return (ATOMS[a % len(ATOMS)],)

    def mode(self, a: int, b: int, c: int) -> None:
        holder = self.holders[a % len(self.holders)]
        if isinstance(holder, nn.Module):
            holder.training = b % 2 == 0


SOURCES = ["base", "base", "base", "memory", "from_numpy", "from_numpy", "array"]
VIEWS = [
    *("slice", "slice", "select", "transpose", "expand", "reshape", "as_dtype", "as_strided", "unfold", "conjugate"),
    *("alias", "parameter", "parameter", "require_grad"),
]
OTHERS = ["module", "module", "container", "bundle", "again", "again", "atom", "mode", "mark", "storage"]
number = st.integers(0, 255)
programs = st.lists(
    st.builds(Step, st.sampled_from(SOURCES + VIEWS + OTHERS), number, number, number, number),
    min_size=1,
    max_size=24,
)


class Limits(NamedTuple):
    """The thresholds of `packing.py` and `graph.py`, lowered so that small graphs reach them."""

    alone: int
    most: int
    smallest_array: int
    pack: int = packing.PACK_AT_LEAST


limits = st.builds(
    Limits,
    st.sampled_from([PACKED_BELOW, 4096, 64]),
    st.sampled_from([packing.MAX_BUFFERS, 2]),
    st.sampled_from([pickler.SMALLEST_ARRAY, 512]),
    st.sampled_from([packing.PACK_AT_LEAST, 1024]),
)

# Programs that failed once: an empty view before the kept part of its storage; arrays that begin less than an element
# apart; more large storages of one size than the maximum number of buffers.
EMPTY_BEFORE = [Step("base", 1, 10, 0, 0), Step("slice", 0, 4, 200), Step("slice", 1, 0, 0)]
OUT_OF_STEP = [Step("from_numpy", 0, 1, 1), Step("from_numpy", 0, 2, 2)]
ALL_ALIKE = [Step("base", 0, 8, 0)] * 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, because the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- descriptions of graphs, without the library


_ATOMS = (str, bytes, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)


def held(part: Any) -> list[tuple[str, Any]]:
    """Return the names and values that an object holds."""
    if isinstance(part, dict):
        return [(repr(key), value) for key, value in part.items()]
    if isinstance(part, (list, tuple)):
        return [(str(number), value) for number, value in enumerate(part)]
    return sorted(vars(part).items()) if hasattr(part, "__dict__") else []


def reachable(root: object) -> list[Any]:
    """Return every object except atoms once, in a fixed order, so the lists of equal graphs correspond."""
    found: list[Any] = []
    seen: set[int] = set()
    pending = [root]
    while pending:
        part = pending.pop()
        if not isinstance(part, _ATOMS) and id(part) not in seen:
            seen.add(id(part))
            found.append(part)
            pending.extend(value for _, value in held(part))
    return found


def tensors_of(root: object) -> list[torch.Tensor]:
    return [part for part in reachable(root) if isinstance(part, torch.Tensor)]


def facts(root: object, flags: bool = True) -> list[Any]:
    """Describe every object of a graph: its class, its contents (objects by number), and its bits.

    Unlike tests/describe.py, this looks into sets, arrays and storages, and under conjugate and negative views.
    """
    parts = reachable(root)
    numbers = {id(part): number for number, part in enumerate(parts)}
    storages: dict[int, int] = {}
    lines: list[Any] = []
    for part in parts:
        holds = [(name, repr(x) if isinstance(x, _ATOMS) else numbers[id(x)]) for name, x in held(part)]
        line: list[Any] = [type(part), [pair for pair in holds if flags or pair[0] != "training"]]
        if isinstance(part, set):
            line += [sorted(part)]
        elif isinstance(part, np.ndarray):
            line += [part.dtype, part.shape, (part.strides, part.flags.writeable) if part.dtype != np.uint32 else ()]
            line += [digest(part)]
        elif isinstance(part, torch.UntypedStorage):
            line += [storages.setdefault(part._cdata, len(storages)), digest(bytes_of(part))]
        elif isinstance(part, torch.Tensor):
            line += [storages.setdefault(part.untyped_storage()._cdata, len(storages))]
            line += [part.dtype, part.shape, part.stride(), part.is_conj(), part.is_neg(), part.is_leaf]
            line += [digest(bytes_under(part)) if part.numel() else "", part.requires_grad and flags]
        lines.append(line)
    return lines


def digest(data: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data).hexdigest()


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def bytes_under(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor's elements, computed from its address, shape and strides."""
    size = tensor.element_size()
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    block = np.frombuffer((ctypes.c_uint8 * (span * size)).from_address(tensor.data_ptr()), dtype=np.uint8)
    strides = [step * size for step in tensor.stride()]
    return np.lib.stride_tricks.as_strided(block, (*tensor.shape, size), (*strides, 1))


def hull(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and past its last byte, computed from every element."""
    where = np.zeros((), dtype=np.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        where = where[..., None] + np.arange(size) * step
    begin, size = tensor.data_ptr(), tensor.element_size()
    return begin + int(where.min()) * size, begin + (int(where.max()) + 1) * size


def extents(root: object, smallest_array: int) -> list[tuple[int, int]]:
    """Return the address ranges that the store must keep for a graph: disjoint, in order."""
    whole: dict[int, tuple[int, int]] = {}
    hulls: dict[int, list[tuple[int, int]]] = {}
    ranges: list[tuple[int, int]] = []
    for part in reachable(root):
        if isinstance(part, np.ndarray):
            if part.nbytes >= smallest_array and (part.flags.c_contiguous or part.flags.f_contiguous):
                begin = part.__array_interface__["data"][0]
                ranges.append((begin, begin + part.nbytes))
        elif isinstance(part, (torch.Tensor, torch.UntypedStorage)):
            storage = part if isinstance(part, torch.UntypedStorage) else part.untyped_storage()
            whole[storage._cdata] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            reached = hulls.setdefault(storage._cdata, [])
            if storage is part:
                reached.append(whole[storage._cdata])
            elif part.numel():
                reached.append(hull(part))
    for key, (begin, end) in whole.items():
        if not hulls[key] or begin == end:
            continue
        low, high = min(low for low, _ in hulls[key]), max(high for _, high in hulls[key])
        low -= (low - begin) % ALIGNMENT
        ranges.append((low, high) if 2 * (high - low) <= end - begin else (begin, end))
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((begin - begin % GRANULE, end) for begin, end in ranges):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def address_of(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# ---------------------------------------------------------------- the round trip


class Store:
    """One block of memory with buffers in it, aligned as Ray's store aligns them, and guard bytes between them."""

    def __init__(self, buffers: list[memoryview], gap: int) -> None:
        room = sum(aligned(buffer.nbytes) + ALIGNMENT * (gap + 1) for buffer in buffers)
        self.memory = bytearray([GUARD]) * (room + 2 * ALIGNMENT)
        self.begin = address_of(memoryview(self.memory))
        self.end = self.begin + len(self.memory)
        at = -self.begin % ALIGNMENT
        self.free = np.ones(len(self.memory), dtype=bool)
        self.buffers: list[tuple[Any, int]] = [(self.memory, 0)] * len(buffers)
        for turn in range(len(buffers)):
            number = turn if gap % 2 else len(buffers) - 1 - turn
            buffer = buffers[number]
            at += ALIGNMENT * gap
            self.memory[at : at + buffer.nbytes] = buffer
            self.free[at : at + buffer.nbytes] = False
            self.buffers[number] = (self.memory, at)
            at += aligned(buffer.nbytes)

    def guarded(self) -> bool:
        """Tell whether the guard bytes between the buffers are unchanged."""
        return bool((np.frombuffer(self.memory, dtype=np.uint8)[self.free] == GUARD).all())


def travel(root: object, keep_flags: bool, gap: int) -> tuple[Any, Store]:
    """Take a graph apart, send it through pickle and a fake store, and put it together."""
    parts = graph.take_apart(root)
    packed = packing.pack(parts.tensors, parts.arrays)
    store = Store([buffer.memory() for buffer in packed.buffers], gap)
    layout, skeleton = pickle.loads(pickle.dumps((packed.layout, parts.skeleton), protocol=5))
    tensors = unpack(layout, store.buffers, keep_flags=keep_flags)
    arrays = unpack_arrays(layout, store.buffers)
    loaded, seconds = graph.put_together(skeleton, tensors, arrays, keep_flags=keep_flags)
    assert seconds >= 0
    return loaded, store


def with_limits(limits: Limits, check: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKED_BELOW", limits.alone)
        patch.setattr(packing, "MAX_BUFFERS", limits.most)
        patch.setattr(packing, "PACK_AT_LEAST", limits.pack)
        patch.setattr(pickler, "SMALLEST_ARRAY", limits.smallest_array)
        check()


@settings(reproducible, max_examples=2000)
@given(programs, limits, st.integers(0, 3), number)
@example(EMPTY_BEFORE, Limits(4096, 1000, 4096), 0, 0)
@example(OUT_OF_STEP, Limits(4096, 1000, 4096), 0, 0)
def test_round_trip(program: list[Step], limits: Limits, gap: int, chosen: int) -> None:
    """A loaded graph equals its source bit for bit, views the store, and has the same ties between tensors."""

    def check() -> None:
        source = Builder(program).root
        before = facts(source)
        loaded, store = travel(source, keep_flags=True, gap=gap)
        assert facts(source) == before
        assert facts(loaded) == before

        originals, copies = tensors_of(source), tensors_of(loaded)
        for original, copy in zip(originals, copies, strict=True):
            if copy.numel():
                assert store.begin <= copy.data_ptr() < store.end
                assert original.data_ptr() % original.element_size() or copy.data_ptr() % copy.element_size() == 0

        again, _ = travel(loaded, keep_flags=True, gap=gap)
        full = [number for number, tensor in enumerate(originals) if tensor.numel()]
        if full:
            number = full[chosen % len(full)]
            value = 1 - int(bytes_under(originals[number]).flat[0]) % 2
            for tensor in (originals[number], copies[number]):
                bytes_under(tensor)[...] = value
            after = facts(source)
            assert after != before
            assert facts(loaded) == after
        assert store.guarded()
        assert facts(again) == before

    with_limits(limits, check)


@settings(reproducible, max_examples=2000)
@given(programs, limits)
@example(ALL_ALIKE, Limits(64, 2, 4096))
def test_keeps_every_byte_once(program: list[Step], limits: Limits) -> None:
    """The buffers have every byte that storages and arrays need once, and large ones are views of the source."""

    def check() -> None:
        source = Builder(program).root
        parts = graph.take_apart(source)
        packed = packing.pack(parts.tensors, parts.arrays)
        needed = extents(source, limits.smallest_array)
        assert packed.layout.buffers == [buffer.nbytes for buffer in packed.buffers]
        assert packed.layout.buffers == [buffer.memory().nbytes for buffer in packed.buffers]

        starts = [(address_of(buffer.memory()), buffer.nbytes) for buffer in packed.buffers if not buffer.is_packed]
        alone = [(begin, begin + nbytes) for begin, nbytes in starts]
        rest = [extent for extent in needed if extent not in alone]
        assert sorted(alone + rest) == needed
        assert len(alone) <= limits.most
        assert all(end - begin >= limits.alone for begin, end in alone)
        if rest:
            largest = max(end - begin for begin, end in rest)
            assert largest < limits.alone or len(alone) == limits.most

        packs = [buffer for buffer in packed.buffers if buffer.is_packed]
        assert sum(buffer.nbytes for buffer in packs) == sum(aligned(end - begin) for begin, end in rest)
        total = sum(end - begin for begin, end in needed)
        most = aligned(max(limits.pack, int(packing.PACK_SHARE * total)))
        assert all(buffer.nbytes <= most or len(buffer.parts) == 1 for buffer in packs)
        assert not any(buffer.device_parts for buffer in packed.buffers)

    with_limits(limits, check)


@settings(reproducible, max_examples=500)
@given(programs)
def test_loads_in_eval_mode(program: list[Step]) -> None:
    """Without flags, no module trains, no tensor requires a gradient, and the rest equals the source."""
    source = Builder(program).root
    loaded, _ = travel(source, keep_flags=False, gap=0)
    assert facts(loaded, flags=False) == facts(source, flags=False)
    assert not any(tensor.requires_grad for tensor in tensors_of(loaded))
    assert not any(part.training for part in reachable(loaded) if isinstance(part, nn.Module))
