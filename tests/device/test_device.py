"""The way of a model's bytes to a device: with a device made up for the tests, and on a GPU where there is one.

Runs without Ray too, on a machine with a GPU: `python -m pytest --noconftest tests/device/test_device.py`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import itertools
import os
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import Event, Late

try:
    from ray_zerocopy import errors
except ModuleNotFoundError as missing:
    if missing.name != "ray":
        raise
    package = types.ModuleType("ray_zerocopy")  # its __init__ needs Ray; these modules don't
    package.__path__ = [str(Path(__file__).parents[2] / "ray_zerocopy")]
    sys.modules["ray_zerocopy"] = package
    from ray_zerocopy import errors

from ray_zerocopy._batch.device_copies import Copies
from ray_zerocopy._device import choose, destination, page_lock, upload
from ray_zerocopy._device.cuda import CudaEngine, Recurrent, _pci_address
from ray_zerocopy._device.placement import DEVICE_ALIGNMENT, Span, place_storages
from ray_zerocopy._device.ring import SLOTS_IN_FLIGHT, Ring
from ray_zerocopy._model import packing
from ray_zerocopy._model.layout import ALIGNMENT, PACKED_BELOW, dtype_changes, storage_dtypes, unpack

SLOT = 4096


def tensors() -> list[torch.Tensor]:
    """Return tensors with everything that a place on a device could get wrong: views, ties, dtypes, odd sizes."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300, 257, generator=generator)
    shared = torch.randn(40, 40, generator=generator)
    small = [torch.randn(n, generator=generator) for n in range(1, 60)]
    odd = [torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in (1, 3, 17, 99_991)]
    return [
        *(torch.nn.Parameter(large), large.t()[5:9], shared, shared[3:5], shared, shared.t(), *small, *odd),
        *(torch.empty(0), torch.empty(3, 0), torch.tensor(7.0), torch.randn(9, generator=generator).half()),
        *(torch.arange(20_000), torch.randn(4, generator=generator, dtype=torch.complex64).conj()),
        torch.randn(128, 128, generator=generator).to(torch.bfloat16).expand(2, 128, 128),
    ]


def stored(packed: packing.Packed, file: int | None = None) -> list[upload.Source]:
    """Return the buffers as workers find them, in memory, and in a file if one is given."""
    sources = []
    for buffer in packed.buffers:
        memory = bytes(3) + bytes(buffer.memory())
        if file is None:
            sources.append(upload.Source(memory, 3))
        else:
            place = os.lseek(file, 0, os.SEEK_END)
            os.write(file, memory)
            sources.append(upload.Source(bytes(len(memory)), 3, file, place + 3))  # its memory is not to be read
    return sources


def bring(
    packed: packing.Packed,
    sources: Sequence[upload.Source],
    ring: Ring,
    dtype: torch.dtype | None = None,
    locked: Any = None,
    keep_flags: bool = False,
) -> list[torch.Tensor]:
    """Bring what was packed to the ring's device, making the tensors before the bytes are there."""
    changed = dtype_changes(packed.layout, dtype)
    placement = place_storages(packed.layout, changed, dtype)
    with upload.Upload(placement.spans, placement.nbytes, sources, ring, locked=locked) as going:
        pieces = upload.divide(going.arena, placement.storages, storage_dtypes(packed.layout, changed, dtype))
        there = unpack(packed.layout, [], pieces=pieces, changed=changed, dtype=dtype, keep_flags=keep_flags)
        going.wait()
    return there


