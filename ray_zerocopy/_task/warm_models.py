"""Models that a worker keeps between the tasks that call them: mapped and built, but holding nothing of the store.

Note [Warm views]

What makes a load expensive in the end is not the load but touching each page of a fresh mapping once: 100 ms per
GiB, on the first forward. So a *private view* is what is kept from one call to the next, and what is not kept is
everything that could leak from one call to the next or that the store would miss::

            lend                                  give_back                    in the background
    pin the object again,  ->  call  ->  the thread takes the view  ->  1. wait until nothing refers to the view
    check that it lies                   and the used model              2. drop the pages that the call wrote
    where it did, build                                                  3. unpin the object

Between calls nothing pins the object: the store may evict, spill or free it as if this process had never seen
it. A view of pages that the store uses for something else in the meantime is harmless, because nobody reads it: an
object's bytes never change, so a view may be lent again exactly if the object, pinned again, lies at the same
offset of the same file. Else a fresh one is made.

For most models building runs no code but torch's and ours (and a `train`, which Hugging Face's have); the thread then
does that too, between 2 and 3, if the object is small without its tensors. Where classes have more code that runs
(a `__setstate__`), or come by value, from a notebook, which replaces the methods of the living class, the calling
thread builds.

A view is used again only when its reference count is back at what it was when it was new. Results that alias a
weight, a traceback, a thread that the model left behind: all hold the view, which then goes with them.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .._model.layout import Layout
from .._store import get, pages
from .._store.host import HostMemory, address_range, fetch
from .._store.ref import Header, ModelRef

__all__ = ["KEEP_MODELS", "KEEP_SECONDS", "Lent", "WarmModels"]

# Bounds of what one worker process keeps: how many models, and for how long after the last call of each.
KEEP_MODELS = 2
KEEP_SECONDS = 60.0
# Views of one model: while one is made clean, the next call has the other.
_VIEWS = 2
# A view still referred to after this long goes; before that the garbage collector is asked once.
_COLLECT_AFTER, _GIVE_UP_AFTER = 0.1, 1.0
_POLL_SECONDS = 0.005
# Of a skeleton that is kept, and so about what one object takes on the heap between calls.
_SKELETON_BYTES = 1 << 20
# Until Ray has pickled the result: it would have to share the interpreter with the cleaning.
_AFTER_CALL = 0.002

_log = logging.getLogger(__name__)


class _View:
    """Private views of all objects of one model, and a model built over them that nobody has called yet."""

    def __init__(self, buffers: list[tuple[Any, int]]) -> None:
        self.buffers = buffers
        self.memories = list({id(memory): memory for memory, _ in buffers}.values())
        self.model: Any = None
        self.built = False
        self.unused = self._references()

    def is_free(self) -> bool:
        """Tell whether nothing but this object refers to the memory."""
        return self._references() == self.unused

    def pin(self, objects: Sequence[object]) -> None:
        for memory, stored in zip(self.memories, objects, strict=True):
            pages.pin(memory, stored)

    def unpin(self) -> list[Any]:
        return [pages.pin(memory, None) for memory in self.memories]

    def _references(self) -> list[int]:
        return [sys.getrefcount(memory) for memory in self.memories]


class _Entry:
    """A model that this process keeps: how to build it, where it lies, and the views of it that are ready."""

    def __init__(self, key: tuple[bytes, ...], place: object) -> None:
        self.key = key
        self.place = place
        # Layout and skeleton, where the thread may build.
        self.plan: tuple[Layout, bytes] | None = None
        self.ready: list[_View] = []
        self.out = 0
        self.being_cleaned = 0
        self.wants_spare = False
        self.last_used = time.monotonic()

    def is_settled(self) -> bool:
        return bool(self.ready) or not self.being_cleaned

    def build_for_call(self, view: _View, body: dict[str, Any]) -> None:
        """Build in the calling thread, and learn whether the other may do it the next time."""
        header = Header.from_bytes(body["header"])
        layout, skeleton = header.layout, header.skeleton
        foreign: list[None] = []
        view.model = get.rebuild(layout, skeleton, view.buffers, body["carried"], lambda: foreign.append(None))
        view.built = True
        # Called once at the end; before that too, if what was looked up is not known to run no code.
        plain = not header.constructs and len(foreign) == 1
        # What was carried (ObjectRefs, actor handles) must not be held between calls.
        if plain and not body["carried"] and len(skeleton) <= _SKELETON_BYTES:
            self.plan = layout, skeleton


class Lent:
    """A model for one call, to be given back after it."""

    def __init__(self, model: Any, entry: _Entry | None = None, view: _View | None = None) -> None:
        self.model = model
        self.entry = entry
        self.view = view
        self.since = time.monotonic()
        self.collected = False
        self.waited_for = True


class WarmModels:
    """The models that this process keeps, and the thread that cleans them, which ends when none is left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: OrderedDict[tuple[bytes, ...], _Entry] = OrderedDict()
        self._returned: list[Lent] = []
        self._dropped: list[_Entry] = []
        self._thread: threading.Thread | None = None

    def lend(self, model_ref: ModelRef) -> Lent:
        """Return a model on the host that no other call has or had.

        The handle was checked where the call was made. Raises ModelLostError for a model that is gone since.
        """
        bodies = fetch(model_ref)
        objects = [body["buffers"] for body in bodies if body["buffers"]]
        place = _place(objects)
        key = tuple(ref.binary() for ref in model_ref.refs)
        with self._changed:
            entry = self._entries.get(key)
            if entry is not None and entry.place != place:
                self._drop(entry)
                entry = None
            if entry is not None:
                self._entries.move_to_end(key)
                entry.last_used = time.monotonic()
                if not entry.ready and entry.being_cleaned:
                    entry.wants_spare = True
                    # Cleaning is always quicker than touching a fresh view.
                    self._changed.wait_for(entry.is_settled, timeout=5)
                view = entry.ready.pop() if entry.ready else None
                entry.out += 1
        if entry is None:
            entry = _Entry(key, place)
            entry.out = 1
            view = None
        try:
            if view is None:
                view, kept = self._fresh(objects)
                if not (kept and _in_memory(place)):
                    entry.build_for_call(view, bodies[0])
                    model, view.model = view.model, None
                    with self._changed:
                        entry.out -= 1
                    return Lent(model)
            else:
                view.pin(objects)
            if not view.built:
                entry.build_for_call(view, bodies[0])
        finally:
            if view is None or not view.built:
                with self._changed:
                    entry.out -= 1
        with self._changed:
            if self._entries.setdefault(key, entry) is entry:
                while len(self._entries) > KEEP_MODELS:
                    self._drop(next(iter(self._entries.values())))
        model, view.model, view.built = view.model, None, False
        return Lent(model, entry, view)

    def give_back(self, lent: Lent) -> None:
        """Take a model back after the call; the caller keeps no reference to it."""
        if lent.entry is None:
            lent.model = None
            return
        lent.since = time.monotonic()
        with self._changed:
            lent.entry.last_used = lent.since
            lent.entry.out -= 1
            lent.entry.being_cleaned += 1
            self._returned.append(lent)
            if self._thread is None:
                self._thread = threading.Thread(target=self._tend, name="ray_zerocopy", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def kept(self) -> list[tuple[int, int]]:
        """Return for each model how many views are ready and how many are being cleaned."""
        with self._changed:
            return [(len(entry.ready), entry.being_cleaned) for entry in self._entries.values()]

    @staticmethod
    def _fresh(objects: list[Any]) -> tuple[_View, bool]:
        memory = HostMemory(objects)
        buffers = memory.private_buffers()
        if memory.copied or not memory.isolated:
            view = _View([])
            view.buffers = buffers
            return view, False
        return _View(buffers), True

    def _drop(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._dropped.append(entry)  # unmapping takes a while: in the background
            self._changed.notify_all()

    # ------------------------------------------------------------ in the background

    def _tend(self) -> None:
        pending: list[Lent] = []
        while True:
            with self._changed:
                if not self._returned and not self._dropped:
                    self._changed.wait(_POLL_SECONDS if pending else min(1.0, KEEP_SECONDS))
            if self._returned:
                time.sleep(_AFTER_CALL)
            with self._changed:
                pending += self._returned
                self._returned.clear()
                now = time.monotonic()
                for entry in list(self._entries.values()):
                    if now - entry.last_used > KEEP_SECONDS and not entry.out and not entry.being_cleaned:
                        self._drop(entry)
                dropped, self._dropped = self._dropped, []
                if not pending and not self._entries:
                    self._thread = None
                    return
            for entry in dropped:
                entry.ready.clear()
            del dropped
            pending = [lent for lent in pending if not self._cleaned(lent)]

    def _cleaned(self, lent: Lent) -> bool:
        """Make the view of a returned model ready for the next call; False if it is still referred to."""
        entry, view = lent.entry, lent.view
        assert entry is not None
        assert view is not None
        lent.model = None
        if not view.is_free():
            age = time.monotonic() - lent.since
            self._not_waiting(lent)
            if age > _COLLECT_AFTER and not lent.collected:
                lent.collected = True
                gc.collect()
            return age > _GIVE_UP_AFTER
        lent.view = None
        try:
            if self._wanted(entry) and all(pages.restore(memory) for memory in view.memories):
                objects = self._make_ready(entry, view)
                with self._changed:
                    spare = entry.wants_spare and self._entries.get(entry.key) is entry
                    spare = spare and len(entry.ready) + entry.out + entry.being_cleaned <= _VIEWS
                    entry.wants_spare = False
                self._not_waiting(lent)
                if spare:
                    another, kept = self._fresh(objects)
                    if kept:
                        for memory in another.memories:
                            pages.populate(memory)
                        self._make_ready(entry, another)
        except Exception:
            # Building runs the classes' own code; the next call builds anew and meets the error itself.
            _log.debug("a model was not kept for the next call", exc_info=True)
        finally:
            self._not_waiting(lent)
        return True

    def _make_ready(self, entry: _Entry, view: _View) -> list[Any]:
        """Build over a clean view if that may be done here, unpin and offer it; return what pinned it."""
        if entry.plan is not None:
            view.model = get.rebuild(*entry.plan, view.buffers, ())
            view.built = True
        with self._changed:
            objects = view.unpin()
            if self._entries.get(entry.key) is entry and len(entry.ready) < _VIEWS:
                entry.ready.append(view)
                self._changed.notify_all()
        return objects

    def _wanted(self, entry: _Entry) -> bool:
        with self._changed:
            return self._entries.get(entry.key) is entry and len(entry.ready) < _VIEWS

    def _not_waiting(self, lent: Lent) -> None:
        if lent.waited_for:
            lent.waited_for = False
            with self._changed:
                assert lent.entry is not None
                lent.entry.being_cleaned -= 1
                self._changed.notify_all()


def _in_memory(place: object) -> bool:
    """Tell whether all objects are in the store itself, not in files on disk that go when nobody maps them."""
    try:
        memory = os.stat("/dev/shm").st_dev
    except OSError:
        return False
    return isinstance(place, tuple) and all(device == memory for device, _, _ in place)


def _place(objects: Sequence[Sequence[Any]]) -> object:
    """Return where each object lies: its first buffer tells, the rest of an object follows from its id."""
    places = tuple(pages.locate(address_range(buffers[:1])[0]) for buffers in objects)
    return object() if None in places else places  # an object equals no other
