"""Test that loads and imports pause the garbage collector, and restore its settings."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from ray_zerocopy._model import gc_pause
from ray_zerocopy._model.gc_pause import pause_gc, pause_gc_to_import


@pytest.fixture(autouse=True)
def restore_gc() -> Iterator[None]:
    """Check that a test leaves the collector's settings unchanged, and restore them."""
    before = gc.isenabled(), gc.get_threshold()
    yield
    after = gc.isenabled(), gc.get_threshold()
    gc.enable()
    gc.set_threshold(*before[1])
    gc.unfreeze()
    assert after == before


def runs() -> bool:
    """Tell whether making many objects starts the collector."""
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    kept = [[] for _ in range(20_000)]
    gc.callbacks.remove(note)
    del kept
    return bool(seen)


def test_blocks_in_each_other() -> None:
    """The collector is paused until the outermost block ends. It stays off if it was off before."""
    with pause_gc():
        with pause_gc():
            assert not runs()
        assert not runs()
    assert runs()
    gc.disable()
    with pause_gc():
        pass
    assert not runs()
    gc.enable()


def test_what_a_block_sets_stays() -> None:
    """What code in a block does to the collector (enable, disable, set the threshold) stays after the block."""
    before = gc.get_threshold()
    with pause_gc():
        gc.disable()
    assert not gc.isenabled()
    with pause_gc():
        gc.enable()
        assert not runs()
    assert runs()
    with pause_gc():
        gc.set_threshold(1234, 5, 6)
    assert gc.get_threshold()[:2] == (1234, 5)
    gc.set_threshold(*before)


def test_blocks_of_several_threads() -> None:
    """A block that outlives another thread's block restores the collector when it ends."""
    began, may_end = threading.Event(), threading.Event()

    def longer() -> None:
        with pause_gc():
            began.set()
            may_end.wait(20)

    thread = threading.Thread(target=longer)
    with pause_gc():
        thread.start()
        assert began.wait(20)
    assert not runs()
    may_end.set()
    thread.join()
    assert runs()


def test_a_fork_within_another_threads_block() -> None:
    """A forked child has the collector on and can start blocks, even if a thread of the parent is in a block."""
    code = """
import gc, os, signal, threading
from ray_zerocopy._model import gc_pause
began, may_end = threading.Event(), threading.Event()

def runs() -> bool:
    return gc.isenabled() and gc.get_threshold()[0] > 0

def hold() -> None:
    with gc_pause.pause_gc(), gc_pause._lock:
        began.set()
        may_end.wait(20)

thread = threading.Thread(target=hold)
thread.start()
began.wait(20)
if os.fork() == 0:
    signal.alarm(10)  # ends the child
    alone = runs()
    with gc_pause.pause_gc():
        off = not runs()
    os._exit(0 if alone and off and runs() else 7)
status = os.waitstatus_to_exitcode(os.wait()[1])
may_end.set()
thread.join()
assert runs() and status == 0, status
with gc_pause.pause_gc():
    if os.fork() == 0:
        os._exit(0 if not runs() else 8)
status = os.waitstatus_to_exitcode(os.wait()[1])
assert runs() and status == 0, status
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_while_a_block_begins() -> None:
    """Ctrl-C while a block begins leaves the collector on and the lock free.

    Python looks for signals where a function begins and after a call.
    """

    def interrupted_at(place: int) -> bool:
        places = 0

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal places
            if frame.f_code.co_filename in (gc_pause.__file__, contextlib.__file__):
                places += event in ("call", "c_return")
                if places == place:
                    places += 1
                    raise KeyboardInterrupt

        before = sys.getprofile()
        try:
            sys.setprofile(profile)
            with pause_gc():
                sys.setprofile(before)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(before)
        return False

    before, place = gc.get_threshold(), 1
    while interrupted_at(place):
        assert gc.get_threshold() == before, place
        assert not gc_pause._blocks, place
        place += 1
    assert place > 6
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(gc_pause._lock.acquire, timeout=20).result()
        thread.submit(gc_pause._lock.release)


def made_in_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pause_gc_to_import(name):
        __import__(name)


def test_what_an_import_made_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that an import makes are in the oldest generation and not frozen, and their garbage is collected."""
    code = """
import weakref
class Thing: pass
kept = [[n] for n in range(20_000)]
cycle = Thing()
cycle.itself = cycle
gone = weakref.ref(cycle)
del cycle
"""
    made_in_an_import(tmp_path, monkeypatch, "makes_many", code)
    module = sys.modules.pop("makes_many")
    assert gc.get_freeze_count() < 1000, "3.12 has some hundreds of its own"
    old = {id(thing) for thing in gc.get_objects(generation=2)}
    assert all(id(thing) in old for thing in module.kept)
    assert module.gone() is not None
    gc.collect()
    assert module.gone() is None


def test_an_import_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails raises its error, and the collector is on afterwards."""
    with pytest.raises(ZeroDivisionError):
        made_in_an_import(tmp_path, monkeypatch, "fails_at_once", "1 / 0")


def test_what_the_user_froze_stays_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that a user has frozen are still frozen after an import."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert frozen > 0
    made_in_an_import(tmp_path, monkeypatch, "harmless", "kept = [[]]")
    assert gc.get_freeze_count() >= frozen - 100  # some of them have died since


def test_importing_the_package() -> None:
    """The first import of the package, which imports torch, pauses the collector and leaves it on."""
    code = """
import gc
before, runs = gc.get_threshold(), []
gc.callbacks.append(lambda phase, info: phase == "start" and runs.append(phase))
import ray_zerocopy
collections = len(runs)
assert gc.isenabled() and gc.get_threshold() == before and gc.get_freeze_count() < 1000
print(collections)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20, "there are some hundreds where nothing is put off"
