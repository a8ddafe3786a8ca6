"""Kinds of objects that belong to a process: locks, queues, thread pools, weak references, files, generators.

What has no state besides being unused arrives new. What has a state that cannot travel is refused with its remedy.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextvars
import ctypes
import functools
import io
import queue
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from typing import Any

from . import deep, kinds
from .kinds import Refusal, Walk
from .modules import new_object

__all__ = ["new_thread_pool"]

reduces = functools.partial(kinds.reduces, of_process=True)

# ---------------------------------------------------------------- locks and queues


@reduces(type(threading.Lock()))
def _reduce_lock(lock: Any, walk: Walk) -> Any:
    return threading.Lock, ()  # unlocked: no thread of the worker holds it


@reduces(type(threading.RLock()))
def _reduce_rlock(lock: Any, walk: Walk) -> Any:
    return threading.RLock, ()


@reduces(threading.Condition)
def _reduce_condition(condition: Any, walk: Walk) -> Any:
    return new_object, (type(condition),), {**condition.__dict__, "_waiters": collections.deque()}


@reduces(threading.Semaphore)
def _reduce_semaphore(semaphore: Any, walk: Walk) -> Any:
    state = dict(semaphore.__dict__)
    if "_initial_value" in state:  # of a BoundedSemaphore: no thread of the worker holds it
        state["_value"] = state["_initial_value"]
    elif not state.get("_value", 1):
        raise Refusal("it is taken", "Release it before sharing, or create it in the worker, on first use.")
    return new_object, (type(semaphore),), state


@reduces(queue.SimpleQueue)
def _reduce_simple_queue(items: Any, walk: Walk) -> Any:
    if items.empty():
        return queue.SimpleQueue, ()
    raise Refusal(
        f"it holds {items.qsize()} items, which cannot be read without taking them out",
        "Empty it before sharing, or use a queue.Queue, whose items travel.",
    )


@reduces(threading.local)
def _reduce_thread_local(local: Any, walk: Walk) -> Any:
    # Pickling very deep objects runs in a thread of its own, which does not see the values of the caller's thread.
    if type(local) is threading.local and not local.__dict__ and not deep.is_deep_thread():
        return threading.local, ()
    raise Refusal(
        "its values belong to threads of this process",
        "Set the values in the worker, in the thread that reads them, or use a plain attribute.",
    )


# ---------------------------------------------------------------- context variables


@reduces(contextvars.ContextVar)
def _reduce_context_variable(variable: contextvars.ContextVar[Any], walk: Walk) -> Any:
    missing = object()
    value = contextvars.copy_context().get(variable, missing)
    try:
        default = contextvars.Context().run(variable.get)
    except LookupError:
        default = missing
    if value is not missing and value is not default:
        raise Refusal(
            "its value belongs to a context of this process",
            "Set the value in the worker, where it is read, or give the variable a default.",
        )
    if default is missing:
        return contextvars.ContextVar, (variable.name,)
    return _rebuild_context_variable, (variable.name, default)


def _rebuild_context_variable(name: str, default: Any) -> contextvars.ContextVar[Any]:
    return contextvars.ContextVar(name, default=default)


# ---------------------------------------------------------------- threads and processes


@reduces(concurrent.futures.ThreadPoolExecutor)
def _reduce_thread_pool(pool: Any, walk: Walk) -> Any:
    if type(pool) is not concurrent.futures.ThreadPoolExecutor or pool._shutdown:
        raise Refusal("it is shut down or of a subclass", "Create the thread pool in the worker, on first use.")
    if pool._work_queue.qsize():
        raise Refusal(
            f"{pool._work_queue.qsize()} of its tasks have not started",
            "Wait for them before sharing: call result() of each future.",
        )
    if hasattr(pool, "_create_worker_context"):  # from Python 3.14 on
        context = pool._create_worker_context()
        initializer, arguments = context.initializer, context.initargs
    else:
        initializer, arguments = pool._initializer, pool._initargs
    return new_thread_pool, (pool._max_workers, pool._thread_name_prefix, initializer, arguments)


def new_thread_pool(size: int, prefix: str, initializer: Any, arguments: Any) -> Any:
    return concurrent.futures.ThreadPoolExecutor(size, prefix, initializer, arguments)


@reduces(concurrent.futures.Executor)
def _refuse_executor(pool: Any, walk: Walk) -> Any:
    return _refuse(pool, "it starts processes of this process", "Create the executor in the worker, on first use.")


@reduces(concurrent.futures.Future)
def _reduce_future(future: Any, walk: Walk) -> Any:
    if future.done():
        return NotImplemented
    return _refuse(future, "it has no result yet", "Call its result() before sharing.")


@reduces(threading.Thread)
def _refuse_thread(thread: Any, walk: Walk) -> Any:
    return _refuse(thread, "it runs in this process", "Start the thread in the worker, on first use.")


@reduces(subprocess.Popen)
def _refuse_process(process: Any, walk: Walk) -> Any:
    return _refuse(process, "it is a child of this process", "Start the program in the worker, on first use.")


def _refuse(obj: Any, why: str, remedy: str) -> Any:
    """Raise Refusal, unless the object is of a user's class that defines how to pickle it."""
    for base in type(obj).__mro__:
        if base.__module__.partition(".")[0] in sys.stdlib_module_names:
            break
        if {"__reduce__", "__reduce_ex__", "__getstate__"} & base.__dict__.keys():
            return NotImplemented
    raise Refusal(why, remedy)


# ---------------------------------------------------------------- shared libraries


