"""Measure how fast a model is copied from shared memory to a GPU, beside the machine's limit and other ways.

    python benchmarks/device.py                # on a machine with a CUDA device: at most seven minutes
    python benchmarks/device.py --sizes 0.4 4  # sizes in GB, to measure fewer
    python benchmarks/device.py --host         # only how fast slots are filled; the default without a GPU

Needs torch and numpy, and safetensors for the row of that name, but not Ray. A file in /dev/shm, mapped shared and
read-only, takes the place of the store's pages. Each figure is from a separate process, which starts CUDA before the
clock. "first" is the first load of that process, including page-locking and first touch. "later" is the median of the
loads after it. After the clock stops, the loaded tensors are compared with the file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch

package = types.ModuleType("ray_zerocopy")  # the package's __init__ needs Ray, but the modules below do not
package.__path__ = [str(Path(__file__).parent.parent / "ray_zerocopy")]
sys.modules["ray_zerocopy"] = package
from ray_zerocopy._device import cuda, page_lock  # noqa: E402
from ray_zerocopy._device.placement import place_storages  # noqa: E402
from ray_zerocopy._device.ring import Ring, ring_of  # noqa: E402
from ray_zerocopy._device.upload import Source, Upload, _address, divide  # noqa: E402
from ray_zerocopy._model import layout  # noqa: E402

warnings.filterwarnings("ignore", message="The given buffer is not writable")

LIMIT, OURS, MAPPED, LOCKED = "page-locked copy", "ray_zerocopy", "  read by mapping", "  page_lock=True"
PLAIN, SAFETENSORS = 'model.to("cuda")', "safetensors"
WAYS = (LIMIT, OURS, MAPPED, LOCKED, PLAIN, SAFETENSORS)
SLOT_SETTINGS = [
    (slot << 20, threads, more) for slot in (1, 2, 4, 8) for threads in (2, 4, 8, 12, 16) for more in (2, 8)
]
LATER = 3


# ---------------------------------------------------------------- a model in a file


def write_model(path, nbytes, many):
    """Write bfloat16 tensors of `nbytes` in total as safetensors: 8, or with `many` about one per MB, some small."""
    generator = random.Random(0)
    sizes = []
    while (left := nbytes - sum(sizes)) >= 128:
        size = generator.choice((1024, 65536, 1 << 20, 3 << 20)) if many else nbytes // 8
        sizes.append(min(size, left) // 128 * 128)
    header, at = {}, 0
    for number, size in enumerate(sizes):
        header[f"t{number}"] = {"dtype": "BF16", "shape": [size // 128, 64], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    # Without NaN, so that tensors can be compared, and without repeated blocks.
    noise = np.random.default_rng(0).integers(0, 1 << 14, 16 << 20, dtype=np.uint16)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = at
        while left > 0:
            block = np.roll(noise, left % 99991)[: min(noise.size, left // 2)]
            file.write(block.data)
            left -= block.nbytes


class Model:
    """A model in a file: the mapping, the layout that the store would have, and the tensors as views."""

    def __init__(self, path):
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        size = os.fstat(self.file).st_size
        self.memory = mmap.mmap(self.file, size, mmap.MAP_SHARED, mmap.PROT_READ)
        length = int.from_bytes(self.memory[:8], "little")
        header = json.loads(self.memory[8 : 8 + length])
        self.begin = 8 + length
        self.nbytes = size - self.begin
        storages, views = [], []
        for number, entry in enumerate(header.values()):
            low, high = entry["data_offsets"]
            shape = tuple(entry["shape"])
            storages.append((0, low, high - low))
            flags = (True, False, False, False)
            views.append((number, shape[0] * 64, torch.bfloat16, 0, shape, (64, 1), *flags))
        self.layout = layout.Layout([self.nbytes], storages, views, [])

    def views(self):
        return layout.unpack(self.layout, [(self.memory, self.begin)])

    def upload(self, ring, from_file=True, locked=None):
        placement = place_storages(self.layout, {}, None)
        file = (self.file, self.begin) if from_file else (None, 0)
        sources = [Source(self.memory, self.begin, *file)]
        with Upload(placement.spans, placement.nbytes, sources, ring, locked=locked) as upload:
            pieces = divide(upload.arena, placement.storages, layout.storage_dtypes(self.layout, {}, None))
            tensors = layout.unpack(self.layout, [], pieces=pieces)
            upload.wait()
        return tensors


# ---------------------------------------------------------------- in a process of its own


def make_loader(name, model):
    """Return a function that loads the model once, in the named way."""
    device = torch.device("cuda", 0)
    if name == LIMIT:
        source = torch.empty(model.nbytes, dtype=torch.uint8, pin_memory=True)
        for at in range(0, model.nbytes, 64 << 20):
            part = source[at : at + (64 << 20)]
            part.copy_(torch.frombuffer(model.memory, dtype=torch.uint8, count=len(part), offset=model.begin + at))

        def limit():
            target = torch.empty(model.nbytes, dtype=torch.uint8, device=device)
            target.copy_(source, non_blocking=True)
            return [target]

        return limit
    if name in (OURS, MAPPED):
        return lambda: model.upload(ring_of(device), name == OURS)
    if name == LOCKED:
        kept = []

        def locked():
            if not kept:
                begin = _address(Source(model.memory, model.begin))
                kept.append(page_lock.PageLock(device, [(begin, begin + model.nbytes)], model))
            return model.upload(ring_of(device), locked=kept[0])

        return locked
    if name == PLAIN:
        return lambda: list(torch.nn.ParameterList(model.views()).to(device))
    import safetensors.torch

    def load():
        loaded = safetensors.torch.load_file(model.path, device=str(device))
        return [loaded[f"t{number}"] for number in range(len(loaded))]

    return load


def time_load(load):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    tensors = load()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, tensors


def check(tensors, model):
    """Compare some tensors with the file, bit for bit."""
    views = model.views()
    if len(tensors) != len(views):
        raise SystemExit(f"{len(tensors)} tensors were loaded, but the file has {len(views)}.")
    for number in random.Random(1).sample(range(len(views)), min(50, len(views))):
        have, want = (t.detach().cpu().view(torch.uint8) for t in (tensors[number], views[number]))
        if not torch.equal(have, want):
            raise SystemExit(f"Tensor {number} differs from the file.")


def measure(name, path):
    model = Model(path)
    torch.zeros(1, device="cuda")
    load = make_loader(name, model)
    first, tensors = time_load(load)
    if name == LIMIT:
        expected = torch.frombuffer(model.memory, dtype=torch.uint8, count=1 << 20, offset=model.begin)
        if not torch.equal(tensors[0][: 1 << 20].cpu(), expected):
            raise SystemExit("The copy differs from the file.")
    else:
        check(tensors, model)
    peak = torch.cuda.max_memory_allocated() / model.nbytes
    tensors.clear()
    gc.collect()
    later = statistics.median(time_load(load)[0] for _ in range(LATER))
    return {"first": first, "later": later, "nbytes": model.nbytes, "peak": peak}


def sweep(path):
    """Return the GB/s of a later load for each slot size, thread count and number of slots in flight."""
    model = Model(path)
    engine = cuda.CudaEngine(torch.device("cuda", 0))
    model.upload(Ring(engine))
    found = []
    for slot, threads, more in SLOT_SETTINGS:
        ring = Ring(engine, slot, threads, threads + more)
        time_load(lambda ring=ring: model.upload(ring))
        seconds = statistics.median(time_load(lambda ring=ring: model.upload(ring))[0] for _ in range(LATER))
        found.append([slot, threads, more, model.nbytes / seconds / 1e9])
    return found


class InstantDevice:
    """A device whose copies take no time, so that an upload only fills the slots."""

    cpus = frozenset(range(os.cpu_count() or 1))

    def allocate(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def page_locked(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def current(self):
        return contextlib.nullcontext()

    def copy(self, to, source):
        return None

    def is_done(self, event):
        return True

    def wait(self, event):
        pass


def measure_fill(path, from_file, threads):
    """Return the seconds of the first and of later fills of slots with a model, and of one plain copy."""
    model = Model(path)
    ring = Ring(InstantDevice(), threads=threads)
    seconds = []
    for _ in range(1 + LATER):
        begin = time.perf_counter()
        model.upload(ring, from_file)
        seconds.append(time.perf_counter() - begin)
    into = np.ones(model.nbytes, dtype=np.uint8)
    source = np.frombuffer(model.memory, np.uint8, model.nbytes, model.begin)
    source[::4096].sum()
    copies = []
    for _ in range(LATER):
        begin = time.perf_counter()
        np.copyto(into, source)
        copies.append(time.perf_counter() - begin)
    return {"first": seconds[0], "later": statistics.median(seconds[1:]), "copy": statistics.median(copies)}


# ---------------------------------------------------------------- the tables


def run_child(*arguments):
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def print_machine():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
        print(f"{model}, {len(os.sched_getaffinity(0))} CPUs, Linux {platform.release()}")
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["safetensors"] = importlib.metadata.version("safetensors")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if torch.cuda.is_available():
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max"]
            print("GPU:", subprocess.run([*query, "--format=csv"], capture_output=True, text=True).stdout.strip())


def print_host_table(path, size):
    print(f"\nOnly filling slots, {size:g} GB, GB/s, without a device. One plain, warm copy is 1.00x.")
    print(f"{'':26}{'first':>8}{'later':>8}{'vs a copy, first':>18}{'later':>8}")
    for from_file in (True, False):
        for threads in sorted({1, 2, min(12, len(os.sched_getaffinity(0)))}):
            found = run_child("fill", path, int(from_file), threads)
            label = f"{'file' if from_file else 'mapping'}, {threads} thread{'s'[: threads != 1]}"
            if "error" in found:
                print(f"{label:26}{found['error']}")
                continue
            rates = [size / found[k] for k in ("first", "later")]
            shares = [found["copy"] / found[k] for k in ("first", "later")]
            print(f"{label:26}{rates[0]:8.2f}{rates[1]:8.2f}{shares[0]:17.2f}x{shares[1]:7.2f}x", flush=True)


def print_device_table(path, size, many):
    print(f"\n{size:g} GB in {'many' if many else 'few'} tensors ({len(Model(path).layout.views)}), GB/s")
    headings = ("first", "later", "vs limit, first", "later", "vs plain, first", "later", "peak bytes")
    print(
        " " * 20 + "".join(head.rjust(width) for head, width in zip(headings, (8, 8, 17, 8, 16, 8, 12), strict=True))
    )
    rows = {name: run_child("measure", name, path) for name in WAYS}
    limit, plain = rows[LIMIT], rows[PLAIN]
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:20}{row['error']}")
            continue
        cells = [row["nbytes"] / row[k] / 1e9 for k in ("first", "later")]
        cells += [limit["later"] / row[k] if "error" not in limit else float("nan") for k in ("first", "later")]
        cells += [plain[k] / row[k] if "error" not in plain else float("nan") for k in ("first", "later")]
        first, later, *ratios = cells
        print(f"{name:20}{first:8.2f}{later:8.2f}{ratios[0]:16.2f}x{ratios[1]:7.2f}x", end="")
        print(f"{ratios[2]:15.2f}x{ratios[3]:7.2f}x{row['peak']:11.3f}x", flush=True)


def main(options):
    print_machine()
    has_device = torch.cuda.is_available() and not options.host
    if not has_device:
        print("\nNo CUDA device is used. Only the filling of slots is measured, not the copies to a GPU.")
    deadline = time.monotonic() + options.minutes * 60
    free = shutil.disk_usage("/dev/shm").free
    skipped = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = os.path.join(folder, "model.safetensors")
        for size in options.sizes:
            if size * 1e9 > 0.45 * free:
                skipped.append(f"{size:g} GB: /dev/shm has only {free / 1e9:.1f} GB free")
                continue
            for many in (False, True):
                if time.monotonic() > deadline:
                    skipped.append(f"{size:g} GB in {'many' if many else 'few'} tensors: no time left")
                    continue
                write_model(path, int(size * 1e9), many)
                if has_device:
                    print_device_table(path, size, many)
                    if many and size == 4:
                        print(
                            "\nSlots: GB/s of a later load, by MiB per slot, threads, and slots beyond one per thread"
                        )
                        found = run_child("sweep", path)
                        if "error" in found:
                            print(found["error"])
                        else:
                            best = sorted(found["swept"], key=lambda row: -row[3])
                            for slot, threads, more, rate in best[:8] + best[-3:]:
                                print(f"{slot >> 20:4} MiB {threads:4} threads {more:4} more {rate:8.2f}", flush=True)
                if not many and (not has_device or size == options.sizes[0]):
                    print_host_table(path, size)
    print("\nNot measured: Ray's object store as the source (a file in /dev/shm takes its place), several GPUs,")
    print("several loads at the same time, a NUMA node other than the GPU's, other accelerators.")
    for line in skipped:
        print(f"Not measured: {line}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, *rest = sys.argv[2:]
        if what == "measure":
            answer = measure(*rest)
        elif what == "sweep":
            answer = {"swept": sweep(*rest)}
        else:
            answer = measure_fill(rest[0], rest[1] == "1", int(rest[2]))
        print(json.dumps(answer))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument(
            "--sizes", type=float, nargs="+", default=[4, 0.4, 16], help="GB, in this order (default 4 0.4 16)"
        )
        parser.add_argument(
            "--minutes", type=float, default=6, help="start no new table after this many minutes (default 6)"
        )
        parser.add_argument("--host", action="store_true", help="only fill slots, even if there is a device")
        main(parser.parse_args())
