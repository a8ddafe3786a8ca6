"""Models that a worker keeps mapped between the tasks that call them. They hold nothing of the store.

Note [Warm views]

Most of the cost of a load is the first touch of each page of a fresh mapping: 100 ms per GiB, in the first forward.
So the process keeps the *private view* between calls. It keeps nothing that could carry state from one call to the
next, and nothing that the store would miss::

            lend                                  give_back                    in the background
    pin the object again,  ->  call  ->  the thread takes the view  ->  1. wait until nothing refers to the view
    check its place,                      and the used model            2. drop the pages that the call wrote
    build the model                                                     3. unpin the object

Between calls nothing pins the object, so the store may evict, spill or free it. A view of pages that the store then
uses for another object is harmless, because nobody reads it. The bytes of an object never change. So `lend` may use a
view again if the object, pinned again, is at the same offset of the same file. Otherwise it makes a new view.

For most models, building runs no code but that of torch and of this package, and `train` of Hugging Face's classes.
The thread then builds the model too, between steps 2 and 3, if the skeleton is small. The calling thread builds if
classes run other code (a `__setstate__`), or come by value from a notebook, because unpickling them replaces the
methods of the class in use.

A view is used again only if its reference count is the same as when it was new. A result that aliases a weight, a
traceback, or a thread that the model started keeps the view. Such a view is freed together with the last of them.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .._model.imports import import_first
from .._model.layout import Layout
from .._pages import views
from .._pages.regions import locate
from .._store import get
from .._store.fetch import fetch
from .._store.host import HostMemory, address_range
from .._store.ref import Header, ModelRef, WithoutIsolation
from .._store.store_place import is_in_memory

__all__ = ["KEEP_MODELS", "KEEP_SECONDS", "Lent", "WarmModels"]

# How many models one worker process keeps, and for how long after the last call of each.
KEEP_MODELS = 2
KEEP_SECONDS = 60.0
# Views of one model: while the thread cleans one, the next call has the other.
_VIEWS = 2
# Seconds after which a view that is still referred to is given up; before that, the garbage collector runs once.
_COLLECT_AFTER, _GIVE_UP_AFTER = 0.1, 1.0
_POLL_SECONDS = 0.005
# Largest skeleton that the thread builds from, which is about what one object takes on the heap between calls.
_SKELETON_BYTES = 1 << 20
# Seconds that the thread waits, so that it does not compete with Ray, which pickles the result.
_AFTER_CALL = 0.002

_log = logging.getLogger(__name__)


class _View:
    """Private views of all objects of one model, and a model built over them that has not been called."""

    def __init__(self, buffers: list[tuple[Any, int]]) -> None:
        self.buffers = buffers
        self.memories = list({id(memory): memory for memory, _ in buffers}.values())
        self.model: Any = None
        self.built = False
        self.unused = self._references()

    def is_free(self) -> bool:
        """Tell whether only this object refers to the memory."""
        return self._references() == self.unused

    def pin(self, objects: Sequence[object]) -> None:
        for memory, stored in zip(self.memories, objects, strict=True):
            views.pin(memory, stored)

    def unpin(self) -> list[Any]:
        return [views.pin(memory, None) for memory in self.memories]

    def _references(self) -> list[int]:
        return [sys.getrefcount(memory) for memory in self.memories]


class _Entry:
    """A model that this process keeps: how to build it, where its objects are, and the views that are ready."""

    def __init__(self, key: tuple[str, ...], place: object) -> None:
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
        """Build in the calling thread, and find out whether the background thread may build the next time."""
        header = Header.from_bytes(body["header"])
        layout, skeleton = header.layout, header.skeleton
        foreign: list[None] = []
        import_first(header.name, header.imports, header.operators)
        arrived, carried = functools.partial(foreign.append, None), body["carried"]
        view.model = get.rebuild(layout, skeleton, view.buffers, carried, arrived, header.name)
        view.built = True
        # `foreign` gets one entry at the end of the build, and another if a class or function may run other code.
        plain = not header.runs_constructors and len(foreign) == 1
        # Carried objects (ObjectRefs, actor handles) must not be held between calls.
        if plain and not body["carried"] and len(skeleton) <= _SKELETON_BYTES:
            self.plan = layout, skeleton


class Lent:
    """A model for one call. `WarmModels.give_back` takes it back."""

    def __init__(self, model: Any, entry: _Entry | None = None, view: _View | None = None) -> None:
        self.model = model
        self.entry = entry
        self.view = view
        self.since = time.monotonic()
        self.collected = False
        self.waited_for = True


class WarmModels:
    """The models that this process keeps, and the thread that cleans them. The thread ends with the last model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: OrderedDict[tuple[str, ...], _Entry] = OrderedDict()
        self._returned: list[Lent] = []
        self._dropped: list[_Entry] = []
        self._thread: threading.Thread | None = None

    def lend(
        self,
        model_ref: ModelRef,
        without_isolation: WithoutIsolation = WithoutIsolation.COPY,
        timeout: float | None = None,
    ) -> Lent:
        """Return a model on the host that no other call has or had.

        The caller of the task has checked the handle. Raises ModelLostError if the model is gone since then.
        """
        bodies, object_ids = fetch(model_ref, timeout)
        objects = [body["buffers"] for body in bodies if body["buffers"]]
        place = _place(objects)
        key = tuple(object_ids)
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
                    # Cleaning a view is faster than touching the pages of a new one.
                    self._changed.wait_for(entry.is_settled, timeout=5)
                view = entry.ready.pop() if entry.ready else None
                entry.out += 1
        if entry is None:
            entry = _Entry(key, place)
            entry.out = 1
            view = None
        try:
            if view is None:
                view, kept = self._fresh(objects, without_isolation)
                if not (kept and _in_memory(objects)):
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
        """Take a model back after the call. The caller must not keep a reference to it."""
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
        """Return the number of views that are ready, and of those being cleaned, for each model."""
        with self._changed:
            return [(len(entry.ready), entry.being_cleaned) for entry in self._entries.values()]

    @staticmethod
    def _fresh(
        objects: Sequence[Sequence[Any]], without_isolation: WithoutIsolation = WithoutIsolation.COPY
    ) -> tuple[_View, bool]:
        """Return a new view of a model, and whether the next call can use it. A copy is not kept."""
        memory = HostMemory(objects, without_isolation)
        buffers = memory.private_buffers()
        if memory.copied:
            view = _View([])
            view.buffers = buffers
            return view, False
        return _View(buffers), True

    def _drop(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._dropped.append(entry)  # the thread unmaps it, because that takes a while
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
        """Make the view of a returned model ready for the next call. Return False if it is still referred to."""
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
            if self._wanted(entry) and all(views.restore(memory) for memory in view.memories):
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
                            views.populate(memory)
                        self._make_ready(entry, another)
        except Exception:
            # Building runs code of the model's classes. The next call builds again, and raises the error.
            _log.debug("a model was not kept for the next call", exc_info=True)
        finally:
            self._not_waiting(lent)
        return True

    def _make_ready(self, entry: _Entry, view: _View) -> list[Any]:
        """Build over a clean view if this thread may, unpin the view and offer it. Return what pinned it."""
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


def _in_memory(objects: Sequence[Sequence[Any]]) -> bool:
    """Tell whether all objects are in the store itself. A file on disk is deleted when no process maps it."""
    return all(is_in_memory(address_range(buffers[:1])[0]) for buffers in objects)


def _place(objects: Sequence[Sequence[Any]]) -> object:
    """Return the location of each object's first buffer. The rest of an object follows its first buffer."""
    places = tuple(locate(address_range(buffers[:1])[0]) for buffers in objects)
    return object() if None in places else places  # an object equals no other