def assert_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Compare values bit for bit, shapes, strides, dtypes, and which tensors share storages."""
    ties: dict[int, int] = {}
    for have, want in zip(found, expected, strict=True):
        assert (have.dtype, have.shape, have.stride()) == (want.dtype, want.shape, want.stride())
        assert isinstance(have, torch.nn.Parameter) == isinstance(want, torch.nn.Parameter)
        as_bytes = [t.detach().resolve_conj().contiguous().cpu().reshape(-1).view(torch.uint8) for t in (have, want)]
        assert torch.equal(*as_bytes)
        ties.setdefault(want.untyped_storage()._cdata, have.untyped_storage()._cdata)
        assert ties[want.untyped_storage()._cdata] == have.untyped_storage()._cdata
    assert len(set(ties.values())) == len(ties)


def feeding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ray_zerocopy-upload"]


# ---------------------------------------------------------------- slots


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (1, 3), (4, 4), (5, 9)])
def test_what_arrives_is_what_was_sent(threads: int, depth: int, from_file: bool, tmp_path: Path) -> None:
    """Every byte arrives through slots that are refilled many times while the device copies late."""
    source = tensors()
    packed = packing.pack(source)
    file = os.open(tmp_path / "store", os.O_CREAT | os.O_RDWR) if from_file else None
    ring = Ring(Late(), SLOT, threads, depth)
    assert_equal(bring(packed, stored(packed, file), ring), source)
    assert ring.made <= depth
    assert not feeding()
    if file is not None:
        os.close(file)


def test_a_slot_filled_too_early_would_show() -> None:
    """The same with a device that does not wait is wrong: the test above can fail."""
    source = tensors()
    packed = packing.pack(source)
    engine = Late(waits=False)
    there = bring(packed, stored(packed), Ring(engine, SLOT, 2, 2))
    engine.waits = True
    while engine.queue:
        engine.wait(engine.queue[-1][2])
    with pytest.raises(AssertionError):
        assert_equal(there, source)


def upload_at_once(count: int, *way: Any) -> list[list[torch.Tensor]]:
    """Upload in as many threads at the same time, and return what each found there."""
    found: list[list[torch.Tensor]] = []
    loads = [threading.Thread(target=lambda: found.append(bring(*way))) for _ in range(count)]
    for load in loads:
        load.start()
    for load in loads:
        load.join()
    assert len(found) == count
    return found


def test_slots_are_kept_and_bounded() -> None:
    """A second load page-locks nothing more, and two at once have no more slots between them than one may have."""
    source = tensors()
    packed = packing.pack(source)
    sources = stored(packed)
    engine = Late()
    ring = Ring(engine, SLOT, 3, 4)
    bring(packed, sources, ring)
    bring(packed, sources, ring)
    assert engine.page_locked_bytes <= 4 * SLOT
    for there in upload_at_once(3, packed, sources, ring):
        assert_equal(there, source)
    assert engine.page_locked_bytes <= 4 * SLOT


def test_a_small_load_page_locks_little() -> None:
    """One slot is made where one is enough, by one thread."""
    packed = packing.pack([torch.ones(10)])
    engine = Late()
    bring(packed, stored(packed), Ring(engine, SLOT, 8, 8))
    assert engine.page_locked_bytes == SLOT


def test_threads_come_from_the_cpus() -> None:
    """By default as many threads as CPUs near the device, up to a bound, and a few slots more."""
    engine = Late()
    for cpus, threads in ((2, 2), (16, 12), (1, 1)):
        engine.cpus = set(range(cpus))
        ring = Ring(engine)
        assert (ring.threads, ring.depth) == (threads, threads + SLOTS_IN_FLIGHT)
        assert ring.depth * ring.slot_bytes <= 64 << 20


# ---------------------------------------------------------------- what goes wrong


def test_a_failing_copy() -> None:
    """An error on the way is raised as it is; no thread, no lost slot and no device memory is left."""
    source = tensors()
    packed = packing.pack(source)
    sources = stored(packed)
    engine = Late(fails_at=20)
    ring = Ring(engine, SLOT, 3, 4)
    placement = place_storages(packed.layout, {}, None)

    def fail() -> Any:
        with upload.Upload(placement.spans, placement.nbytes, sources, ring) as going:
            arena = weakref.ref(going.arena)
            with pytest.raises(RuntimeError, match="the bus caught fire"):
                going.wait()
        return arena

    arena = fail()
    assert not feeding()
    engine.queue.clear()
    gc.collect()
    assert arena() is None
    assert_equal(bring(packed, sources, ring), source)
    assert ring.made <= 4


def test_no_page_locked_memory() -> None:
    """Where a slot cannot be had the load fails with that reason, and the next one tries again."""
    packed = packing.pack([torch.ones(10)])
    engine = Late()
    ring = Ring(engine, SLOT, 2, 2)
    engine.page_locked = lambda nbytes: (_ for _ in ()).throw(RuntimeError("no pages to lock"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no pages to lock"):
        bring(packed, stored(packed), ring)
    assert (ring.made, feeding()) == (0, [])
    del engine.page_locked
    assert_equal(bring(packed, stored(packed), ring), [torch.ones(10)])


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    """A store file shorter than the model is an error, not a model with other bytes in it."""
    packed = packing.pack([torch.ones(5000)])
    file = os.open(tmp_path / "store", os.O_CREAT | os.O_RDWR)
    sources = stored(packed, file)
    os.ftruncate(file, 10_000)
    with pytest.raises(errors.ZeroCopyError, match=r"ends .* bytes early"):
        bring(packed, sources, Ring(Late(), SLOT, 2, 2))
    os.close(file)


def test_ctrl_c() -> None:
    """An interrupt while the load waits stops the threads, and the next load is right."""
    source = tensors()
    packed = packing.pack(source)
    sources = stored(packed)

    class Interrupting(Late):
        interrupted = False

        def wait(self, event: Event) -> None:
            with self.lock:
                now = self.copies >= 10 and not self.interrupted
                self.interrupted |= now
            if now:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.05 if self.interrupted and self.copies < 30 else 0)
            super().wait(event)

    whole = Late()
    bring(packed, sources, Ring(whole, SLOT, 3, 4))
    engine = Interrupting()
    ring = Ring(engine, SLOT, 3, 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            bring(packed, sources, ring)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not feeding()
    assert 10 <= engine.copies < whole.copies
    assert_equal(bring(packed, sources, ring), source)


def test_an_error_while_bytes_move() -> None:
    """An exception in the block, as from unpickling, stops the copy and is the one that is raised."""
    packed = packing.pack([torch.ones(1_000_000)])
    engine = Late()
    placement = place_storages(packed.layout, {}, None)
    ring = Ring(engine, SLOT, 2, 2)
    with (
        pytest.raises(ZeroDivisionError),
        upload.Upload(placement.spans, placement.nbytes, stored(packed), ring) as going,
    ):
        raise ZeroDivisionError
    assert not feeding()
    assert going._failure is None


# ---------------------------------------------------------------- where it lies


def test_the_arena_is_no_larger_than_the_model() -> None:
    """Storages lie apart, aligned, the large ones as torch's own allocations, in at most 1.02 of their bytes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 400_000, (200,), generator=generator).tolist() + [10, 70, 400] * 50
    source = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    placement = place_storages(packing.pack(source).layout, {}, None)
    assert placement.nbytes <= 1.02 * sum(sizes)
    end = 0
    for place, nbytes in sorted(placement.storages):
        assert place >= end
        assert place % (DEVICE_ALIGNMENT if nbytes >= PACKED_BELOW else ALIGNMENT) == 0
        end = place + nbytes
    assert end <= placement.nbytes


