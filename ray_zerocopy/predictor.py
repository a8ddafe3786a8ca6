"""`ZeroCopyPredictor`: the only file that knows Ray Data's conventions."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import pyarrow as pa
import torch

from . import actor
from ._batch import defaults
from ._batch.cores import describe_pool, usable_cores
from ._batch.options import OPTIONS, Columns, Options, check_options
from ._batch.run import BatchRunner
from ._batch.subclass import bind, check_complete, class_name, no_model_message, overridden_methods
from ._batch.totals import Totals
from ._batch.warmup import Start, describe_start, is_constructed_by, warm_up
from ._device.choose import DeviceLike
from ._model import startup
from ._store.ref import Loaded, ModelRef, check, format_bytes
from .errors import log

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ZeroCopyPredictor"]

_AS_THE_CLASS: Any = type("", (), {"__repr__": lambda self: "<as the class says>"})()


class ZeroCopyPredictor(Options):
    """Base class for callable classes that Ray Data runs on an actor pool, with a model loaded without a copy.

    The life of a subclass in `ds.map_batches`:

    1. The driver shares the model: `model_ref = prepare_model_for_actors(model)`. The subclass gets the handle in one
       of three ways. If several are used, the first in this list wins:
       `fn_constructor_kwargs={"model_ref": model_ref}`; `MyPredictor.using(model_ref)` in place of the class; a class
       attribute `model_ref`. The attribute works only for classes in `__main__` or a notebook, because Ray pickles
       the classes of a module by name.
    2. In each actor, `__init__` loads the model and logs one line: what, how fast, and how much is shared.
       `self.model` and `self.device` exist from then on. A subclass with an `__init__` calls `super().__init__()`.
    3. Each batch runs under `torch.inference_mode()`, unless `inference_mode=False`. It becomes a `pyarrow.Table`,
       whatever the batch format. `preprocess` turns it into the model's inputs, which are copied to `self.device`.
       `predict` calls the model.
       Its outputs are copied to the host. `postprocess` turns them into rows. All run in the thread in which Ray Data
       calls. With `micro_batch_size` or `sort_by`, `predict` runs in a second thread, so that the model works on one
       part of the batch while `preprocess` and `postprocess`, in turns, work on others. If Ray Data calls in several
       threads, one call of `predict` runs at a time, and one call of the other methods.
    4. The predictor logs where the time went: after the first batch, then less and less often up to once a minute,
       and when the actor ends. `self.totals` has the numbers. `ray.util.metrics` gets them as `ray_zerocopy_*`, with
       the tag `predictor`.

    Ray Data restarts a crashed worker and retries its batch indefinitely. Until Ray 2.63,
    `ds.map_batches(..., max_restarts=3, max_task_retries=3)` limits that.

    `input_columns` replaces `preprocess`, and `output_column` replaces `postprocess`. All options below can be class
    attributes, options of `using`, or keyword arguments of the constructor. The constructor overrides `using`, and
    `using` overrides the class.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> model_ref = actor.prepare_model_for_actors(model)
        >>> table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0]), 1)})
        >>> predictor = ZeroCopyPredictor.using(model_ref, input_columns=["x"], output_column="y")()
        >>> predictor(table).column("y").combine_chunks().to_numpy_ndarray()
        array([[2.],
               [4.]], dtype=float32)

        The same with methods:

        >>> from ray_zerocopy.arrow import column_to_tensor
        >>> class Doubled(ZeroCopyPredictor):
        ...     def preprocess(self, batch):
        ...         return column_to_tensor(batch, "x")[:, None]
        ...
        ...     def postprocess(self, outputs, batch):
        ...         return batch.append_column("y", pa.array(outputs[:, 0].numpy()))
        >>> predictor = Doubled(model_ref)
        >>> predictor(pa.table({"x": pa.array([1.0, 2.0], pa.float32())})).column("y").to_pylist()
        [2.0, 4.0]
    """

    model_ref: ClassVar[ModelRef | None] = None

    model: Any
    """The loaded model."""
    device: torch.device
    """The device of the model, and of the inputs of `predict`."""
    loaded: Loaded
    """Facts of the load: seconds, bytes shared and private, whether writes are isolated."""
    totals: Totals
    """Seconds by stage, batches and rows since the load; printable."""

    def __init__(
        self,
        model_ref: ModelRef | None = None,
        *,
        device: DeviceLike = None,
        require_isolation: bool = False,
        timeout: float | None = None,
        input_columns: Columns | None = _AS_THE_CLASS,
        output_column: str | Mapping[Any, str] | None = _AS_THE_CLASS,
        keep_columns: bool | str | Sequence[str] = _AS_THE_CLASS,
        dtype: torch.dtype | None = _AS_THE_CLASS,
        compile: bool | Mapping[str, Any] = _AS_THE_CLASS,
        warmup: pa.Table | Mapping[str, Any] | Callable[..., Any] | None = _AS_THE_CLASS,
        inference_mode: bool = _AS_THE_CLASS,
        sort_by: str | Callable[[pa.Table], Any] | None = _AS_THE_CLASS,
        micro_batch_size: int | Literal["auto"] | None = _AS_THE_CLASS,
        micro_batch_tokens: int | None = _AS_THE_CLASS,
        preserve_order: bool = _AS_THE_CLASS,
        concurrent_stages: bool = _AS_THE_CLASS,
        on_error: Literal["raise", "null"] = _AS_THE_CLASS,
        error_column: str | None = _AS_THE_CLASS,
    ) -> None:
        """Load the model.

        Args:
            model_ref: What `prepare_model_for_actors` returned; by default the class attribute.
            device: As for `load_model_in_actor`.
            require_isolation: As for `load_model_in_actor`.
            timeout: As for `load_model_in_actor`.
            input_columns: Overrides the class attribute of this name, like each option that follows.
            output_column: As above.
            keep_columns: As above.
            dtype: As above.
            compile: As above.
            warmup: As above.
            inference_mode: As above.
            sort_by: As above.
            micro_batch_size: As above.
            micro_batch_tokens: As above.
            preserve_order: As above.
            concurrent_stages: As above.
            on_error: As above.
            error_column: As above.

        Raises:
            TypeError: No `ModelRef` was given, a method is missing, or an option has the wrong type.
            ModelLostError, ModelTimeoutError: The model is not in the store, or did not arrive within `timeout`.
            ValueError: The device is not this worker's, `dtype` would cast weights, or two outputs have one name.
        """
        given = locals()
        for option in (name for name in OPTIONS if given[name] is not _AS_THE_CLASS):
            setattr(self, option, given[option])
        check_complete(self, type(self), ZeroCopyPredictor)
        check_options(self, class_name(type(self)))
        model_ref = self.model_ref if model_ref is None else model_ref
        if model_ref is None:
            raise TypeError(no_model_message(type(self)))
        self._load(model_ref, device, require_isolation, timeout)
        if is_constructed_by(type(self), ZeroCopyPredictor):
            self.warm_up()

    def _load(self, model_ref: ModelRef, device: DeviceLike, require_isolation: bool, timeout: float | None) -> None:
        cls = type(self)
        name = class_name(cls)
        self.loaded = loaded = actor.load_one(model_ref, device, require_isolation=require_isolation, timeout=timeout)
        self.model, self.device = loaded.model, loaded.device
        dtypes = defaults.plan_dtypes(self.model, self.dtype, self.input_columns is not None, name)
        if self.compile:
            defaults.compile_model(self.model, self.compile, name)
        private = loaded.private + model_ref.carried_nbytes
        self.totals = Totals(name, loaded.seconds, loaded.shared, private)
        weakref.finalize(self, _log_totals, self.totals)
        self._new_runner = functools.partial(
            BatchRunner,
            overridden=overridden_methods(cls, ZeroCopyPredictor),
            name=name,
            device=self.device,
            dtypes=dtypes,
            copy_streams=self.micro_batch_size is not None or self.sort_by is not None,
            few_shapes=bool(self.compile),
            concurrent_stages=self.concurrent_stages,
            inference_mode=self.inference_mode,
        )
        self._runner = self._new_runner(totals=self.totals)
        imports = startup.import_seconds() + loaded.import_seconds
        self._start = Start(startup.process_seconds(), imports, loaded.seconds)
        log(f"{_describe_load(name, model_ref, loaded, private)}; {describe_start(self._start)}")

    def warm_up(self) -> None:
        """Take the batch of `warmup` through the three methods. The constructor calls this method."""
        name = class_name(type(self))
        if self.warmup is not None:
            runner = self._new_runner(totals=Totals(name, 0.0, 0, 0, metrics=False))
            start, rows = warm_up(self, runner, name, self._start)
            log(f"{name}: warm with {rows} rows (pid {os.getpid()}); {describe_start(start)}")

    @classmethod
    def using(cls, model_ref: ModelRef, **options: Any) -> type[Self]:
        """Return this class with its model and options bound, for `map_batches` to take as it is.

        Args:
            model_ref: What `prepare_model_for_actors` returned.
            options: The options of this class, and keyword arguments for the subclass's constructor.

        Returns:
            A subclass of the same name. It pickles by value, so it keeps what is bound.

        Raises:
            TypeError: `model_ref` is not a `ModelRef`; `preprocess` or `postprocess` is neither written nor replaced
                by an option (classes that define `__init__` are validated when the actor starts); an option does not
                exist or has the wrong type.
            ModelLostError: The handle is from another Ray session.
        """
        check(model_ref)
        return cast("type[Self]", bind(cls, ZeroCopyPredictor, model_ref, options))

    def __reduce__(self) -> Any:
        raise TypeError(
            f"an instance of {class_name(type(self))} cannot be pickled: it has a loaded model and threads. Pass the "
            f"class, and each worker makes an instance: ds.map_batches({class_name(type(self))}.using(model_ref))."
        )

    # ------------------------------------------------------------ for subclasses to write

    def preprocess(self, batch: pa.Table) -> Any:
        """Turn a batch into the model's inputs: a tensor, or a mapping from argument name to tensor.

        The default reads `input_columns`. The tensors are private views of the batch, copy-on-write: a model that
        writes to its inputs copies the pages that it writes, and never changes the dataset.

        Args:
            batch: The rows that Ray Data gives, as Arrow.

        Returns:
            The inputs of `predict`. Tensors in them, also in lists, tuples and mappings, are copied to the device.
        """
        assert self.input_columns is not None
        return defaults.columns_to_inputs(batch, self.input_columns, class_name(type(self)))

    def predict(self, inputs: Any) -> Any:
        """Call the model.

        A mapping becomes keyword arguments, several `input_columns` become positional arguments, and anything else is
        the one argument. Override the method to call another method of the model, or to reduce large outputs before
        they leave the device. Outputs on the CPU are not copied: clone them if the model reuses its output buffer.
        """
        if inputs is None or inspect.isawaitable(inputs):
            what = "None" if inputs is None else "a coroutine"
            raise TypeError(f"{class_name(type(self))}.preprocess returned {what}. Return the model's inputs.")
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, defaults.Arguments):
            return self.model(*inputs)
        return self.model(inputs)

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        """Turn the model's outputs into rows; the default appends `output_column` to the batch.

        Args:
            outputs: What `predict` returned, with its tensors on the host.
            batch: The rows that `preprocess` got.

        Returns:
            A `pyarrow.Table`, `RecordBatch` or `pandas.DataFrame`, or a mapping from column name to array, tensor or
            list of one length; or a generator of these. The number of rows is free.
        """
        assert self.output_column is not None
        name = class_name(type(self))
        kept = defaults.kept(batch, self.keep_columns, name)
        return defaults.append_outputs(outputs, kept, len(batch), self.output_column, name)

    # ------------------------------------------------------------ for Ray Data to call

    def __call__(self, batch: Any) -> Any:
        """Take one batch through `preprocess`, `predict` and `postprocess`.

        Returns:
            The rows; or a generator of rows, if `postprocess` returned one or the columns of the parts differ in
            type.
        """
        if not hasattr(self, "totals"):
            raise TypeError(f"{class_name(type(self))}.__init__ loaded no model. Call super().__init__(model_ref).")
        return self._runner.run(self, batch)


def _log_totals(totals: Totals) -> None:
    if totals.due(last=True):
        log(str(totals))


def _describe_load(name: str, model_ref: ModelRef, loaded: Loaded, private: int) -> str:
    imports = loaded.import_seconds
    pool = f"; {describe_pool(torch.get_num_threads(), usable_cores())}" if loaded.device.type == "cpu" else ""
    return (
        f"{name}: {model_ref.class_name} loaded in {loaded.seconds * 1000:.1f} ms "
        f"{f'(and its classes imported in {imports:.1f} s) ' if imports >= 0.1 else ''}on {loaded.device}: "
        f"{format_bytes(loaded.shared)} shared, {format_bytes(private)} private, "
        f"writes {'isolated' if loaded.isolated else 'NOT isolated'} (pid {os.getpid()}){pool}"
    )
