"""An object graph <-> a skeleton and a list of tensors. Needs torch and Ray's pickler, but no Ray cluster.

Note [Skeletons]

`take_apart` pickles the graph with Ray's cloudpickle, which can pickle classes that are defined in a notebook. The
pickler writes a placeholder (pickle's `persistent_id`) in the place of every tensor. `put_together` replaces the
placeholders by tensors::

    model ----pickle----> skeleton: ... PERSID 0 ... PERSID 1 ... PERSID 0 ...    (a few 10 KB)
       |                                   |           |            |
       +--> tensors:  [ 0: weight, 1: bias ] <---------+            a tie is the same number twice

There are three kinds of tensors:

plain       A `torch.Tensor` or `Parameter` that is fully described by dtype, shape, stride and offset in a storage.
            The pickler replaces the tensor object by a placeholder. It is rebuilt as a view.
decorated   A tensor over one storage that has Python attributes, or is of a subclass. Its data is replaced as a plain
            tensor. Its type and attributes stay in the skeleton.
composed    Any other tensor: subclasses that wrap other tensors, quantized, sparse, ... Its `__reduce__` describes
            it, and the storages and tensors in this description are replaced.

The pickler identifies tensors and storages by object identity, never by `state_dict` keys. So ties, aliases, views,
plain attributes and containers need no special code.
"""

from __future__ import annotations

import enum
import io
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import ZeroCopyError
from .deep import is_too_deep, run_deep
from .gc_pause import pause_gc_to_import
from .imports import Import
from .modules import flatten_rnns, new_object, set_module_state
from .names import missing_name_error, pickle_modules_by_value
from .objects import new_instance, set_object_state
from .paths import too_deep_error, unpicklable_error
from .pickler import Options, Pickler
from .script.identity import RestartPickle, Scripts
from .tensors import rebuild_decorated, set_tensor_attributes
from .training import find_training, set_eval_mode

__all__ = ["Parts", "put_together", "take_apart"]

Tensor = torch.Tensor
_PACKAGE = f"{__name__.partition('.')[0]}."


class Parts(NamedTuple):
    """An object graph, taken apart.

    Attributes:
        skeleton: The pickle stream.
        tensors: The tensors that the placeholders stand for, by number.
        arrays: The buffers that other objects (numpy arrays) gave out of band.
        carried: The objects that `take_apart` left out of the skeleton, by number.
        fixed_dtype_class: The name of a class whose tensors cannot be converted to another dtype; empty if none.
        fixed_dtype: The numbers of the tensors that cannot be converted to another dtype one by one.
        tensors_without_bytes: Tensors on the meta device, and parameters of lazy modules that never ran.
        runs_constructors: Whether unpickling calls code of the objects' classes, which may read tensors.
        rnns: The RNNs whose weights cuDNN wants in one block, each after the numbers of its weights.
        imports: The modules and libraries to import before the object is put together.
        operators: The operators that must be there then.
    """

    skeleton: bytes
    tensors: list[Tensor]
    arrays: list[pickle.PickleBuffer]
    carried: list[Any]
    fixed_dtype_class: str
    fixed_dtype: frozenset[int]
    tensors_without_bytes: list[Tensor]
    runs_constructors: bool
    rnns: list[tuple[tuple[int, ...], torch.nn.RNNBase]]
    imports: list[Import]
    operators: list[str]


# ---------------------------------------------------------------- taking apart


def take_apart(
    obj: object,
    leave_out: tuple[type, ...] = (),
    objects: Sequence[object] = (),
    *,
    local_model_types: tuple[type, ...] = (),
    imports: Sequence[Import] = (),
) -> Parts:
    """Pickle `obj` into a skeleton without its tensors. Does not change `obj`.

    Args:
        obj: The root of the graph.
        leave_out: Lists instances of these types in `Parts.carried` instead of pickling them.
        objects: Lists these objects in `Parts.carried` as well.
        local_model_types: Give the types of models if the graph is put together again in this process. Classes and
            functions are then listed in `Parts.carried` as well. Unpickling a class that cloudpickle pickled by
            value would change the original class. Functions that hold a model, as in a closure, are still pickled.
        imports: The modules and libraries that the user listed.

    Raises:
        TypeError: A part cannot be pickled. The message has its attribute path.
    """
    with pickle_modules_by_value() as by_value:
        options = Options(obj, by_value, leave_out, local_model_types, bool(imports))
        try:
            return _take_apart(obj, objects, options, imports)
        except (RecursionError, pickle.PicklingError) as error:
            if not is_too_deep(error):
                raise
        try:
            return run_deep(lambda: _take_apart(obj, objects, options, imports))
        except (RecursionError, pickle.PicklingError, RuntimeError) as error:
            raise too_deep_error(obj) from error


