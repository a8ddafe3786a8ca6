r"""Which device a worker's model goes to, and the way of host bytes there. Knows torch, not Ray.

Note [The way to a CUDA device]

One allocation on the device, the arena, takes all storages of a model. Threads fill page-locked slots, and one
stream drains them; an event says when a slot may be filled again::

    host bytes   |=== storage ===|= storage =|s|s|s|====== storage ======|   store pages, or a file's
                    \  read by thread 1   \  thread 2   \  thread 3
    slots             [ 4 MiB ]             [ 4 MiB ]     [ 4 MiB ]          page-locked, kept between loads
                    \  copied by one stream, in any order
    arena        |=== storage ===| |= storage =| |s|s|s| |====== storage ======|

The weights of an RNN lie beside it, in a block of their own for which cuDNN has the order.

Bytes are read from the file behind the store's pages where it can be opened: a mapping that is touched for the first
time costs a page fault for every 64 KiB, which takes about as long as the copy.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ._layout import Span
from .errors import ZeroCopyError

__all__ = [
    "Cuda",
    "DeviceLike",
    "Engine",
    "PageLock",
    "Recurrent",
    "Ring",
    "Source",
    "Upload",
    "divide",
    "local_cpus",
    "resolve",
    "ring_of",
    "use",
]

DeviceLike = str | int | torch.device | None

# Not measured on a GPU yet: benchmarks/device.py tries others. A slot is a power of two, which page-locked memory
# is rounded up to. At 50 GB/s it drains in 80 us, so a few in flight hide the wait for the next; one of half the size
# has the threads that fill slots take turns with the one that makes tensors twice as often, which both wait for.
SLOT_BYTES = 4 << 20
SLOTS_IN_FLIGHT = 4
MOST_THREADS = 12
# Between two spans in one slot at most so many bytes of the arena are overwritten with zeros: the padding that aligns
# storages, and never a byte that is copied some other way.
PADDING = 512
# So many elements torch converts in the thread that asks. Of more it gives parts to as many threads as it may have,
# and each thread of a load would have these anew.
CONVERTED_ALONE = 32_000


# ---------------------------------------------------------------- which device


def resolve(device: DeviceLike, assigned: Sequence[str] | None) -> torch.device:
    """Return the device that `device` means to a worker to which Ray assigned the GPUs `assigned`.

    `None` and `"auto"` mean the first assigned GPU, else the CPU. `assigned` is None where Ray assigns
    nothing (the driver): then any device of this machine may be named.

    Raises ValueError for a device that torch does not know, this machine does not have, or Ray did not
    assign to this worker.
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
        return _assigned_cuda(device, wanted, assigned)
    present = torch.accelerator.current_accelerator()
    if present is None or present.type != wanted.type:
        raise ValueError(f"device={device!r}: this machine has no {wanted.type} device that torch can use.")
    return wanted


def _assigned_cuda(device: DeviceLike, wanted: torch.device, assigned: Sequence[str] | None) -> torch.device:
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
    own = [_ordinal(gpu) for gpu in assigned] if assigned is not None else list(range(torch.cuda.device_count()))
    default = own[0] if assigned is not None else torch.cuda.current_device()
    ordinal = default if wanted.index is None else wanted.index
    if ordinal not in own:
        raise ValueError(
            f"device={device!r} is not among the GPUs of this worker, which are {[f'cuda:{i}' for i in own]}. "
            f"Give device=None to follow Ray's assignment."
        )
    return torch.device("cuda", ordinal)


def _ordinal(gpu: str) -> int:
    """Return torch's index of a GPU that Ray names by its number or UUID: its place in CUDA_VISIBLE_DEVICES."""
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


def use(device: torch.device) -> None:
    """Make a CUDA device the current one, as code in the model expects that says `"cuda"`; others need nothing.

    Raises ValueError where torch finds no CUDA device, though Ray assigned one.
    """
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"Ray assigned {device} to this worker, but torch {torch.__version__} finds no usable CUDA device here. "
            f"Install a torch with CUDA, or give device='cpu'."
        )
    torch.cuda.set_device(device)


