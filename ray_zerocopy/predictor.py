"""`ZeroCopyPredictor`: the only file that knows Ray Data's conventions."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import logging
import os
import types
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from . import actor
from ._device import DeviceLike
from ._store import Loaded, ModelRef, format_bytes
from .arrow import tensor_to_column

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ZeroCopyPredictor"]

logger = logging.getLogger(__package__)
_bindings = itertools.count(1)


class ZeroCopyPredictor:
    """Base class for a callable class that Ray Data runs on an actor pool, with a model loaded without a copy.

    What happens to a subclass in `ds.map_batches`:

    1. The driver shares the model, `model_ref = prepare_model_for_actors(model)`, and hands it over in one of
       three ways, the first that is there counting: `fn_constructor_kwargs={"model_ref": model_ref}`;
       `MyPredictor.using(model_ref)` in place of the class; a class attribute `model_ref`, which works for
       classes in `__main__` or a notebook (Ray finds those of a module by name, so an attribute set at run
       time is lost).
    2. In each actor `__init__` loads the model and logs one line that says what, how fast, and what is shared.
       `self.model` and `self.device` are then there. A subclass with an `__init__` calls `super().__init__()`.
    3. For each batch, under `torch.inference_mode()`: the batch, in whatever format Ray Data gives it, becomes
       a `pyarrow.Table`; `preprocess` turns it into the model's inputs, which move to `self.device`; `predict`
       calls the model; its outputs move to the host; `postprocess` makes of them what Ray Data gets.

    Example:
        >>> from ray_zerocopy.arrow import column_to_tensor
        >>> class Doubled(ZeroCopyPredictor):
        ...     def preprocess(self, batch):
        ...         return column_to_tensor(batch, "x")[:, None]
        ...
        ...     def postprocess(self, outputs, batch):
        ...         return batch.append_column("y", pa.array(outputs[:, 0].numpy()))
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> predictor = Doubled(actor.prepare_model_for_actors(model))
        >>> predictor(pa.table({"x": pa.array([1.0, 2.0], pa.float32())})).column("y").to_pylist()
        [2.0, 4.0]
    """

    model_ref: ClassVar[ModelRef | None] = None

    model: Any
    """The loaded model."""
    device: torch.device
    """Where the model is, and where `predict` gets its inputs."""
    loaded: Loaded
    """How the load went: seconds, bytes shared and private, whether writes are isolated."""

    def __init__(
        self,
        model_ref: ModelRef | None = None,
        *,
        device: DeviceLike = None,
        require_isolation: bool = False,
    ) -> None:
        """Load the model; the arguments are those of `load_model_in_actor`.

        Raises:
            TypeError: No model was given, it is not a `ModelRef`, or `preprocess` or `postprocess` is not written.
            ModelLostError: The model is no longer in the store.
            ValueError: The device is unknown, or not this worker's.
        """
        _check_written(type(self))
        if model_ref is None:
            model_ref = self.model_ref
        if model_ref is None:
            raise TypeError(_no_model(type(self)))
        self.loaded = actor.load(model_ref, device, require_isolation=require_isolation)
        self.model = self.loaded.model
        self.device = self.loaded.device
        importing = self.loaded.import_seconds
        _log(
            f"{_name(type(self))}: {model_ref.class_name} loaded in {self.loaded.seconds * 1000:.1f} ms "
            f"{f'(and its classes imported in {importing:.1f} s) ' if importing >= 0.1 else ''}on "
            f"{self.device}: {format_bytes(self.loaded.shared)} shared, "
            f"{format_bytes(self.loaded.private + model_ref.carried_nbytes)} private, "
            f"writes {'isolated' if self.loaded.isolated else 'NOT isolated'} (pid {os.getpid()})"
        )

    @classmethod
    def using(cls, model_ref: ModelRef, /, **options: Any) -> type[Self]:
        """Return this class with its model and options bound, for `map_batches` to take as it is.

        Args:
            model_ref: What `prepare_model_for_actors` returned.
            options: Keyword arguments for the constructor, the subclass's own among them.

        Returns:
            A subclass of the same name, which pickles by value and so keeps what is bound to it.

        Raises:
            TypeError: `model_ref` is not a `ModelRef`, `preprocess` or `postprocess` is not written, or the
                constructor has no such option.
        """
        _check_written(cls)
        if not isinstance(model_ref, ModelRef):
            raise TypeError(
                f"{_name(cls)}.using needs a ModelRef, not {type(model_ref).__qualname__}. Make one with "
                f"model_ref = prepare_model_for_actors(model)."
            )
        signature = inspect.signature(cls)
        accepts = signature.parameters.values()
        # A constructor that takes the model gets it; one that does not finds it as the class attribute.
        named = "model_ref" in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in accepts)
        bound = {"model_ref": model_ref, **options} if named else options
        try:
            signature.bind(**bound)
        except TypeError as error:
            raise TypeError(f"{_name(cls)}.using: the constructor of {_name(cls)} {error}.") from None

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            given = signature.bind_partial(*args).arguments  # fn_constructor_args count more than what is bound
            cls.__init__(self, *args, **{k: v for k, v in bound.items() if k not in given} | kwargs)

        members: dict[str, Any] = {
            "model_ref": model_ref,
            "__init__": __init__,
            "__module__": cls.__module__,
            # Not the class's own: Ray Data tells the instances on an actor apart by it, and a chain may use one
            # class with two models. The operator shows __name__.
            "__qualname__": f"{cls.__qualname__}.using_{next(_bindings)}",
            "__doc__": cls.__doc__,
        }
        return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))

    # ------------------------------------------------------------ for subclasses to write

    def preprocess(self, batch: pa.Table) -> Any:
        """Turn a batch into the model's inputs: a tensor, or a mapping from argument name to tensor.

        Args:
            batch: The rows that Ray Data gives, as Arrow.

        Returns:
            What `predict` gets. Tensors in it, also inside lists, tuples and mappings, are moved to the device.
        """
        raise NotImplementedError

    def predict(self, inputs: Any) -> Any:
        """Call the model: with a mapping's items as keyword arguments, with anything else as the one argument.

        Override it to call another method, or to reduce large outputs before they leave the device.
        """
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(inputs)

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        """Turn the model's outputs into the rows that go on.

        Args:
            outputs: What `predict` returned, tensors moved to the host.
            batch: The rows that `preprocess` got.

        Returns:
            A `pyarrow.Table` or `RecordBatch`, a `pandas.DataFrame`, or a mapping from column name to array,
            tensor or list, all of one length; or a generator of such. Rows need not be as many as came in.
        """
        raise NotImplementedError

    # ------------------------------------------------------------ for Ray Data to call

    def __call__(self, batch: Any) -> Any:
        """Take one batch through `preprocess`, `predict` and `postprocess`."""
        name = _name(type(self))
        table = _to_arrow(batch, name)
        with torch.inference_mode():
            inputs = _to_device(self.preprocess(table), self.device)
            outputs = _to_device(self.predict(inputs), torch.device("cpu"))
            rows = self.postprocess(outputs, table)
            if inspect.isgenerator(rows):
                return _each_to_rows(rows, name)
            return _to_rows(rows, name)


# ---------------------------------------------------------------- what a class is told that is not complete


def _written(cls: type) -> type:
    """Return the class that the user wrote: Ray Data runs a subclass of its own."""
    return next((c for c in cls.__mro__ if not c.__module__.startswith("ray.")), cls)


def _name(cls: type) -> str:
    return _written(cls).__name__


def _check_written(cls: type[ZeroCopyPredictor]) -> None:
    for method, signature in (("preprocess", "(self, batch)"), ("postprocess", "(self, outputs, batch)")):
        if getattr(cls, method) is getattr(ZeroCopyPredictor, method):
            raise TypeError(
                f"{_name(cls)}.{method} is not written. A subclass of ZeroCopyPredictor defines {method}{signature}."
            )


def _no_model(cls: type[ZeroCopyPredictor]) -> str:
    name = _name(cls)
    return (
        f"{name} got no model. Give ds.map_batches either {name}.using(model_ref), or {name} with "
        f'fn_constructor_kwargs={{"model_ref": model_ref}}. A class attribute {name}.model_ref that was set at '
        f"run time does not reach the workers if {name} is in an importable module ({_written(cls).__module__}): Ray "
        f"sends such a class by name only."
    )


# ---------------------------------------------------------------- batches in and out


def _to_arrow(batch: Any, name: str) -> pa.Table:
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, pa.RecordBatch):
        return pa.Table.from_batches([batch])
    from ray.data.block import BlockAccessor  # 0.7 s to import; here it is imported already

    if isinstance(batch, Mapping):
        try:
            return BlockAccessor.batch_to_arrow_block(dict(batch))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise TypeError(
                f"{name} got a mapping that is no batch of columns ({error}). It is for ds.map_batches, which "
                f"gives many rows at a time, not for ds.map or ds.flat_map."
            ) from error
    if _is_pandas(batch):
        return BlockAccessor.for_block(batch).to_arrow()
    raise TypeError(
        f"{name} got a batch of type {type(batch).__module__}.{type(batch).__qualname__}, which is none of Ray "
        f"Data's formats. Use it in ds.map_batches, best with batch_format='pyarrow'."
    )


def _is_pandas(value: Any) -> bool:
    return type(value).__name__ == "DataFrame" and type(value).__module__.split(".")[0] == "pandas"


def _to_device(values: Any, device: torch.device) -> Any:
    """Return `values` with every tensor in it on `device`; what holds tensors keeps its type.

    Looks into lists, tuples, mappings and dataclasses; anything else is left as it is.
    """
    if isinstance(values, torch.Tensor):
        return values if values.device == device else values.to(device)  # copy: a device has memory of its own
    if isinstance(values, Mapping):
        moved = {key: _to_device(value, device) for key, value in values.items()}
        if all(moved[key] is value for key, value in values.items()):
            return values
        if type(values) is dict or not isinstance(values, MutableMapping):
            return moved
        result = copy.copy(values)
        for key, value in moved.items():
            result[key] = value
        return result
    if isinstance(values, (list, tuple)):
        items = [_to_device(value, device) for value in values]
        if all(new is old for new, old in zip(items, values, strict=True)):
            return values
        return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.init}
        changed = {key: _to_device(value, device) for key, value in fields.items()}
        if any(changed[key] is not value for key, value in fields.items()):
            return dataclasses.replace(values, **changed)
    return values


def _each_to_rows(parts: Iterator[Any], name: str) -> Iterator[Any]:
    while True:
        with torch.inference_mode():
            try:
                part = next(parts)
            except StopIteration:
                return
            rows = _to_rows(part, name)
        yield rows


def _to_rows(rows: Any, name: str) -> Any:
    """Return what Ray Data accepts, or say what is wrong with what `postprocess` returned."""
    if isinstance(rows, pa.Table) or _is_pandas(rows):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"{name}.postprocess returned {_described(rows)}. Return a pyarrow.Table, or a mapping from column "
            f"name to array or tensor, such as {{'prediction': outputs}}."
        )
    columns: dict[str, Any] = {}
    for key, value in rows.items():
        if str(key) in columns:
            raise ValueError(f"{name}.postprocess returned two columns named '{key}'. Give each a name of its own.")
        columns[str(key)] = _to_column(value, f"{name}.postprocess returned {_described(value)} as column '{key}'")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(
            f"{name}.postprocess returned columns of unequal length: {lengths}. Every column needs one entry a row."
        )
    return pa.table(columns)


def _to_column(values: Any, what: str) -> Any:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if isinstance(values, torch.Tensor) and values.ndim > 0:
        return tensor_to_column(values)
    if isinstance(values, list) and values and all(isinstance(value, torch.Tensor) for value in values):
        return tensor_to_column(values) if values[0].ndim else tensor_to_column(torch.stack(values))
    sequence = isinstance(values, (list, tuple, range)) or type(values).__name__ in ("Series", "Index")
    if not (sequence or (isinstance(values, np.ndarray) and values.ndim > 0)):
        raise TypeError(f"{what}. A column is an array, a tensor or a list with one entry a row.")
    from ray.data.block import BlockAccessor

    return BlockAccessor.batch_to_arrow_block(
        {"column": np.asarray(values) if not sequence else list(values)}
    ).column(0)


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__module__}.{type(value).__qualname__}{shape}" if value is not None else "None"


# ---------------------------------------------------------------- the log


def _log(line: str) -> None:
    """Log at INFO where somebody listens; else to standard error, which Ray shows in the driver."""
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.info(line)