def _take_apart(obj: object, objects: Sequence[object], options: Options, imports: Sequence[Import]) -> Parts:
    scripts = Scripts()
    definitions: dict[str, Any] = {}
    while True:
        stream = io.BytesIO()
        pickler = Pickler(stream, options, scripts, objects)
        try:
            # The operators that a script defines come first, because TorchScript needs them.
            pickler.dump(list(definitions.values()))
            pickler.dump(obj)
            pickler.note_operators()
            pickler.note_registrations()
            if pickler.definitions.keys() - definitions.keys():
                definitions.update(pickler.definitions)
                continue
            # A second pickle in the same stream, with the same memo: the modules and tensors of the first pickle that
            # `put_together` changes after unpickling.
            rnns = [module for module in pickler.modules if isinstance(module, torch.nn.RNNBase)]
            roots, single = find_training(pickler.modules)
            pickler.dump((roots, single, pickler.flagged_tensors, pickler.opaque_modules, rnns))
            pickler.check_names()
        except RestartPickle:
            scripts.restart()
        except Exception as error:
            if is_too_deep(error):
                raise

            def pickle_error(part: object) -> Exception | None:
                return Pickler(io.BytesIO(), options, Scripts(), objects).dump_error(part)

            raise unpicklable_error(obj, pickle_error, error) from error
        else:
            pickler.warn_of_unseen_changes()
            return Parts(
                stream.getvalue(),
                pickler.tensors,
                pickler.arrays,
                pickler.carried,
                pickler.fixed_dtype_class,
                frozenset(n for n, tensor in enumerate(pickler.tensors) if id(tensor) in pickler.fixed_dtype_ids),
                pickler.tensors_without_bytes,
                pickler.runs_constructors or bool(pickler.fixed_dtype_class),
                [(weights, rnn) for rnn in rnns if (weights := pickler.flat_weight_numbers(rnn))],
                list({item.name: item for item in (*pickler.imports.values(), *imports)}.values()),
                [name for name in pickler.operators if name not in definitions],
            )


# ---------------------------------------------------------------- putting together


def put_together(
    skeleton: bytes | memoryview,
    tensors: Sequence[Tensor],
    arrays: Sequence[object] = (),
    carried: Sequence[object] = (),
    *,
    name: str = "the object",
    keep_flags: bool = False,
    wait: Callable[[], None] | None = None,
) -> tuple[Any, float]:
    """Rebuild an object from its skeleton and `tensors`.

    Args:
        skeleton: The skeleton of `Parts`.
        tensors: Take the places of `Parts.tensors`.
        arrays: Take the places of `Parts.arrays`.
        carried: Take the places of `Parts.carried`.
        name: What errors call the object.
        keep_flags: Keeps train mode and `requires_grad`. By default modules are put in eval mode, and tensors get
            `requires_grad=False`. The caller sets the flags of plain tensors.
        wait: Waits until the bytes of `tensors` have arrived; called before any code that may read them.

    Returns:
        The object, and the seconds spent importing the modules of its classes. A process imports them once, which
        often takes longer than the rest.

    Raises:
        ZeroCopyError: This process does not find a module, class or function of the object.
    """
    unpickler = _Unpickler(io.BytesIO(skeleton), buffers=arrays)
    unpickler.name = name
    unpickler.tensors = tensors
    unpickler.carried = carried
    unpickler.keep_flags = keep_flags
    unpickler.wait = wait
    try:
        unpickler.load()
        obj = unpickler.load()
    except ModuleNotFoundError as error:
        raise missing_name_error(name, error.name or "?", "", error) from error
    except (ZeroCopyError, MemoryError):
        raise
    except Exception as error:
        raise _rebuild_error(name, error) from error
    roots, single, flagged, opaque, rnns = unpickler.load()
    if wait is not None:
        wait()  # eval() below may run a class's own train()
    if not keep_flags:
        _set_eval(roots, single)
        for module in opaque:  # its __reduce__ made a new module, whose flags only show now
            new_roots, new_single = find_training([module])
            _set_eval(new_roots, new_single)
            flagged.extend(module.parameters())
        for tensor in flagged:
            if tensor.requires_grad:
                tensor.requires_grad = False  # lazy tensors have no requires_grad_()
    if rnns:
        flatten_rnns(rnns, tensors)
    return obj, unpickler.import_seconds