def test_many_small_storages_are_one_copy() -> None:
    """Storages packed in one buffer go as one span, however many they are."""
    placement = place_storages(packing.pack([torch.ones(n) for n in range(1, 500)]).layout, {}, None)
    assert len(placement.spans) == 1


def test_overlapping_storages_stay_together() -> None:
    """Two storages over one array, at an odd distance, share their bytes on the device, and elements stay aligned."""
    array = bytearray(200_000)
    whole = torch.frombuffer(array, dtype=torch.uint8)
    part = torch.frombuffer(array, dtype=torch.float32, offset=4, count=1000)
    packed = packing.pack([whole[1:], part, torch.frombuffer(array, dtype=torch.uint8, offset=1)])
    placement = place_storages(packed.layout, {}, None)
    found = bring(packed, stored(packed), Ring(Late(), SLOT, 2, 2))
    assert placement.nbytes <= len(array) + 16
    assert found[1].data_ptr() - found[0].data_ptr() == part.data_ptr() - whole[1:].data_ptr()
    assert (found[1].data_ptr() - found[0].untyped_storage().data_ptr()) % 4 == 0


def test_elements_may_be_anywhere() -> None:
    """Storages that share bytes may have elements between aligned places."""
    memory = bytearray(os.urandom(SLOT))
    source = [torch.frombuffer(memory, dtype=torch.int32, offset=o, count=9) for o in (1, 9, 21, 4012, 4020, 4033)]
    source += [torch.arange(n, dtype=torch.int32) for n in (5, SLOT, 3)]
    packed = packing.pack(source)
    found = bring(packed, stored(packed), Ring(Late(), SLOT, 3, 4))
    for have, want in zip(found, source, strict=True):
        assert torch.equal(have.clone(), want)