def local_cpus(pci_address: str, allowed: set[int], root: str = "/sys/bus/pci/devices") -> set[int]:
    """Return those of the CPUs `allowed` that are on the NUMA node of a PCI device; all where there is no node."""
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


# ---------------------------------------------------------------- what is asked of a device


class Recurrent(NamedTuple):
    """What a `torch.nn.RNNBase` is, as its attributes of these names say."""

    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool


class Engine(Protocol):
    """The few things that an upload asks of a device; the tests have one without a GPU."""

    cpus: set[int]
    """The CPUs that threads feeding the device run on."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized bytes on the device, safe for the engine's stream to write to."""

    def page_locked(self, nbytes: int) -> torch.Tensor:
        """Return page-locked bytes on the host."""

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device and the engine's stream the current ones of the calling thread."""

    def recurrent(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, settings: Recurrent
    ) -> tuple[torch.Tensor, list[int]] | None:
        """Return uninitialized bytes for an RNN's weights in the order that the device wants, if it wants any.

        The flat bytes, and at which of them each weight begins. The stream may write to them after `allocate`.
        """

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy host bytes to the device; return an event that comes when they are there."""

    def has_come(self, event: Any) -> bool:
        """Tell whether an event has come."""

    def wait(self, event: Any) -> None:
        """Return when an event has come."""


class Cuda:
    """One stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self.cpus = local_cpus(_pci_address(torch.cuda.get_device_properties(device)), allowed)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self._told_of_room("the model", nbytes):
            arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # torch may hand out memory that kernels already queued on the current stream still use.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return arena

    def recurrent(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, settings: Recurrent
    ) -> tuple[torch.Tensor, list[int]] | None:
        nbytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        with torch.cuda.device(self.device), self._told_of_room("an RNN of the model", nbytes):
            one_each = torch.zeros(len(shapes), dtype=dtype, device=self.device)
            acceptable = torch.backends.cudnn.is_acceptable(one_each)  # type: ignore[no-untyped-call]
            if not acceptable or not torch._use_cudnn_rnn_flatten_weight():
                return None
            # torch asks cuDNN for the order, allocates, copies the weights there and sets them to the copies. The
            # weights are on their way still: it is given single numbers in their shapes, which take no memory.
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
    def _told_of_room(self, what: str, nbytes: int) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            free, total = (part / (1 << 30) for part in torch.cuda.mem_get_info(self.device))
            raise ZeroCopyError(
                f"{what} needs {nbytes / (1 << 30):.2f} GiB ({nbytes} bytes) in one piece on {self.device}, of "
                f"whose {total:.2f} GiB {free:.2f} GiB are free. Drop what else this process has there, give fewer "
                f"actors the same GPU (a larger num_gpus), or load with a smaller dtype, such as "
                f"dtype=torch.bfloat16."
            ) from error

    def page_locked(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self.cpus)  # on Linux 0 is the calling thread, not the process
        with torch.cuda.stream(self.stream):
            yield

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        to.copy_(source, non_blocking=True)  # copy: a device has memory of its own
        # One that sleeps while it waits: a spinning thread would take a CPU from those that fill slots.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def has_come(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()


def _pci_address(properties: Any) -> str:
    if not hasattr(properties, "pci_bus_id"):  # an earlier torch: no such place, so no NUMA node
        return "unknown"
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


# ---------------------------------------------------------------- slots