def _rebuild_error(name: str, error: Exception) -> ZeroCopyError:
    """Return the error for code of the model's classes that failed while the model was unpickled."""
    return ZeroCopyError(
        f"{name} cannot be rebuilt in this process ({type(error).__name__}: {error}). The code of one of its classes "
        f"failed; the traceback above shows which. Classes of a script are made again in the worker before their "
        f"attributes are set: define such a class in a module that workers can import. A class whose objects need "
        f"arguments needs a __reduce__ that gives them."
    )


def _set_eval(roots: Iterable[Any], single: Iterable[Any]) -> None:
    for root in roots:
        set_eval_mode(root)
    for module in single:
        module.training = False


class _Unpickler(pickle.Unpickler):
    name: str
    tensors: Sequence[Tensor]
    carried: Sequence[object]
    keep_flags: bool
    wait: Callable[[], None] | None
    import_seconds = 0.0

    def find_class(self, module: str, name: str) -> Any:
        begin = time.perf_counter()
        try:
            with pause_gc_to_import(module):
                found = super().find_class(module, name)
        except Exception as error:
            raise missing_name_error(self.name, module, name, error) from error
        finally:
            self.import_seconds += time.perf_counter() - begin
        if self.wait is not None and not _is_safe_before_wait(found):
            self.wait()
            self.wait = None
        return found

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is int:
            return self.tensors[pid]
        if pid[0] == "carried":
            return self.carried[pid[1]]
        if pid[0] == "keep_flags":
            return self.keep_flags
        if pid[0] == "global":
            return self.find_class(*pid[1:])
        _, number, dtype = pid
        storage = self.tensors[number].untyped_storage()
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


# `new_instance` and `set_object_state` run code of a class only if the class itself is not safe.
_SAFE_FUNCTIONS = (
    new_object,
    set_module_state,
    rebuild_decorated,
    set_tensor_attributes,
    new_instance,
    set_object_state,
)


def _is_safe_before_wait(found: Any) -> bool:
    """Tell whether unpickling with this class, function or constant cannot read a tensor.

    Valid only if not `Parts.runs_constructors`. Unpickling then makes empty objects and sets their state. The only
    functions it calls are those of this package and of cloudpickle.
    """
    if not isinstance(found, type):
        module = getattr(found, "__module__", None) or ""
        is_called = module.startswith(("ray.cloudpickle", _PACKAGE))
        return not is_called or any(found is known for known in _SAFE_FUNCTIONS)
    known = str(found.__module__).startswith(("torch.nn.modules.", "builtins", "collections", _PACKAGE))
    if known or issubclass(found, (enum.Enum, Tensor)):
        return True
    has_setattr = found.__setattr__ not in (object.__setattr__, torch.nn.Module.__setattr__)
    return (
        found.__new__ is object.__new__
        and getattr(found, "__setstate__", None) in (None, torch.nn.Module.__setstate__)
        and getattr(found, "__getattr__", None) in (None, torch.nn.Module.__getattr__)
        and found.__hash__ in (None, object.__hash__)  # called where it is the key of a dict
        and not (has_setattr and any("__slots__" in kind.__dict__ for kind in found.__mro__))
    )