def test_no_element_is_cut() -> None:
    """What is converted arrives whole in several slots, wherever the bytes before it in the first slot begin."""
    floats = torch.randn(3 * SLOT // 8)
    memory = bytes(range(16)) + floats.numpy().tobytes()
    spans = [
        Span(5, 16, 0, 0, None),
        Span(64, 2 * floats.nbytes, 0, 16, (torch.float32, torch.float64)),
    ]
    ring = Ring(Late(), SLOT, 2, 3)
    with upload.Upload(spans, 64 + 2 * floats.nbytes, [upload.Source(memory)], ring) as going:
        going.wait()
    assert bytes(going.arena[5:21]) == memory[:16]
    assert torch.equal(going.arena[64:].view(torch.float64), floats.double())


def test_each_storage_is_its_own() -> None:
    """A storage in the arena has its own address and size: saving and copying take it alone; it keeps the arena."""
    arena = torch.arange(4096).to(torch.uint8)
    places = [(512, 1024), (2048, 512), (0, 0), (2048, 64)]
    pieces = upload.divide(arena, places, {0: torch.float32, 1: torch.float32})
    assert [piece.dtype for piece in pieces] == [torch.float32, torch.float32, torch.uint8, torch.uint8]
    first, second, empty, _ = [piece.untyped_storage() for piece in pieces]
    assert (first.data_ptr() - arena.data_ptr(), first.nbytes(), empty.nbytes()) == (512, 1024, 0)
    tensor = torch.empty(0).set_(first, 0, (256,), (1,))
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < 1024 + 2048
    assert copy.deepcopy(tensor).untyped_storage().nbytes() == 1024
    assert second._cdata != first._cdata
    tensor.fill_(1.0)
    assert arena[512:516].tolist() == [0, 0, 128, 63]
    del arena, second, pieces, _
    gc.collect()
    assert tensor.sum() == 256
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(5000)


def test_page_locked_parts_are_read_where_they_are() -> None:
    """Whole pages of a page-locked source go without a slot, edges and the rest through slots, and nothing twice."""
    source = tensors()
    packed = packing.pack(source)
    sources = stored(packed)
    addresses = [upload._address(s) for s in sources]
    ranges = [
        (-(-a // 4096) * 4096, (a + n) // 4096 * 4096) for a, n in zip(addresses, packed.layout.buffers, strict=True)
    ]
    ranges = [(begin, end) for begin, end in ranges if end > begin]
    assert ranges
    engine = Late()
    locked: Any = types.SimpleNamespace(ranges=ranges)
    assert_equal(bring(packed, sources, Ring(engine, SLOT, 3, 3), locked=locked), source)
    through, direct = page_lock.split_by_lock(place_storages(packed.layout, {}, None).spans, addresses, ranges)
    spans = sorted([(s.place, s.nbytes) for s in through] + [(d.place, d.nbytes) for d in direct])
    whole = place_storages(packed.layout, {}, None)
    assert sum(nbytes for _, nbytes in spans) == sum(span.nbytes for span in whole.spans)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


# ---------------------------------------------------------------- another dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_change_on_the_way(dtype: torch.dtype) -> None:
    """Floating-point tensors arrive as torch converts them, views, ties and flags kept; all others as they were."""
    source = [t for t in tensors() if not t.is_complex()]
    packed = packing.pack(source)
    there = bring(packed, stored(packed), Ring(Late(), SLOT, 3, 4), dtype, keep_flags=True)
    bases = {t.untyped_storage()._cdata: torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for t in source}
    floating = {key: base.is_floating_point() for key, base in bases.items()}
    bases = {key: base.to(dtype) if floating[key] else base for key, base in bases.items()}
    expected = []
    for tensor in source:
        base = bases[tensor.untyped_storage()._cdata]
        view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        expected.append(torch.nn.Parameter(view) if isinstance(tensor, torch.nn.Parameter) else view)
    assert_equal(there, expected)
    assert there[0].requires_grad


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the process's threads in /proc")
def test_converting_starts_no_threads() -> None:
    """Each thread of a load converts by itself, however many threads torch may use for one tensor."""
    most = []

    class Counting(Late):
        """Does nothing itself for which torch would start threads."""

        def allocate(self, nbytes: int) -> torch.Tensor:
            return torch.empty(nbytes, dtype=torch.uint8)

        page_locked = allocate

        def copy(self, to: torch.Tensor, source: torch.Tensor) -> Event:
            most.append(len(os.listdir("/proc/self/task")))
            ctypes.memmove(to.data_ptr(), source.data_ptr(), source.nbytes)
            event = Event()
            event.done = True
            return event

    allowed = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        source = [torch.ones(4_000_000)]  # now this thread has as many as it may
        packed = packing.pack(source)
        sources = stored(packed)
        before = len(os.listdir("/proc/self/task"))
        there = bring(packed, sources, Ring(Counting(), 1 << 20, 4, 6), torch.bfloat16)
    finally:
        torch.set_num_threads(allowed)
    assert_equal(there, [source[0].to(torch.bfloat16)])
    assert max(most) < before + 4 + 12


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [(base := torch.ones(8)), base.view(torch.int32)], r"float32 \[8\] and torch.int32 \[8\]"),
        (
            lambda: [(base := torch.ones(8)), base.half(), base.view(torch.complex64)],
            "float32 .* and torch.complex64",
        ),
        (lambda: [torch.frombuffer(ARRAY, dtype=torch.float32), torch.frombuffer(ARRAY, dtype=torch.uint8)], "share"),
    ],
)
def test_bytes_with_two_dtypes_stay(make: Any, words: str) -> None:
    """Bytes that are seen as two dtypes cannot be converted, and the error says which they are."""
    layout = packing.pack(make()).layout
    with pytest.raises(ValueError, match=words):
        dtype_changes(layout, torch.bfloat16)