class _Slot:
    """Page-locked bytes, and the event of the copy that last read them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self.bytes = memory.numpy().data
        self.read: Any = None


class Ring:
    """The slots of one device, for all loads of a process: at most `depth`, made when needed, kept afterwards.

    `threads` is how many fill them in one load.
    """

    def __init__(
        self, engine: Engine, slot_bytes: int = SLOT_BYTES, threads: int | None = None, depth: int | None = None
    ) -> None:
        self.engine = engine
        self.slot_bytes = slot_bytes
        self.threads = threads or min(MOST_THREADS, len(engine.cpus))
        self.depth = depth or self.threads + SLOTS_IN_FLIGHT
        self.made = 0
        self._free: deque[_Slot] = deque()
        self._change = threading.Condition()

    def take(self) -> _Slot:
        """Return a slot that nothing reads any more; waits while other loads have them all."""
        with self._change:
            while not self._free and self.made >= self.depth:
                self._change.wait()
            # First the slot given back first. Rather make one than wait: a small load then page-locks little.
            reuse = self._free and (self.made >= self.depth or self.engine.has_come(self._free[0].read))
            slot = self._free.popleft() if reuse else None
            self.made += slot is None
        if slot is None:
            try:
                return _Slot(self.engine.page_locked(self.slot_bytes))
            except BaseException:
                self.forget()
                raise
        try:
            self.engine.wait(slot.read)
        except BaseException:
            self.forget()
            raise
        return slot

    def give(self, slot: _Slot, read: Any) -> None:
        """Give a slot back; `read` is the event of the copy from it."""
        slot.read = read
        with self._change:
            self._free.append(slot)
            self._change.notify()

    def forget(self) -> None:
        """Count one slot less: something failed while it was taken, and its state is not known."""
        with self._change:
            self.made -= 1
            self._change.notify()


_rings: dict[torch.device, Ring] = {}
_making = threading.Lock()


def ring_of(device: torch.device) -> Ring:
    """Return this process's ring for a CUDA device."""
    with _making:
        if device not in _rings:
            _rings[device] = Ring(Cuda(device))
        return _rings[device]


# ---------------------------------------------------------------- an upload


class Source(NamedTuple):
    """A host buffer: memory and where in it the buffer begins; and, if a file has it, a descriptor and offset."""

    memory: Any
    offset: int = 0
    file: int | None = None
    file_offset: int = 0


class _Piece(NamedTuple):
    """Part of a span that goes into one slot: place in the slot, bytes there, bytes of the span before it."""

    at: int
    nbytes: int
    done: int
    span: Span


