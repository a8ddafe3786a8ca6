"""`ModelOwner`: the Ray actor that holds the objects of a named model, and the record from which it restarts.

Note [Who holds a named model]

    driver, replica, actor                ModelOwner, a Ray actor            the object store of a node
    ModelRef("sentiment")  -- name -->    record: class, bytes, ObjectRefs   header, buffers
    lease: the record,     <-- refs --    (the actor owns the objects)  -->  pinned while the owner holds
      until it changes                    saved in Ray's key-value store     its ObjectRefs

A handle has no ObjectRefs, so it may be pickled anywhere. A process asks the owner once, and keeps the answer as a
*lease*: it starts a call of `watch`, which returns when the model is replaced or removed, when the owner ends, or
after a minute. Then the process drops the answer, and with it the old objects. No load waits for a round trip while a
lease is valid.

The record is saved when a version is complete. If Ray restarts the owner, or a handle finds it killed, the new owner
reads the record. With a loader, it runs the loader again. Without one, it says what was lost.

This module is pickled by value, so an owner starts without torch and stays at the size of an idle Ray worker. Its
code may use Ray, numpy and the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.experimental import internal_kv

__all__ = ["ModelOwner", "Saved", "read_record", "run_loader", "write_record"]


# Seconds that a driver may be silent while it sends a model. After that another driver may send its own.
SILENCE = 60.0
# The token of the owner's own claim, when it runs its loader again.
_RELOAD = "reload"
# Seconds in which an owner without a model takes no claim, because the driver that failed is about to kill it.
_CLOSING = 15.0


# ---------------------------------------------------------------- the record


class Saved(NamedTuple):
    """What Ray's key-value store keeps of a model, as a plain tuple: other versions of this package read it.

    Attributes:
        incarnation: The id of the owner. A new owner of the same name has another one.
        generation: The number of versions that the model has had.
        node: The node of the owner.
        pid: The process of the owner.
        detached: Whether the owner outlives its driver.
        recipe: The loader, and the options of its task; None for a model that a driver sent.
        removed: When `remove_model` removed the model, in seconds since the epoch; 0 while it is there.
    """

    incarnation: str
    generation: int
    node: str
    pid: int
    detached: bool
    recipe: bytes | None
    removed: float


_KEYS = b"ray_zerocopy"


def _record_key(namespace: str, name: str) -> bytes:
    return f"{len(namespace)}:{namespace}/{name}".encode()


def read_record(namespace: str, name: str) -> Saved | None:
    data = internal_kv._internal_kv_get(_record_key(namespace, name), namespace=_KEYS)
    return None if data is None else Saved(*pickle.loads(data))


def write_record(namespace: str, name: str, record: Saved) -> None:
    internal_kv._internal_kv_put(_record_key(namespace, name), pickle.dumps(tuple(record)), namespace=_KEYS)


# ---------------------------------------------------------------- the task of a loader


def run_loader(recipe: bytes) -> Iterator[Any]:
    """Run a loader in a worker; yield a report, and the objects of the model. The caller owns what is yielded."""
    from ray_zerocopy._store.loader import load_and_take_apart

    yield from load_and_take_apart(recipe)


# ---------------------------------------------------------------- the actor


class _Incoming(NamedTuple):
    """An object that a driver is sending: one block of memory, and the buffers that are its slices."""

    sizes: list[int]
    has_header: bool
    carried: list[Any] | None
    block: Any
    missing: list[int]


class _Claim:
    """The right of one driver to make the next version; others wait, or are told that the name is taken."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.heard = time.monotonic()
        self.is_loading = False
        self.generator: Any = None  # of the task of a loader
        self.incoming: dict[int, _Incoming] = {}
        self.refs: dict[int, Any] = {}

    def is_over(self) -> bool:
        return not self.is_loading and time.monotonic() - self.heard > SILENCE