ARRAY = bytearray(64)


def test_no_dtype_for_weights() -> None:
    """An integer dtype is refused, and one that is there already changes nothing."""
    layout = packing.pack([torch.ones(3), torch.ones(3, dtype=torch.int8)]).layout
    with pytest.raises(ValueError, match=r"dtype=torch.int8 .* torch.float16, torch.bfloat16"):
        dtype_changes(layout, torch.int8)
    assert dtype_changes(layout, torch.float32) == dtype_changes(layout, None) == {}


# ---------------------------------------------------------------- the machine


def test_the_cpus_near_a_gpu(tmp_path: Path) -> None:
    """The CPUs of the GPU's NUMA node, of those the process may use; all of these where nothing says which."""
    folder = tmp_path / "0000:c1:00.0"
    folder.mkdir()

    def near(node: str, listed: str, allowed: set[int]) -> set[int]:
        (folder / "numa_node").write_text(node)
        (folder / "local_cpulist").write_text(listed)
        return choose.cpus_near(folder.name, allowed, str(tmp_path))

    everything = set(range(16))
    assert near("1\n", "4-6,9\n", everything) == {4, 5, 6, 9}
    assert near("1\n", "4-6,9\n", {0, 5}) == {5}
    assert near("1\n", "4-6\n", {0, 1}) == {0, 1}
    assert near("-1\n", "4-6\n", everything) == everything
    assert near("?\n", "4-6\n", everything) == everything
    assert choose.cpus_near("0000:00:1f.9", everything, str(tmp_path)) == everything