def _chunks(spans: Sequence[Span], slot_bytes: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Cut spans, in the order of their places, into what one slot takes: its place and bytes, and its pieces.

    A slot begins at a multiple of 16, though the first piece may not: elements are aligned in it, and none is cut.
    """
    pieces: list[_Piece] = []
    base = begin = end = 0
    for span in spans:
        done = 0
        while done < span.nbytes:
            place = span.place + done
            if pieces and (place - base >= slot_bytes or place - end >= PADDING):
                yield begin, end - begin, pieces
                pieces = []
            if not pieces:
                begin, base = place, place - place % 16
            nbytes = min(span.nbytes - done, base + slot_bytes - place)
            pieces.append(_Piece(place - base, nbytes, done, span))
            done += nbytes
            end = place + nbytes
    if pieces:
        yield begin, end - begin, pieces


class Upload:
    """A copy of host bytes to a device, under way while a `with` block runs.

    The first `nbytes` places go to one allocation, `arena`; what `blocks` has, places and allocations, to those. All
    can be divided into tensors at once; `wait` returns when the bytes are in them. Leaving the `with` block early, by
    any exception, stops the copy; no thread and no copy is left when it has been left.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        nbytes: int,
        sources: Sequence[Source],
        ring: Ring,
        *,
        blocks: Sequence[tuple[int, torch.Tensor]] = (),
        locked: PageLock | None = None,
    ) -> None:
        self.arena = ring.engine.allocate(nbytes)
        self._allocations = [(0, self.arena), *blocks]
        self._ring = ring
        self._locked = locked  # until the last copy is done
        self._sources = sources
        self._addresses = [_address(source) for source in sources]
        through, self._direct = _through_slots(spans, self._addresses, locked.ranges) if locked else (spans, [])
        self._chunks = _chunks(through, ring.slot_bytes)
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        chunks = sum(span.nbytes for span in through) // ring.slot_bytes + 1
        self._running = min(ring.threads, chunks)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._feed, name="ray_zerocopy-upload", daemon=True) for _ in range(self._running)
        ]

    def __enter__(self) -> Upload:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def wait(self) -> None:
        """Return when every byte is on the device; raises what went wrong on the way."""
        self._ended.wait()  # not Thread.join, which Ctrl-C does not end on every version of Python
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        self._stop = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _feed(self) -> None:
        """Fill slots until there is nothing left to copy; the work of each thread."""
        event: Any = None
        engine = self._ring.engine
        try:
            with engine.current():
                try:
                    while not self._stop:
                        with self._lock:
                            direct = self._direct.pop() if self._direct else None
                            chunk = next(self._chunks, None) if direct is None else None
                        if direct is not None:
                            event = engine.copy(_part(self._allocations, direct.place, direct.nbytes), direct.memory)
                        elif chunk is not None:
                            event = self._send(*chunk)
                        else:
                            break
                finally:
                    # Here, so that the arena and the host bytes outlive every copy, whatever becomes of the load.
                    if event is not None:
                        engine.wait(event)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self._ended.set()

    def _send(self, place: int, nbytes: int, pieces: list[_Piece]) -> Any:
        slot = self._ring.take()
        try:
            begin = end = pieces[0].at
            for piece in pieces:
                if piece.at > end:  # padding, of cuDNN's in a block: nothing that an earlier load left in the slot
                    slot.bytes[end : piece.at] = bytes(piece.at - end)
                self._fill(slot, piece)
                end = piece.at + piece.nbytes
            there = _part(self._allocations, place, nbytes)
            event = self._ring.engine.copy(there, slot.memory[begin : begin + nbytes])
        except BaseException:
            self._ring.forget()
            raise
        self._ring.give(slot, event)
        return event

    def _fill(self, slot: _Slot, piece: _Piece) -> None:
        """Bring a piece into a slot; each of the three ways lets other threads run meanwhile."""
        at, nbytes, done, span = piece
        source = self._sources[span.buffer]
        if span.cast is not None:
            before, after = span.cast
            size = nbytes // after.itemsize
            begin = self._addresses[span.buffer] + span.offset + done // after.itemsize * before.itemsize
            given = torch.frombuffer(_memory(begin, size * before.itemsize), dtype=before)
            into = slot.memory[at : at + nbytes].view(after)
            step = CONVERTED_ALONE if torch.get_num_threads() > 1 else size
            for first in range(0, size, step):
                into[first : first + step].copy_(given[first : first + step])
        elif source.file is not None:
            _read(source.file, source.file_offset + span.offset + done, slot.bytes[at : at + nbytes])
        else:
            ctypes.memmove(slot.address + at, self._addresses[span.buffer] + span.offset + done, nbytes)


def _read(file: int, offset: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into], offset)
        if count == 0:
            raise ZeroCopyError(f"the file of the object store ends {len(into)} bytes early. Load the model again.")
        into, offset = into[count:], offset + count


def _address(source: Source) -> int:
    raw = np.frombuffer(source.memory, dtype=np.uint8)
    return int(raw.__array_interface__["data"][0]) + source.offset


def _memory(address: int, nbytes: int) -> Any:
    return (ctypes.c_uint8 * nbytes).from_address(address)


