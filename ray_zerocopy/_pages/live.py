"""Sets of living objects that do not keep them alive, and objects that forked children must keep."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

__all__ = ["LiveObjects", "keep_in_children"]

T = TypeVar("T")


class LiveObjects(Generic[T]):
    """A set of objects by identity. An object leaves the set when it is deleted."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[T]] = {}

    def add(self, item: T) -> None:
        key, references = id(item), self._references
        references[key] = weakref.ref(item, lambda _: references.pop(key, None))

    def __iter__(self) -> Iterator[T]:
        for reference in list(self._references.values()):
            item = reference()
            if item is not None:
                yield item


# ---------------------------------------------------------------- forks

# Note [Children hold items]
#
# The store counts parent and child as one client. So the child must never release an item, and the parent must not
# release one while the child may read its pages. A pipe tells the parent that the child has exited: only the child
# and its children have the write end open::
#
#     before the fork   pipe, list of the items
#     parent            closes the write end, keeps the list until the read end reports a hang-up
#     child             keeps the write end open and the items for good
#
# A program that a child starts (exec) has the write end closed. A child that closes all its files, as daemons do,
# closes it too: then the parent may release items that this child still reads.

_in_child_only: LiveObjects[object] = LiveObjects()
_in_both: LiveObjects[object] = LiveObjects()


def keep_in_children(item: object, *, in_parent: bool = True) -> None:
    """If `item` lives when this process forks, keep it in the child until the child exits.

    A child shares its parent's connection to Ray, so a release in the child would release the item for the parent
    too. The child never drops its reference, not even when its interpreter shuts down. With `in_parent`, this process
    also keeps `item` until the child has exited.
    """
    (_in_both if in_parent else _in_child_only).add(item)


class _Lease(NamedTuple):
    """Items that this process keeps until a pipe reports that the children with these items have exited."""

    read_end: int
    items: list[object]


class _Leases:
    """The leases of this process. A thread waits for the exits of children while there are leases."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: list[_Lease] = []
        self._waits = False

    def add(self, lease: _Lease) -> None:
        with self._lock:
            self._leases.append(lease)
            if not self._waits:
                self._waits = True
                threading.Thread(target=self._wait, name="ray_zerocopy-forks", daemon=True).start()

    def close_files(self) -> None:
        """Close the read ends, which a child inherits from its parent."""
        for lease in self._leases:
            os.close(lease.read_end)

    def _wait(self) -> None:
        while True:
            with self._lock:
                ends = [lease.read_end for lease in self._leases]
                if not ends:
                    self._waits = False
                    return
            poll = select.poll()
            for end in ends:
                poll.register(end, 0)  # poll always reports a hang-up
            closed = {end for end, _ in poll.poll(500)}  # half a second, then with the new leases
            with self._lock:
                self._leases = [lease for lease in self._leases if lease.read_end not in closed]
            for end in closed:
                os.close(end)


_leases = _Leases()
_forking = threading.local()


def _before_fork() -> None:
    items, pipe = list(_in_both), None
    if items:
        with contextlib.suppress(OSError):  # out of descriptors
            pipe = os.pipe()
    _forking.state = items, list(_in_child_only), pipe


def _after_fork_in_parent() -> None:
    items, _, pipe = _forking.state
    del _forking.state
    if pipe is not None:
        os.close(pipe[1])
        _leases.add(_Lease(pipe[0], items))
    else:
        _keep_for_good(items)


def _after_fork_in_child() -> None:
    global _leases
    items, others, pipe = _forking.state
    del _forking.state
    _keep_for_good(items)
    _keep_for_good(others)
    if pipe is not None:
        os.close(pipe[0])  # the write end stays open until this process ends
    _leases.close_files()
    _leases = _Leases()


def _keep_for_good(items: list[object]) -> None:
    for item in items:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