def test_the_pci_address() -> None:
    """A device's properties give the name of its folder in sysfs; a torch without them gives none."""
    properties = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=2)
    assert _pci_address(properties) == "0000:c1:02.0"
    assert choose.cpus_near(_pci_address(types.SimpleNamespace()), {3}) == {3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_a_gpu_that_torch_cannot_use() -> None:
    """A GPU that Ray assigned to a worker whose torch has no CUDA is an error that says so."""
    with pytest.raises(ValueError, match=r"Ray assigned cuda:0 .* finds no usable CUDA device.*device='cpu'"):
        choose.set_current_device(torch.device("cuda", 0))
    choose.set_current_device(torch.device("cpu"))


# ---------------------------------------------------------------- what page-locking says, and inputs on their way


def test_why_pages_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of page-locking has CUDA's words for it, and what was locked before it is let go."""
    locked: list[int] = []

    def register(address: int, nbytes: int, flags: int) -> int:
        if nbytes == 8192:
            return 1
        locked.append(address)
        return 0

    words = {1: "invalid argument"}
    runtime = types.SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=locked.remove, cudaGetErrorString=words.__getitem__
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(errors.ZeroCopyError, match=r"8192 bytes .* \(cudaHostRegister: invalid argument\)"):
        page_lock.PageLock(torch.device("meta"), [(4096, 8192), (1 << 20, (1 << 20) + 8192)], None)
    assert locked == []


def inputs() -> dict[str, torch.Tensor]:
    """Return a model's inputs of every kind that page-locked memory or streams are particular about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    grid = torch.arange(20.0).reshape(4, 5)
    return {
        **{"plain": grid, "expanded": torch.arange(4).expand(3, 4), "one": torch.ones(1).expand(7)},
        **{"gaps": grid[:, ::2], "transposed": grid.t(), "windows": torch.arange(10.0).unfold(0, 3, 1)},
        **{"last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "empty": torch.empty(0, 3)},
        **{"scalar": torch.tensor(3.0), "mask": grid > 7, "conjugate": torch.randn(3, dtype=torch.complex64).conj()},
        **{"sparse": torch.eye(3).to_sparse(), "nested": nested},
    }


def test_inputs_of_any_kind_leave_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense inputs are pinned and go on a stream of their own, marked as in use by the model's; others go by it."""
    pinned: list[torch.Tensor] = []
    recorded: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)  # torch's own way

    stream = types.SimpleNamespace(record_event=lambda: "copied", wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor))
    copies = Copies(torch.device("meta"), None, streams=True)
    given = {name: tensor for name, tensor in inputs().items() if name != "nested"}  # "meta" has none
    there = copies.arrive(*copies.begin(given))
    assert {name: (t.device.type, t.shape, t.layout) for name, t in there.items()} == {
        name: ("meta", t.shape, t.layout) for name, t in given.items()
    }
    assert len(pinned) == len(recorded) == len(given) - 1
    assert not any(tensor.is_sparse for tensor in recorded)


