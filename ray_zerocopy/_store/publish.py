"""Give a model a name: claim the name from its owner, then send the model, or the loader that makes it."""

from __future__ import annotations

import contextlib
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ZeroCopyError
from .capacity import check_room, choose_node
from .loader import check_options
from .lookup import NAMESPACE, create_owner, describe, forget, named_handle, raise_loader_error
from .put import PackedModel, check_is_model, pack_model
from .ref import ModelRef, current_session
from .waits import wait_for

__all__ = ["Naming", "existing", "load_named", "naming_of", "put_named"]


# The size limit of an object of a named model: the owner has that much memory for itself while it receives one.
_OBJECT_BYTES = 256 << 20
# A model is sent in pieces of a 32nd of its bytes, within these limits. Two pieces are in the store at a time.
_PIECE_AT_LEAST, _PIECE_AT_MOST = 1 << 20, 8 << 20
_IN_FLIGHT = 2
_ATTEMPTS = 20


class Naming(NamedTuple):
    """The name of a model, and what happens if it is taken; as for a Ray actor."""

    name: str
    namespace: str
    detached: bool
    get_if_exists: bool
    replace: bool

    @property
    def mode(self) -> str:
        return "get" if self.get_if_exists else "replace" if self.replace else "new"


def naming_of(
    function: str,
    name: str | None,
    namespace: str | None,
    lifetime: str | None,
    get_if_exists: bool,
    replace: bool,
    options: Mapping[str, Any],
) -> Naming | None:
    """Return the checked name, or None for a model without one."""
    check_options(options, function)
    if name is None:
        given = {"namespace": namespace, "lifetime": lifetime, "get_if_exists": get_if_exists, "replace": replace}
        for option, value in given.items():
            if value:
                raise ValueError(f'{function}() has {option}={value!r}, which needs a name. Pass name="..." too.')
        return None
    for option, value in (("name", name), ("namespace", namespace)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{function}() needs a string as {option}, not {value!r}.")
        if value is not None and not value.strip():
            raise ValueError(f"{function}() has {option}={value!r}. A {option} has at least one visible character.")
    if lifetime not in (None, "detached", "non_detached"):
        raise ValueError(
            f'{function}() has lifetime={lifetime!r}. It is None, or "detached" to outlive this process.'
        )
    if get_if_exists and replace:
        raise ValueError(
            f"{function}() has both get_if_exists=True and replace=True. The first returns the model of that name, "
            f"the second replaces it. Choose one."
        )
    return Naming(name, namespace or NAMESPACE, lifetime == "detached", get_if_exists, replace)


# ---------------------------------------------------------------- the two ways


def put_named(
    model: object,
    naming: Naming,
    options: Mapping[str, Any],
    *,
    label: str | None = None,
    allow_meta: bool = False,
    root: object = None,
    imports: Iterable[Any] = (),
) -> ModelRef:
    """Take `model` apart, and send it to the owner of its name. `label` and `root` are as for `put`."""
    check_is_model(model)
    there = existing(naming)
    if there is not None:
        return there
    packed = pack_model(model, label, allow_meta=allow_meta, root=root, object_bytes=_OBJECT_BYTES, imports=imports)
    nbytes = packed.nbytes + len(packed.header)

    def place() -> dict[str, Any]:
        node = choose_node(nbytes) if not options else None
        if node is None:
            return dict(options)
        check_room(packed.class_name, nbytes, node)
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}

    def make(owner: Any, token: str, node: str) -> dict[str, Any]:
        check_room(packed.class_name, nbytes, node)  # of an owner that was there before, or where the options say
        _send(packed, owner, token)
        answer: dict[str, Any] = ray.get(owner.commit.remote(token, {**packed.facts(), "loader": None}))
        if answer["status"] != "ready":
            raise _interrupted(naming)
        return answer

    return _publish(naming, place, make)


def load_named(recipe: bytes, naming: Naming) -> ModelRef:
    """Let the owner of a name run a loader."""
    options = pickle.loads(recipe)
    there = existing(naming)
    if there is not None:
        return there

    def place() -> dict[str, Any]:
        node = options["node"]
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}

    def make(owner: Any, token: str, node: str) -> dict[str, Any]:
        what = f"the load of the model {naming.name!r} by {options['loader']}"
        answer: dict[str, Any] = wait_for(owner.load.remote(token, recipe), what)
        if answer["status"] == "failed":
            raise_loader_error({"seconds": options["timeout"], **answer["report"]}, options["loader"])
        if answer["status"] != "ready":
            raise _interrupted(naming)
        return answer

    return _publish(naming, place, make)


def _interrupted(naming: Naming) -> ZeroCopyError:
    return ZeroCopyError(
        f"preparing the model {naming.name!r} was interrupted: this process was silent for a minute, another process "
        f"took its place, or the owner of the name was killed. Prepare the model again."
    )


# ---------------------------------------------------------------- the name