def divide(
    arena: torch.Tensor,
    places: Sequence[tuple[int, int]],
    kinds: Mapping[int, torch.dtype],
    blocks: Sequence[tuple[int, torch.Tensor]] = (),
) -> list[torch.Tensor]:
    """Return a flat tensor for each place and length in the arena, with a storage of its own.

    Each has the dtype that `kinds` gives for its number, else or where it is not aligned uint8, and keeps the whole
    arena alive. By DLPack's capsules, which hold on to the tensor that they came from and, used directly, wait for no
    stream. For a place in one of the `blocks`, which are as in `Upload`, it is a view of that, of uint8.
    """
    pieces = [arena] * len(places)
    numbers: dict[torch.dtype, list[int]] = {}
    for number in sorted(range(len(places)), key=places.__getitem__):
        place, nbytes = places[number]
        if nbytes == 0:
            pieces[number] = torch.empty(0, dtype=torch.uint8, device=arena.device)
            continue
        if place >= len(arena):
            pieces[number] = _part(blocks, place, nbytes)
            continue
        kind = kinds.get(number, torch.uint8)
        numbers.setdefault(torch.uint8 if place % kind.itemsize else kind, []).append(number)
    for kind, members in numbers.items():
        size = kind.itemsize
        typed = arena[: len(arena) // size * size].view(kind)
        # All in one call: one slice at a time takes three times as long.
        apart: list[int] = []
        lengths, end = [], 0
        for number in members:
            begin, nbytes = places[number]
            if begin >= end:
                apart.append(number)
                lengths += [(begin - end) // size, nbytes // size]
                end = begin + nbytes
            else:  # these two share bytes
                pieces[number] = typed[begin // size : (begin + nbytes) // size]
        cut = typed.split_with_sizes([*lengths, len(typed) - end // size])[1::2]
        for number, piece in zip(apart, cut, strict=True):
            pieces[number] = piece
        for number in members:
            pieces[number] = from_dlpack(to_dlpack(pieces[number]))
    return pieces


def _part(allocations: Sequence[tuple[int, torch.Tensor]], place: int, nbytes: int) -> torch.Tensor:
    """Return bytes of the allocation that a place is in; each is given after the place at which it begins."""
    begin, allocation = allocations[bisect.bisect_right(allocations, place, key=lambda each: each[0]) - 1]
    return allocation[place - begin : place - begin + nbytes]


# ---------------------------------------------------------------- page-locking the source itself


class _Direct(NamedTuple):
    """Bytes that the device reads from where they are: place in the arena, how many, and a tensor over them."""

    place: int
    nbytes: int
    memory: torch.Tensor


class PageLock:
    """Page-locks the whole pages of host buffers until `close()`, so that the device reads them without a slot.

    That costs more than one upload gains; it pays for a worker that uploads the same bytes again and again.
    """

    def __init__(self, device: torch.device, ranges: Sequence[tuple[int, int]], keep_alive: object) -> None:
        self.ranges: list[tuple[int, int]] = []
        # Also runs when this goes, and at exit; what keeps the bytes there goes after it.
        self.close = weakref.finalize(self, _unregister, self.ranges, keep_alive)
        page = os.sysconf("SC_PAGE_SIZE")
        with torch.cuda.device(device):
            torch.cuda.init()  # type: ignore[no-untyped-call]
            try:
                for begin, end in ranges:
                    begin, end = -(-begin // page) * page, end // page * page
                    if end > begin:
                        _register(begin, end - begin, device)
                        self.ranges.append((begin, end))
            except BaseException:
                self.close()
                raise


def _through_slots(
    spans: Sequence[Span], addresses: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> tuple[list[Span], list[_Direct]]:
    """Return what must go through slots, and what the device can read where it is: in page-locked ranges."""
    through: list[Span] = []
    direct: list[_Direct] = []
    for span in spans:
        begin = addresses[span.buffer] + span.offset
        end = begin + span.nbytes
        low, high = next(((max(begin, a), min(end, b)) for a, b in ranges if a < end and begin < b), (begin, begin))
        if span.cast is not None or high - low < PADDING:
            through.append(span)
            continue
        for first, last in ((begin, low), (high, end)):
            if last > first:
                skip = first - begin
                through.append(span._replace(place=span.place + skip, offset=span.offset + skip, nbytes=last - first))
        there = torch.frombuffer(_memory(low, high - low), dtype=torch.uint8)
        direct.append(_Direct(span.place + low - begin, high - low, there))
    return through, direct


def _unregister(ranges: list[tuple[int, int]], _: object) -> None:
    while ranges:
        torch.cuda.cudart().cudaHostUnregister(ranges.pop()[0])  # type: ignore[no-untyped-call]


_PORTABLE, _READ_ONLY = 1, 8  # flags of cudaHostRegister


def _register(address: int, nbytes: int, device: torch.device) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for flags in (_PORTABLE | _READ_ONLY, _PORTABLE):
        error = runtime.cudaHostRegister(address, nbytes, flags)
        if int(error) == 0:
            return
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next launch reports the failed call, and clears it
    raise ZeroCopyError(
        f"{nbytes} bytes of the object store cannot be page-locked (cudaHostRegister: "
        f"{runtime.cudaGetErrorString(error)}). Load with page_lock=False, or raise the limit of locked memory "
        f"(ulimit -l)."
    )
