"""Keep loaded models valid after `ray.shutdown()` in a process that goes on."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import ray
import ray._private.worker

from .._pages import views
from ..errors import warn
from .ref import format_bytes, release_references

__all__ = ["watch_session"]

_KEY = "ray_zerocopy"
_is_exiting = False


class _EndOfSession:
    """An entry in a dictionary that `ray.shutdown()` clears while Ray is still connected."""


def watch_session() -> None:
    """Make `ray.shutdown()` copy the pages of living views before the store can reuse these pages.

    Ray has no hook for this, so the deletion of an entry in one of its dictionaries is used. If a version of Ray
    lacks that dictionary, this function does nothing.
    """
    worker = ray._private.worker.global_worker
    contexts: Any = getattr(worker, "serialization_context_map", None)
    if not isinstance(contexts, dict) or _KEY in contexts or worker.mode != ray.SCRIPT_MODE:
        return
    end = contexts.setdefault(_KEY, _EndOfSession())
    weakref.finalize(end, _leave_session).atexit = False
    # Handlers run in reverse order, so this one runs before Ray's. A process that exits needs no copies.
    atexit.unregister(_note_exit)
    atexit.register(_note_exit)


def _note_exit() -> None:
    global _is_exiting
    _is_exiting = True


def _leave_session() -> None:
    if _is_exiting:
        return
    release_references()
    failed = views.detach_views()
    if failed:
        warn(
            f"ray.shutdown() ends the session, and {format_bytes(failed)} of loaded models could not be copied into "
            f"this process, because too little memory is available. Do not use these models any more: other data may "
            f"replace their weights. Delete the models before ray.shutdown()."
        )


views.view_hooks.append(watch_session)