class ModelOwner:
    """Hold the objects of one named model. The answers are plain dicts with a `status`.

    The status is "ready" (with the `version`), "granted", "taken", "empty", "lost", "closing" or "failed" (with the
    loader's `report`).
    """

    def __init__(self, namespace: str, name: str, incarnation: str, facts: dict[str, Any]) -> None:
        self._place = namespace, name
        self._incarnation = incarnation
        self._node = ray.get_runtime_context().get_node_id()
        self._facts = {**facts, "node": self._node, "pid": os.getpid()}
        self._generation = 0
        self._version: dict[str, Any] | None = None
        self._without_model: dict[str, Any] = {"status": "empty"}
        self._claim: _Claim | None = None
        self._closing_until = 0.0
        self._changed = asyncio.Event()
        saved = read_record(namespace, name)
        if saved is not None and saved.incarnation == incarnation and not saved.removed:
            self._generation = saved.generation
            self._without_model = {"status": "lost", "node": saved.node, "pid": saved.pid}
            if saved.recipe is not None:
                self._recipe = saved.recipe
                self._start_reload()

    # ------------------------------------------------------------ what any process asks

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def describe_model(self, wait: bool = True) -> dict[str, Any]:
        """Return the current version. With `wait`, wait for one that is being made."""
        failed = self._version is None and self._without_model["status"] == "failed"
        if failed and wait and self._recipe is not None and not self._busy():
            self._start_reload()
        while wait and self._version is None and self._busy():
            await self._next_change(1.0)
        return self._answer()

    async def watch(self, generation: int, seconds: float) -> bool:
        """Return when the version is no longer `generation`, or after some seconds."""
        end = time.monotonic() + seconds
        while self._version is not None and self._version["generation"] == generation:
            left = end - time.monotonic()
            if left <= 0:
                return False
            await self._next_change(left)
        return True

    async def lost(self, created: float) -> None:
        """Run the loader again, if there is one: a process could not get the objects of the version of that time."""
        current = self._version is not None and self._version["created"] == created
        if current and self._recipe is not None and not self._busy():
            self._version = None
            self._start_reload()

    # ------------------------------------------------------------ a new version

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def claim(self, token: str, mode: str) -> dict[str, Any]:
        """Ask for the right to make a version. `mode` is "new", "get" (an existing one will do) or "replace"."""
        while True:
            if self._claim is not None and self._claim.token == token:
                return {**self._facts, "status": "granted"}
            if time.monotonic() < self._closing_until:
                return {**self._facts, "status": "closing"}
            # A replacement need not wait for the loader that it replaces.
            reloading = self._claim is not None and self._claim.token == _RELOAD
            busy = self._busy() and not (reloading and mode == "replace")
            if not busy and (self._version is None or mode == "replace"):
                self._claim = _Claim(token)
                self._expiring = asyncio.ensure_future(self._expire(self._claim))
                return {**self._facts, "status": "granted"}
            if mode == "new" or (mode == "get" and self._version is not None):
                answer = self._answer()
                return answer if mode == "get" else {**answer, "status": "taken"}
            await self._next_change(1.0)

    async def begin(
        self, token: str, number: int, sizes: list[int], has_header: bool, carried: list[Any] | None
    ) -> bool:
        """Announce an object: the sizes of its buffers. The first one of an object with a header is the header."""
        claim = self._hear(token)
        if claim is not None:
            block = np.empty(sum(sizes), dtype=np.uint8)
            claim.incoming[number] = _Incoming(sizes, has_header, carried, block, [len(block)])
            self._put_if_complete(claim, number)
        return claim is not None

    async def receive(self, token: str, number: int, offset: int, pieces: list[Any]) -> bool:
        """Take bytes of an object. The last ones complete it: it goes into the store."""
        claim = self._hear(token)
        if claim is not None:
            incoming = claim.incoming[number]
            for piece in pieces:
                data = np.frombuffer(piece, dtype=np.uint8)
                incoming.block[offset : offset + len(data)] = data  # copy: the store needs the whole object at once
                offset += len(data)
                incoming.missing[0] -= len(data)
            self._put_if_complete(claim, number)
        return claim is not None

    async def commit(self, token: str, report: dict[str, Any]) -> dict[str, Any]:
        """Make what was sent the current version."""
        claim = self._hear(token)
        if claim is None or len(claim.refs) != report["objects"] or claim.incoming:
            return {"status": "empty"}
        self._set_version(report, [claim.refs[number] for number in range(report["objects"])], None)
        return self._answer()

    async def load(self, token: str, recipe: bytes) -> dict[str, Any]:
        """Run a loader, and make its model the current version. If it fails, the version before stays."""
        claim = self._hear(token)
        if claim is None:
            return {"status": "empty"}
        claim.is_loading = True
        report, refs = await self._run(recipe, claim)
        if self._claim is not claim:  # given up meanwhile
            return {"status": "empty"}
        if report["status"] == "loaded":
            self._set_version(report, refs, recipe)
            return self._answer()
        self._end_claim()
        return {"status": "failed", "report": report}

    async def abandon(self, token: str) -> bool:
        """Give up a claim; tell whether the owner has no model and nobody to wait for, so that it can be killed."""
        if self._claim is not None and self._claim.token == token:
            if self._claim.generator is not None:
                ray.cancel(self._claim.generator, force=True)
            self._end_claim()
        ends = self._version is None and self._claim is None
        if ends:
            self._closing_until = time.monotonic() + _CLOSING
        return ends

    async def close(self, generation: int) -> None:
        """End: the process that made this version has dropped its last handle. A later version stays."""
        if self._generation == generation:
            self._version = None
            self._end_claim()

    async def remove(self) -> None:
        """Let the objects go. Processes that have loaded them keep them until they let go."""
        self._save(None, removed=time.time())
        self._version = None
        self._without_model = {"status": "empty"}
        self._end_claim()

    # ------------------------------------------------------------ within

    _recipe: bytes | None = None

    def _answer(self) -> dict[str, Any]:
        if self._version is None:
            return {**self._facts, **self._without_model}
        return {"status": "ready", "version": self._version}

    def _busy(self) -> bool:
        return self._claim is not None and not self._claim.is_over()

    def _hear(self, token: str) -> _Claim | None:
        if self._claim is None or self._claim.token != token:
            return None
        self._claim.heard = time.monotonic()
        return self._claim

    def _end_claim(self) -> None:
        self._claim = None
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _put_if_complete(self, claim: _Claim, number: int) -> None:
        incoming = claim.incoming[number]
        if incoming.missing[0]:
            return
        del claim.incoming[number]
        ends = list(itertools.accumulate(incoming.sizes))
        slices = [incoming.block[end - size : end] for size, end in zip(incoming.sizes, ends, strict=True)]
        buffers = [pickle.PickleBuffer(part) for part in slices]
        body: dict[str, Any] = {"ray_zerocopy": self._facts["format"]}
        if incoming.has_header:
            body["header"] = buffers.pop(0)
            body["carried"] = incoming.carried
        claim.refs[number] = ray.put({**body, "buffers": buffers})

    def _set_version(self, report: dict[str, Any], refs: list[Any], recipe: bytes | None) -> None:
        self._generation += 1
        self._recipe = recipe
        facts = {**self._facts, "created": time.time(), "generation": self._generation, "id": uuid.uuid4().hex}
        self._version = {**report, **facts, "refs": refs}
        self._save(recipe)
        self._end_claim()

    def _save(self, recipe: bytes | None, removed: float = 0.0) -> None:
        detached = self._facts["detached"]
        record = Saved(self._incarnation, self._generation, self._node, os.getpid(), detached, recipe, removed)
        write_record(*self._place, record)

    async def _expire(self, claim: _Claim) -> None:
        """Drop what a driver has sent if the driver falls silent."""
        while self._claim is claim:
            await asyncio.sleep(SILENCE / 4)
            if self._claim is claim and claim.is_over():
                self._end_claim()

    def _start_reload(self) -> None:
        claim = self._claim = _Claim(_RELOAD)
        claim.is_loading = True
        self._without_model = {"status": "empty"}
        self._reloading = asyncio.ensure_future(self._reload(claim))

    async def _reload(self, claim: _Claim) -> None:
        assert self._recipe is not None
        report, refs = await self._run(self._recipe, claim)
        if self._claim is not claim:  # another version has taken its place
            return
        if report["status"] == "loaded":
            self._set_version(report, refs, self._recipe)
        else:
            self._without_model = {"status": "failed", "report": report}
            self._end_claim()

    async def _run(self, recipe: bytes, claim: _Claim) -> tuple[dict[str, Any], list[Any]]:
        """Run a loader in a task of this actor, which so becomes the owner of the objects."""
        options = pickle.loads(recipe)
        task = ray.remote(num_returns="streaming")(run_loader).options(**pickle.loads(options["task_options"]))
        generator = claim.generator = task.remote(recipe)
        refs: list[Any] = []

        async def collect() -> None:
            async for ref in generator:
                refs.append(ref)

        try:
            await asyncio.wait_for(collect(), options["timeout"])
            report: dict[str, Any] = await refs[0]
            if report["status"] == "loaded" and len(refs) != report["objects"] + 1:
                await refs[-1]  # raises what ended the task
        except asyncio.TimeoutError:
            ray.cancel(generator, force=True)
            return {"status": "late", "text": f"it did not return within {options['timeout']} s"}, []
        except Exception as error:
            return {"status": "died", "text": str(error)}, []
        return report, refs[1:]