def test_an_rnn_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has no room at all, a load says what it needs, also before the first weight of an RNN."""

    def full(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    engine = object.__new__(CudaEngine)
    engine.device = torch.device("cuda", 0)
    settings = Recurrent("GRU", 2, 5, 0, 1, False, False, False)
    with pytest.raises(errors.ZeroCopyError, match=r"an RNN of the model needs .*\(420 bytes\).* 0.00 of 80.00 GiB"):
        engine.recurrent([(15, 2), (15, 5)], torch.float32, settings)
    with pytest.raises(errors.ZeroCopyError, match=r"the model needs .*\(7 bytes\)"):
        engine.allocate(7)


# ---------------------------------------------------------------- on a GPU

NO_GPU = "torch finds no CUDA device here"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """Give the current device, with what torch kept of earlier tests given back."""
    gc.collect()
    torch.cuda.empty_cache()
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


@contextmanager
def little_memory(device: torch.device, nbytes: int) -> Iterator[None]:
    """Let this process have `nbytes` more of the device than it has."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + nbytes) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("from_file", [False, True])
    def test_bit_for_bit(self, cuda: torch.device, grad: bool, from_file: bool, tmp_path: Path) -> None:
        """What is on the GPU equals the source, three times over one ring, with gradients off and on."""
        source = [*tensors(), torch.randn(8_000_000)]
        packed = packing.pack(source)
        file = os.open(tmp_path / "store", os.O_CREAT | os.O_RDWR) if from_file else None
        sources = stored(packed, file)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                there = bring(packed, sources, destination.ring_of(cuda), keep_flags=grad)
                assert {t.device for t in there} == {cuda}
                assert_equal(there, source)
                assert there[0].requires_grad == grad
        if file is not None:
            os.close(file)

    def test_memory(self, cuda: torch.device) -> None:
        """The device gives up 1.02 of the model's bytes at most, at any time of the load, and all come back."""
        source = [torch.randn(1000, 1000) for _ in range(20)] + [torch.randn(1000) for _ in range(200)]
        packed = packing.pack(source)
        sources = stored(packed)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        there = bring(packed, sources, destination.ring_of(cuda))
        nbytes = sum(t.nbytes for t in source)
        assert torch.cuda.max_memory_allocated(cuda) - before <= 1.02 * nbytes
        del there
        gc.collect()
        assert torch.cuda.memory_allocated(cuda) == before

    def test_a_storage_of_its_own(self, cuda: torch.device) -> None:
        """Saving and deep-copying one tensor take that one; the model stays when its arena's name goes."""
        source = tensors()
        packed = packing.pack(source)
        there = bring(packed, stored(packed), destination.ring_of(cuda))
        file = io.BytesIO()
        torch.save(there[0], file)
        assert len(file.getvalue()) < source[0].nbytes + 4096
        before = torch.cuda.memory_allocated(cuda)
        twin = copy.deepcopy(there[0])
        assert torch.cuda.memory_allocated(cuda) - before < source[0].nbytes + 1024
        kept = there[0]
        del there
        gc.collect()
        torch.empty(2_000_000, device=cuda).fill_(1)
        assert torch.equal(kept, twin)
        assert torch.equal((kept @ kept.t()).cpu().isfinite().all(), torch.tensor(True))

    def test_dtype(self, cuda: torch.device) -> None:
        """Converted on the way is what torch converts, and takes the room of the smaller dtype only."""
        source = [torch.randn(3000, 1000), torch.arange(1000)]
        packed = packing.pack(source)
        sources = stored(packed)
        before = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        there = bring(packed, sources, destination.ring_of(cuda), torch.bfloat16)
        assert torch.cuda.max_memory_allocated(cuda) - before <= 1.02 * (source[0].nbytes / 2 + source[1].nbytes)
        assert_equal(there, [source[0].to(torch.bfloat16), source[1]])

    def test_under_memory_pressure(self, cuda: torch.device) -> None:
        """Too little memory is an error with both figures, holds nothing back, and what fits still loads."""
        source = [torch.randn(16_000_000)]
        packed = packing.pack(source)
        sources = stored(packed)
        bring(packed, sources, destination.ring_of(cuda))
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(cuda)
        with little_memory(cuda, 32 << 20):
            with pytest.raises(
                errors.ZeroCopyError, match=r"needs 0\.06 GiB \(64000000 bytes\).*GiB are free.*dtype"
            ):
                bring(packed, sources, destination.ring_of(cuda))
            gc.collect()
            assert torch.cuda.memory_allocated(cuda) == before
        with little_memory(cuda, 66 << 20):
            assert_equal(bring(packed, sources, destination.ring_of(cuda)), source)

    def test_memory_still_in_use_by_kernels(self, cuda: torch.device) -> None:
        """Memory that torch gives again while queued kernels still write to it holds the model afterwards."""
        source = [torch.randn(16_000_000)]
        packed = packing.pack(source)
        sources = stored(packed)
        for _ in range(3):
            scratch = torch.empty(64_000_000, dtype=torch.uint8, device=cuda)
            torch.cuda._sleep(50_000_000)
            for _ in range(20):
                scratch.fill_(9)
            del scratch
            assert_equal(bring(packed, sources, destination.ring_of(cuda)), source)

    def test_an_interrupted_load(self, cuda: torch.device) -> None:
        """After a load that was left early the memory is back, no thread runs, and the next load is right."""
        source = [torch.randn(16_000_000), *tensors()]
        packed = packing.pack(source)
        sources = stored(packed)
        placement = place_storages(packed.layout, {}, None)
        before = torch.cuda.memory_allocated(cuda)

        def interrupt() -> None:
            with upload.Upload(placement.spans, placement.nbytes, sources, destination.ring_of(cuda)):
                raise KeyboardInterrupt

        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                interrupt()
            assert not feeding()
        gc.collect()
        assert torch.cuda.memory_allocated(cuda) == before
        assert_equal(bring(packed, sources, destination.ring_of(cuda)), source)

    def test_two_loads_at_once(self, cuda: torch.device) -> None:
        """Two threads of a process that load at once share the slots and both are right."""
        source = [torch.randn(4_000_000), *tensors()]
        packed = packing.pack(source)
        sources = stored(packed)
        ring = destination.ring_of(cuda)
        for there in upload_at_once(4, packed, sources, ring):
            assert_equal(there, source)
        assert ring.made <= ring.depth

    def test_page_locking_the_source(self, cuda: torch.device) -> None:
        """A page-locked source is read by the device itself, again after a load, and is let go."""
        source = [torch.randn(4_000_000), *tensors()]
        packed = packing.pack(source)
        sources = stored(packed)
        ranges = [
            (upload._address(s), upload._address(s) + n) for s, n in zip(sources, packed.layout.buffers, strict=True)
        ]
        for _ in range(2):
            lock = page_lock.PageLock(cuda, [r for r in ranges if r[1] - r[0] > 1 << 20], sources)
            for _ in range(2):
                assert_equal(bring(packed, sources, destination.ring_of(cuda), locked=lock), source)
            lock.close()
            assert lock.ranges == []
        with pytest.raises(errors.ZeroCopyError, match=r"cannot be page-locked \(cudaHostRegister: [a-z]"):
            page_lock.PageLock(cuda, [(1 << 46, (1 << 46) + 8192)], None)
        assert torch.ones(3, device=cuda).sum() == 3  # the failed call is not reported to the next

    def test_the_process_keeps_its_cpus(self, cuda: torch.device) -> None:
        """Binding the threads that feed the device leaves the caller's affinity alone."""
        before = os.sched_getaffinity(0)
        packed = packing.pack(tensors())
        bring(packed, stored(packed), destination.ring_of(cuda))
        assert os.sched_getaffinity(0) == before

    @pytest.mark.parametrize("streams", [False, True])
    def test_inputs_and_outputs(self, cuda: torch.device, streams: bool) -> None:
        """Inputs of any kind go to the GPU and come back as they were, in rounds that reuse one another's memory."""
        copies = Copies(cuda, None, streams=streams)
        with torch.inference_mode():
            for _ in range(20):
                given = inputs()
                there = copies.arrive(*copies.begin(given))
                assert {t.device for t in there.values()} == {cuda}
                back = copies.end(*copies.leave(there))
                for name, have in back.items():
                    assert have.device.type == "cpu"
                    pair = [t.to_padded_tensor(0) if t.is_nested else t.to_dense() for t in (have, given[name])]
                    assert torch.equal(*pair), name
