"""`ZeroCopyPredictor`: the only file that knows Ray Data's conventions."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import logging
import os
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
import torch

from . import _defaults, _nulls, actor
from ._batches import each_to_rows, joined, to_arrow, to_rows
from ._copies import Copies
from ._defaults import Columns
from ._device import DeviceLike
from ._metrics import Totals
from ._overlap import Stages, entered, noting, ranges
from ._store import Loaded, ModelRef, check_session, format_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ZeroCopyPredictor"]

logger = logging.getLogger(__package__)
_bindings = itertools.count(1)
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_AS_THE_CLASS: Any = type("", (), {"__repr__": lambda self: "<as the class says>"})()


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
       calls the model; its outputs move to the host; `postprocess` makes of them what Ray Data gets. The model
       is only ever called in one thread, which is none of Ray's. With `micro_batch_size` the batch goes through in
       parts, the three methods at work on three of them at once.
    4. After the first batch, then less and less often up to once a minute, and when the actor ends, it logs where
       the time went: `self.totals`, whose numbers
       `ray.util.metrics` gets too, as `ray_zerocopy_*` with the tag `predictor`.

    A worker that dies (a segmentation fault, the kernel for want of memory) is started anew by Ray Data, and its
    batch tried again, without end. `ds.map_batches(..., max_restarts=3, max_task_retries=3)` ends that.

    `input_columns` takes the place of `preprocess`, `output_column` that of `postprocess`. These and the other
    options below are class attributes, options of `using`, or keyword arguments of the constructor, the last
    that says something counting.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> model_ref = actor.prepare_model_for_actors(model)
        >>> table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0]), 1)})
        >>> predictor = ZeroCopyPredictor.using(model_ref, input_columns=["x"], output_column="y")()
        >>> predictor(table).column("y").combine_chunks().to_numpy_ndarray()
        array([[2.],
               [4.]], dtype=float32)

        The same with methods of one's own:

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

    input_columns: Columns | None = None
    """The columns that `preprocess` gives to the model: one for its one argument, several for its positional
    arguments in order, or a mapping from column to the name of an argument. They are read with `column_to_tensor`,
    without a copy; floating ones are cast to the dtype of the weights."""
    output_column: str | Mapping[Any, str] | None = None
    """The column that `postprocess` makes of the model's output, a tensor with a row for each of the batch, or a list
    with a tensor for each row; a tuple is several outputs. Or a mapping from the key, attribute or position of one of
    several outputs to its column."""
    keep_columns: bool | str | Sequence[str] = True
    """Which columns of the batch go on beside `output_column`: all, none (`False`), or those named."""
    dtype: torch.dtype | None = None
    """What the model computes in. Weights that have this dtype were cast before sharing, `model.to(dtype)`, which
    is the fast way: floating inputs are then cast to it too. Otherwise, for bfloat16 and float16, each forward runs
    under `torch.autocast`, and the shared weights stay as they are. Weights are never cast in a worker: that would be
    a copy for each."""
    compile: bool | Mapping[str, Any] = False
    """Have torch compile the model, at the first batch; a mapping holds options of `torch.compile`. The compiled code
    uses the shared weights. Leave freezing off, which would copy them."""

    micro_batch_size: int | None = None
    """How many rows go through the stages at a time; by default the whole batch. While one part is in the model, the
    next is in `preprocess` and the one before in `postprocess`, each method in one thread. What they do for a part
    must depend on its rows alone; the outputs then are those of the whole batch, in order, up to rounding: a matrix
    product may sum in another order for another number of rows, and is bit for bit the same for the same."""
    on_error: Literal["raise", "null"] = "raise"
    """With "null", rows on which `preprocess` raises do not end the job: a column `error` says what it raised, and is
    null for the other rows, of which alone the model and `postprocess` know. Columns that `postprocess` passes on as
    they are, the same Arrow memory, are kept for all rows. The others are null where a row failed; a tensor column,
    in which Ray Data cannot read nulls, has NaN there, 0 if it is of integers, an empty tensor if shapes vary: ask
    `error`. To find the rows, `preprocess` is run on halves of the batch, and halves of these. `postprocess` has to
    return a row for each. A batch of which every row fails has the columns of an earlier one of this actor. Before
    there is one, nobody knows the outputs' types: it goes on, with a warning, with the kept columns and `error`, or
    with `error` alone if `postprocess` is written; what selects an output's column fails there."""

    model: Any
    """The loaded model."""
    device: torch.device
    """Where the model is, and where `predict` gets its inputs."""
    loaded: Loaded
    """How the load went: seconds, bytes shared and private, whether writes are isolated."""
    totals: Totals
    """Where the time went since the model was loaded: seconds by stage, batches, rows; printable."""

    def __init__(
        self,
        model_ref: ModelRef | None = None,
        *,
        device: DeviceLike = None,
        require_isolation: bool = False,
        input_columns: Columns | None = _AS_THE_CLASS,
        output_column: str | Mapping[Any, str] | None = _AS_THE_CLASS,
        keep_columns: bool | str | Sequence[str] = _AS_THE_CLASS,
        dtype: torch.dtype | None = _AS_THE_CLASS,
        compile: bool | Mapping[str, Any] = _AS_THE_CLASS,
        micro_batch_size: int | None = _AS_THE_CLASS,
        on_error: Literal["raise", "null"] = _AS_THE_CLASS,
    ) -> None:
        """Load the model.

        Args:
            model_ref: What `prepare_model_for_actors` returned; by default the class attribute.
            device: As for `load_model_in_actor`.
            require_isolation: As for `load_model_in_actor`.
            input_columns: This and what follows: as the class attribute of that name, which it overrides.
            output_column: See there.
            keep_columns: See there.
            dtype: See there.
            compile: See there.
            micro_batch_size: See there.
            on_error: See there.

        Raises:
            TypeError: No model was given, it is not a `ModelRef`, `preprocess` or `postprocess` is neither written
                nor replaced by an option, or an option is not of its kind.
            ModelLostError: The model is no longer in the store.
            ValueError: The device is unknown, or not this worker's; the weights would have to be cast to `dtype`; two
                outputs have one column, or two columns one argument.
        """
        given = locals()
        for option in _OPTIONS:
            if given[option] is not _AS_THE_CLASS:
                setattr(self, option, given[option])
        _check_complete(self, type(self))
        _defaults.check_options(self, _name(type(self)))
        if model_ref is None:
            model_ref = self.model_ref
        if model_ref is None:
            raise TypeError(_no_model(type(self)))
        self.loaded = actor.load_one(model_ref, device, require_isolation=require_isolation)
        self.model = self.loaded.model
        self.device = self.loaded.device
        name = _name(type(self))
        self._dtypes = _defaults.plan_dtypes(self.model, self.dtype, self.input_columns is not None, name)
        if self.compile:
            _defaults.compile_model(self.model, self.compile, name)
        streams = self.device.type == "cuda" and self.micro_batch_size is not None
        self._copies = Copies(self.device, self._dtypes.inputs, streams=streams)
        self._stages = Stages()
        self._fitting: int | None = None  # rows for which the device's memory was enough, once it was not
        self._said_split = False
        self._schema: pa.Schema | None = None  # with on_error="null": of the last output, error column included
        self._passed: frozenset[str] = frozenset()  # which of its columns were the batch's own memory
        private = self.loaded.private + model_ref.carried_nbytes
        self.totals = Totals(name, self.loaded, private)
        weakref.finalize(self, _log_totals, self.totals)
        importing = self.loaded.import_seconds
        _log(
            f"{name}: {model_ref.class_name} loaded in {self.loaded.seconds * 1000:.1f} ms "
            f"{f'(and its classes imported in {importing:.1f} s) ' if importing >= 0.1 else ''}on "
            f"{self.device}: {format_bytes(self.loaded.shared)} shared, "
            f"{format_bytes(private)} private, "
            f"writes {'isolated' if self.loaded.isolated else 'NOT isolated'} (pid {os.getpid()})"
        )

    @classmethod
    def using(cls, model_ref: ModelRef, **options: Any) -> type[Self]:
        """Return this class with its model and options bound, for `map_batches` to take as it is.

        Args:
            model_ref: What `prepare_model_for_actors` returned.
            options: The options of this class, also where the subclass's constructor does not take them, and
                keyword arguments for the constructor.

        Returns:
            A subclass of the same name, which pickles by value and so keeps what is bound to it.

        Raises:
            TypeError: `model_ref` is not a `ModelRef`, `preprocess` or `postprocess` is neither written nor
                replaced by an option (a class with a constructor of its own is asked in the worker), an option is
                not of its kind, or there is no such option.
            ModelLostError: The handle is from another Ray session.
        """
        if not isinstance(model_ref, ModelRef):
            raise TypeError(
                f"{_name(cls)}.using needs a ModelRef, not {type(model_ref).__qualname__}. Make one with "
                f"model_ref = prepare_model_for_actors(model)."
            )
        check_session(model_ref)  # Ray, which has to send what is bound, would say that an object has no owner
        signature = inspect.signature(cls)
        accepts = signature.parameters.values()
        # A constructor that takes the model gets it; one that does not finds it as the class attribute.
        named = "model_ref" in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in accepts)
        attributes = {option: options[option] for option in _OPTIONS if option in options}
        options = {o: v for o, v in options.items() if o not in attributes or o in signature.parameters}
        bound = {"model_ref": model_ref, **options} if named else options
        try:
            signature.bind(**bound)
        except TypeError as error:
            raise TypeError(
                f"{_name(cls)}.using: the constructor of {_name(cls)} {error}. It takes "
                f"{', '.join(map(str, signature.parameters))}: the model as model_ref, any other from using. What is "
                f"Ray Data's (batch_size, compute, num_gpus) goes to ds.map_batches."
            ) from None

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            given = signature.bind_partial(*args).arguments  # fn_constructor_args count more than what is bound
            cls.__init__(self, *args, **{k: v for k, v in bound.items() if k not in given} | kwargs)

        # For the next `using`, of this class or of a subclass: what it may give, and what is given.
        own = [p.replace(default=bound[p.name]) if p.name in bound and p.kind not in _SEVERAL else p for p in accepts]
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        __init__.__signature__ = signature.replace(parameters=[itself, *own])  # type: ignore[attr-defined]

        members: dict[str, Any] = {
            "model_ref": model_ref,
            **attributes,
            "__init__": __init__,
            "_bound": True,
            "__module__": cls.__module__,
            # Not the class's own: Ray Data tells the instances on an actor apart by it, and a chain may use one
            # class with two models. The operator shows __name__.
            "__qualname__": f"{cls.__qualname__}.using_{next(_bindings)}",
            "__doc__": cls.__doc__,
        }
        made = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))
        if all(
            "__init__" not in c.__dict__ or "_bound" in c.__dict__
            for c in cls.__mro__[: cls.__mro__.index(ZeroCopyPredictor)]
        ):
            _check_complete(made, cls)  # a constructor of the class's own may add what is missing
        _defaults.check_options(made, _name(cls))
        return made

    def __reduce__(self) -> Any:
        name = _name(type(self))
        raise TypeError(
            f"an instance of {name} cannot be sent: it has a loaded model and threads of its own. Give Ray the "
            f"class, of which each worker makes an instance: ds.map_batches({name}.using(model_ref))."
        )

    # ------------------------------------------------------------ for subclasses to write

    def preprocess(self, batch: pa.Table) -> Any:
        """Turn a batch into the model's inputs: a tensor, or a mapping from argument name to tensor.

        By default those that `input_columns` names. Their tensors are the batch's own memory, as all that
        `column_to_tensor` returns: a model that writes to its inputs needs `preprocess` to clone them.

        Args:
            batch: The rows that Ray Data gives, as Arrow.

        Returns:
            What `predict` gets. Tensors in it, also inside lists, tuples and mappings, are moved to the device.
        """
        assert self.input_columns is not None
        return _defaults.columns_to_inputs(batch, self.input_columns, _name(type(self)))

    def predict(self, inputs: Any) -> Any:
        """Call the model: with a mapping's items as keyword arguments, with anything else as the one argument.

        The tuple that several `input_columns` give becomes positional arguments. Override it to call another
        method, or to reduce large outputs before they leave the device. What it returns on the CPU is not copied: a
        model that fills the same buffer in each call needs a clone of it here.
        """
        if inputs is None:
            raise TypeError(f"{_name(type(self))}.preprocess returned None. Return the model's inputs.")
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, _defaults.Arguments):
            return self.model(*inputs)
        return self.model(inputs)

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        """Turn the model's outputs into the rows that go on; by default append `output_column` to the batch.

        Args:
            outputs: What `predict` returned, tensors moved to the host.
            batch: The rows that `preprocess` got.

        Returns:
            A `pyarrow.Table` or `RecordBatch`, a `pandas.DataFrame`, or a mapping from column name to array,
            tensor or list, all of one length; or a generator of such. Rows need not be as many as came in.
        """
        assert self.output_column is not None
        name = _name(type(self))
        kept = _defaults.kept(batch, self.keep_columns, name)
        return _defaults.append_outputs(outputs, kept, len(batch), self.output_column, name)

    # ------------------------------------------------------------ for Ray Data to call

    def __call__(self, batch: Any) -> Any:
        """Take one batch through `preprocess`, `predict` and `postprocess`.

        Returns:
            The rows, or a generator of rows where `postprocess` returned one, or where parts of the batch have
            columns of different types.
        """
        if not hasattr(self, "totals"):
            name = _name(type(self))
            raise TypeError(f"{name}.__init__ loaded no model. Call super().__init__(model_ref) in it.")
        with self.totals.busy():
            table = to_arrow(batch, _name(type(self)))
            results = self._results(table)
            first = next(results)
            parts = [first] if inspect.isgenerator(first[1]) else [first, *results]
            if any(inspect.isgenerator(rows) for _, rows in parts):
                return self._from_generators(itertools.chain(parts, results), len(table))
        if self.on_error == "null":
            parts = self._with_all_columns(parts, table)
        self._completed()
        return parts[0][1] if len(parts) == 1 else joined([rows for _, rows in parts])

    def _from_generators(self, results: Iterator[tuple[range, Any]], end: int) -> Iterator[Any]:
        """Yield the rows of each part's generator; its code runs when Ray Data asks for rows."""

        @contextlib.contextmanager
        def step() -> Iterator[None]:
            noted = noting(part) if len(part) < end else contextlib.nullcontext()
            with noted, self.totals.busy(), self.totals.stage("postprocess"):
                yield

        while True:
            with self.totals.busy():
                result = next(results, None)
            if result is None:
                break
            part, rows = result
            yield from each_to_rows(rows, step, _name(type(self))) if inspect.isgenerator(rows) else [rows]
        self._completed()

    def _completed(self) -> None:
        self.totals.count(batches=1)
        if self.totals.due():
            _log(str(self.totals))

    # ------------------------------------------------------------ a batch in parts

    def _results(self, table: pa.Table) -> Iterator[tuple[range, Any]]:
        """Yield each part of the batch with what `postprocess` gave for it, in order.

        Where the device's memory is too small for a part, that part and what follows are split into halves. The
        size is remembered for later batches, but not that of a last part shorter than what fitted before it.
        """
        begin = 0
        end = limit = len(table)
        split = False
        while True:
            usual = min(self.micro_batch_size or end, self._fitting or end)
            size = min(usual, limit)
            try:
                if end - begin <= size:
                    part = range(begin, end)
                    yield part, self._serially(table, part, len(part) < end)
                else:
                    for part, rows in self._stages.overlap(
                        ranges(begin, end, size), lambda part: self._before(table, part), self._model, self._after
                    ):
                        yield part, rows
                        begin = part.stop
                break
            except torch.cuda.OutOfMemoryError:
                tried = min(size, end - begin)
                if tried <= 1:
                    raise
            limit = tried // 2
            if tried == usual:
                self._fitting, split = limit, True
            self._make_room()
        if split:
            self._say_split(end)

    def _serially(self, table: pa.Table, part: range, note: bool) -> Any:
        def run() -> Any:
            return self._after(self._stages.in_model_thread(self._model, self._before(table, part)))

        with noting(part) if note else contextlib.nullcontext():
            return entered(torch.get_num_threads(), run)

    def _before(self, table: pa.Table, rows: range) -> _Part:
        batch = table.slice(rows.start, len(rows))
        with self.totals.stage("preprocess"):
            part = _Part(batch, batch, {})
            try:
                inputs = self.preprocess(batch)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                if self.on_error == "raise" or not len(batch):
                    raise
                if not _is_written(type(self), "preprocess"):
                    self.preprocess(_nulls.no_rows(batch))  # raises if it is the column that is wrong, not a row
                part.errors = _nulls.failing_rows(self.preprocess, batch, error)
                part.good = _nulls.without(batch, part.errors)
                if part.all_failed:
                    return part
                inputs = self.preprocess(part.good)
            part.values, part.event = self._copies.begin(inputs)
        return part

    def _model(self, part: _Part) -> _Part:
        if part.all_failed:
            return part
        with self.totals.stage("predict"):
            inputs = self._copies.arrive(part.values, part.event)
            part.values = None
            with self._computing():
                outputs = self.predict(inputs)
            part.values, part.event = self._copies.leave(outputs)
        return part

    def _after(self, part: _Part) -> Any:
        name = _name(type(self))
        if part.event is not None:
            with self.totals.stage("predict"):  # which only began the work on the device
                part.event.synchronize()
        with self.totals.stage("postprocess"):
            if part.all_failed:
                rows = self._all_null(part)
            else:
                rows = self.postprocess(self._copies.end(part.values, part.event), part.good)
                rows = rows if inspect.isgenerator(rows) else to_rows(rows, name)
                if self.on_error == "null":
                    rows, passed = _nulls.with_nulls(rows, part.good, part.batch, part.errors, name)
                    if len(rows):  # without rows any two columns are the same memory
                        self._schema, self._passed = rows.schema, passed
        if part.errors and not self.totals.failed_rows:
            said = next(iter(part.errors.values()))
            _log(f"{name}: preprocess failed for {len(part.errors)} of {len(part.batch)} rows, the first with {said}")
        self.totals.count(rows=len(part.batch), failed_rows=len(part.errors))
        return rows

    def _all_null(self, part: _Part) -> pa.Table:
        name = _name(type(self))
        if self._schema is not None:
            return _nulls.without_values(part.batch, part.errors, self._schema, self._passed)
        written = _is_written(type(self), "postprocess")
        kept = part.batch.select([]) if written else _defaults.kept(part.batch, self.keep_columns, name)
        _nulls.check_no_errors_yet(kept.column_names, name)
        return _nulls.without_values(part.batch, part.errors, kept.schema, kept.column_names)

    def _with_all_columns(self, parts: list[tuple[range, pa.Table]], batch: pa.Table) -> list[tuple[range, pa.Table]]:
        if self._schema is not None:
            return _nulls.completed(parts, batch, self._schema, self._passed)
        if len(batch):
            _log(
                f"{_name(type(self))}: preprocess failed for all {len(batch)} rows before any row went through, so "
                f"these rows go on with the columns {', '.join(map(repr, parts[0][1].column_names))} alone.",
                logging.WARNING,
            )
        return parts

    def _make_room(self) -> None:
        self.totals.count(retries=1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _say_split(self, rows: int) -> None:
        if not self._said_split:
            self._said_split = True
            _log(
                f"{_name(type(self))}: {self.device} has too little memory for a batch of {rows} rows. This actor "
                f"gives the model {self._fitting} rows at a time from now on, or fewer if need be. "
                f"micro_batch_size={self._fitting} does so from the start.",
                logging.WARNING,
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))  # a thread begins with the first one
            if self._dtypes.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self._dtypes.autocast))
            yield