def existing(naming: Naming) -> ModelRef | None:
    """Return the handle of a model that may be taken as it is, before any work. Raises ValueError if it may not."""
    session = current_session()
    found = None if naming.replace else describe(naming.namespace, naming.name, wait=naming.get_if_exists)
    if found is None or found[1]["status"] != "ready":
        return None
    return _take(naming, found[1], session)


def _take(naming: Naming, answer: dict[str, Any], session: str) -> ModelRef:
    if not naming.get_if_exists:
        raise _taken(naming, answer)
    _check_lifetime(naming, answer["version"]["detached"])
    return named_handle(naming.namespace, naming.name, answer["version"], session)


def _taken(naming: Naming, answer: dict[str, Any]) -> ValueError:
    version = answer.get("version")
    by = f"a {version['class_name']} of {version['nbytes']} bytes" if version else "a model that is being prepared"
    return ValueError(
        f"the name {naming.name!r} in the namespace {naming.namespace!r} is taken by {by}. Pass get_if_exists=True "
        f"to use that model, replace=True to put this one in its place, or first: remove_model({naming.name!r})."
    )


def _check_lifetime(naming: Naming, detached: bool) -> None:
    if naming.detached and not detached:
        raise ValueError(
            f"the model {naming.name!r} exists, and ends with the driver that prepared it. It cannot become "
            f'detached: remove_model({naming.name!r}) first, or leave out lifetime="detached".'
        )


def _publish(
    naming: Naming, place: Callable[[], dict[str, Any]], make: Callable[[Any, str, str], dict[str, Any]]
) -> ModelRef:
    """Claim the name, make its next version, and return the handle."""
    session, token = current_session(), uuid.uuid4().hex
    options = place()
    for _ in range(_ATTEMPTS):
        owner = create_owner(naming.namespace, naming.name, naming.detached, options)
        try:
            call = owner.claim.remote(token, naming.mode)
            what = f"the wait for the owner of the model {naming.name!r}, which starts, or lets another go first,"
            answer = wait_for(call, what)
        except ray.exceptions.RayActorError:  # its creator ended, or killed it after it failed
            continue
        if answer["status"] == "closing":  # another process failed, and ends this owner
            time.sleep(0.1)
            continue
        if answer["status"] == "taken":
            raise _taken(naming, answer)
        if answer["status"] == "ready":
            return _take(naming, answer, session)
        with _claimed(owner, token):
            _check_lifetime(naming, answer["detached"])
            answer = make(owner, token, answer["node"])
        forget(naming.namespace, naming.name)
        return named_handle(naming.namespace, naming.name, answer["version"], session, owner=owner)
    raise _interrupted(naming)


@contextlib.contextmanager
def _claimed(owner: Any, token: str) -> Iterator[None]:
    """If preparing fails, give up the claim. Kill an owner that has no model, so that its name is free."""
    try:
        yield
    except BaseException as failure:
        with contextlib.suppress(ray.exceptions.RayError):
            if ray.get(owner.abandon.remote(token), timeout=10):
                ray.kill(owner)
        if isinstance(failure, ray.exceptions.RayActorError):
            raise ZeroCopyError(
                f"the owner of the model ended while the model was prepared: {failure}. Prepare the model again."
            ) from failure
        raise


def _send(packed: PackedModel, owner: Any, token: str) -> None:
    """Send the objects of a model to its owner, a few small pieces at a time, through the store."""
    step = min(max(packed.nbytes // 32, _PIECE_AT_LEAST), _PIECE_AT_MOST)
    calls: list[Any] = []
    for number, body in enumerate(packed.bodies()):
        header = [body["header"]] if "header" in body else []
        buffers = [
            memoryview(buffer).cast("B") for buffer in (*header, *body["buffers"]) if memoryview(buffer).nbytes
        ]
        sizes = [memoryview(buffer).nbytes for buffer in (*header, *body["buffers"])]
        begun = owner.begin.remote(token, number, sizes, bool(header), body.get("carried"))
        if not ray.get(begun):
            raise ZeroCopyError(
                "this process may no longer send this model: it was silent for a minute, or the owner of the name "
                "started again. Prepare the model again."
            )
        offset = 0
        for pieces in _pieces(buffers, step):
            calls.append(owner.receive.remote(token, number, offset, ray.put(pieces)))
            offset += sum(memoryview(piece).nbytes for piece in pieces)
            del pieces
            if len(calls) >= _IN_FLIGHT:
                ray.get(calls.pop(0))
        ray.get(calls)
        calls.clear()
        del body, buffers


def _pieces(buffers: list[memoryview], step: int) -> Iterator[list[Any]]:
    """Cut buffers into lists of slices, each list of at most `step` bytes."""
    pieces: list[Any] = []
    room = step
    for buffer in buffers:
        begin = 0
        while begin < buffer.nbytes:
            piece = buffer[begin : begin + room]
            pieces.append(pickle.PickleBuffer(piece))
            begin, room = begin + piece.nbytes, room - piece.nbytes
            if not room:
                yield pieces
                pieces, room = [], step
    if pieces:
        yield pieces