@reduces(ctypes.CDLL)
def _reduce_library(library: Any, walk: Walk) -> Any:
    if type(library) in (ctypes.CDLL, ctypes.PyDLL):
        functions = {name: f for name, f in vars(library).items() if isinstance(f, ctypes._CFuncPtr)}  # type: ignore[attr-defined]
        signatures = [(name, f.argtypes, f.restype, f.errcheck) for name, f in functions.items()]
        return type(library), (library._name,), signatures, None, None, _set_signatures
    return _refuse(library, "it is loaded in this process", "Load the library in the worker, on first use.")


def _set_signatures(library: Any, signatures: list[tuple[Any, ...]]) -> None:
    for name, argtypes, restype, errcheck in signatures:
        function = getattr(library, name)
        if argtypes is not None:
            function.argtypes = argtypes
        function.restype = restype
        if errcheck is not None:
            function.errcheck = errcheck


# ---------------------------------------------------------------- files and generators


@reduces(tempfile.TemporaryDirectory)
def _refuse_temporary_directory(directory: Any, walk: Walk) -> Any:
    return _refuse(
        directory,
        f"this process deletes its folder {directory.name!r} when it ends",
        "Create the directory in the worker, on first use.",
    )


def _reduce_file(file: Any, walk: Walk) -> Any:
    for name in ("stdin", "stdout", "stderr"):
        if file is getattr(sys, name) or file is getattr(sys, f"__{name}__"):
            return getattr, (sys, name)
    path = getattr(file, "name", None)
    state = "closed" if file.closed else "open in this process" + (f" at {path!r}" if isinstance(path, str) else "")
    return _refuse(file, f"it is {state}", "Keep the path, and open the file in the worker, on first use.")


_FILES = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair, io.TextIOWrapper)
for _kind in _FILES:
    reduces(_kind)(_reduce_file)


@reduces(types.GeneratorType)
def _refuse_generator(generator: Any, walk: Walk) -> Any:
    frame = generator.gi_frame
    place = f"it waits at line {frame.f_lineno} of {generator.__qualname__}" if frame else "it has ended"
    raise Refusal(place, "Keep the function that makes the generator, or a list of its items.")


@reduces(types.CoroutineType)
@reduces(types.AsyncGeneratorType)
def _refuse_coroutine(coroutine: Any, walk: Walk) -> Any:
    raise Refusal("it belongs to an event loop of this process", "Keep the function that makes it.")


# ---------------------------------------------------------------- weak references


@reduces(weakref.ref)
def _reduce_weak_reference(reference: Any, walk: Walk) -> Any:
    kind, referent = type(reference), reference()
    if referent is None:
        return _dead_reference, ()
    if kind not in (weakref.ref, weakref.WeakMethod, weakref.KeyedRef) and (
        getattr(reference, "__dict__", None)
        or "__slots__" in vars(kind)
        or {"__new__", "__init__"} & vars(kind).keys()
    ):
        raise Refusal("it is of a subclass of weakref.ref with a state of its own", "Hold a weakref.ref.")
    _check_held(referent.__self__ if isinstance(reference, weakref.WeakMethod) else referent, walk)
    if kind is weakref.ref and reference.__callback__ is not None:
        return kind, (referent, reference.__callback__)
    return kind, (referent,)


def _check_held(referent: Any, walk: Walk) -> None:
    if not walk.is_reachable(referent):
        kind = type(referent)
        raise Refusal(
            f"its {kind.__module__}.{kind.__qualname__} is not a part of the object that is shared, so nothing would "
            f"keep it alive in the worker",
            "Hold the object itself, or set the weak reference in the worker.",
        )


class _Gone:
    """Be deleted at once."""


def _dead_reference() -> weakref.ref[Any]:
    return weakref.ref(_Gone())


@reduces(weakref.finalize)
def _reduce_finalizer(finalizer: Any, walk: Walk) -> Any:
    if not finalizer.alive:
        return NotImplemented
    raise Refusal(
        "it runs when an object of this process ends", "Create it in the worker: weakref.finalize(object, function)."
    )


@reduces(weakref.WeakValueDictionary)
def _reduce_weak_values(values: Any, walk: Walk) -> Any:
    held = [(key, value) for key, value in values.items() if walk.is_reachable(value)]
    return _new_weak, (type(values), weakref.WeakValueDictionary), (_own(values), held), None, None, _set_weak


@reduces(weakref.WeakKeyDictionary)
def _reduce_weak_keys(values: Any, walk: Walk) -> Any:
    held = [(key, value) for key, value in values.items() if walk.is_reachable(key)]
    return _new_weak, (type(values), weakref.WeakKeyDictionary), (_own(values), held), None, None, _set_weak


@reduces(weakref.WeakSet)
def _reduce_weak_set(items: Any, walk: Walk) -> Any:
    held = [item for item in items if walk.is_reachable(item)]
    return _new_weak, (type(items), weakref.WeakSet), (_own(items), held), None, None, _set_weak


def _own(container: Any) -> dict[str, Any]:
    """Return the attributes that a user's class, or a user, gave a weak container."""
    base = next(kind for kind in type(container).__mro__ if kind.__module__ in ("weakref", "_weakrefset"))
    return {name: value for name, value in vars(container).items() if name not in vars(base())}


def _new_weak(kind: Any, base: Any) -> Any:
    """Make an empty weak container without the constructor of its class, which may need arguments."""
    container = kind.__new__(kind)
    base.__init__(container)
    return container


def _set_weak(container: Any, state: tuple[dict[str, Any], list[Any]]) -> None:
    own, held = state
    container.__dict__.update(own)
    if isinstance(container, weakref.WeakSet):
        weakref.WeakSet.update(container, held)
    else:
        for key, value in held:
            container[key] = value