@dataclass
class _Part:
    """A part of a batch on its way: all its rows, those that preprocess took, what it said of the others.

    `values` are the model's inputs, then its outputs; `event` orders their copies on a GPU.
    """

    batch: pa.Table
    good: pa.Table
    errors: dict[int, str]
    values: Any = None
    event: Any = None

    @property
    def all_failed(self) -> bool:
        return bool(self.errors) and not len(self.good)


# ---------------------------------------------------------------- what a class is told that is not complete


def _written(cls: type) -> type:
    """Return the class that the user wrote: Ray Data runs a subclass of its own."""
    return next((c for c in cls.__mro__ if not c.__module__.startswith("ray.")), cls)


def _name(cls: type) -> str:
    return _written(cls).__name__


def _is_written(cls: type, method: str) -> bool:
    return getattr(cls, method) is not getattr(ZeroCopyPredictor, method)


_OPTIONS = (
    "input_columns",
    "output_column",
    "keep_columns",
    "dtype",
    "compile",
    "micro_batch_size",
    "on_error",
)


def _check_complete(options: Any, cls: type[ZeroCopyPredictor]) -> None:
    """Raise TypeError unless `options`, an instance or a class, says all that `cls` needs."""
    name = _name(cls)
    for method, signature, option in (
        ("preprocess", "(self, batch)", "input_columns=['x']"),
        ("postprocess", "(self, outputs, batch)", "output_column='prediction'"),
    ):
        if not _is_written(cls, method) and getattr(options, option.split("=")[0]) is None:
            raise TypeError(
                f"{name}.{method} is not written. A subclass of ZeroCopyPredictor defines {method}{signature}, or "
                f"an option takes its place: {option}."
            )


def _no_model(cls: type[ZeroCopyPredictor]) -> str:
    name, module = _name(cls), _written(cls).__module__
    lost = (
        f" A class attribute {name}.model_ref that was set at run time does not reach the workers if {name} is in an "
        f"importable module ({module}): Ray sends such a class by name only."
    )
    return (
        f"{name} got no model. Give ds.map_batches either {name}.using(model_ref), or {name} with "
        f'fn_constructor_kwargs={{"model_ref": model_ref}}.{lost if module != "__main__" else ""}'
    )


# ---------------------------------------------------------------- the log


def _log(line: str, level: int = logging.INFO) -> None:
    """Log where somebody listens; else to standard error, which Ray shows in the driver."""
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.log(level, line)


def _log_totals(totals: Totals) -> None:
    if totals.due(last=True):
        _log(str(totals))
