"""The options of a predictor: what each does, and which values it takes."""

from __future__ import annotations

import inspect
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch

__all__ = ["OPTIONS", "Columns", "Options", "check_combinations", "check_options"]

Columns = str | Sequence[str] | Mapping[str, str]


class Options:
    """Base class of `ZeroCopyPredictor`: its options, as class attributes with their defaults."""

    input_columns: Columns | None = None
    """The columns that become the model's inputs: one name for one argument, several names for positional arguments,
    or a mapping from column to argument name. `column_to_tensor` reads them without a copy. Floating-point columns
    are cast to the dtype of the weights."""
    output_column: str | Mapping[Any, str] | None = None
    """The column for the model's output, which is a tensor with one row for each row of the batch, or a list with one
    tensor, number or text for each row. For several outputs: a mapping from key, attribute or position to the
    column's name. Outputs may also be a list with one mapping for each row, as those of detectors:
    `{"boxes": "boxes", "scores": "scores"}` makes columns whose rows differ in length."""
    keep_columns: bool | str | Sequence[str] = True
    """Which columns of the batch stay beside `output_column`: all, none (`False`), or those named."""

    dtype: torch.dtype | None = None
    """The dtype to compute in. If the weights already have it (call `model.to(dtype)` before sharing; this is the
    fast way), inputs are cast to it. Otherwise each forward runs under `torch.autocast`, for bfloat16 and float16.
    Weights are never cast in a worker, because each worker would then have a copy."""
    compile: bool | Mapping[str, Any] = False
    """Whether `torch.compile` compiles the model, at the first batch. A mapping is passed on as options. The compiled
    code uses the shared weights. Freezing (an option of inductor) would copy them."""

    warmup: pa.Table | Mapping[str, Any] | Callable[..., Any] | None = None
    """A batch, or a function or method without arguments that returns one. The constructor takes it through the three
    methods, so that the first batch of the dataset does not wait for `torch.compile`, for libraries that set
    themselves up and for the first touch of the weights. Its rows are not counted. It should look like a batch of
    the dataset. If your class defines `__init__` and you do not use `using`, call `self.warm_up()` at its end."""

    inference_mode: bool = True
    """Whether the methods run under `torch.inference_mode()`. Set `False` to compute gradients, for example forces
    with `torch.autograd.grad`: gradients are then recorded as torch does by default. The weights need no gradient.
    Outputs are detached before `postprocess`. Under inference mode most functions for gradients raise an error, but
    those of `torch.autograd.functional` return zeros."""

    sort_by: str | Callable[[Any], Any] | None = None
    """Sorts the rows of each batch by length, longest first, and cuts them into micro-batches of similar lengths, so
    that little is padded. The value is a column (its text, list, binary or tensor lengths; a numeric column is the
    length) or a function `batch -> lengths`. A subclass can write it as a method, `sort_by(self, batch)`, for example
    to count tokens. Nulls have length 0. Results are put back in the order of the batch's rows. `micro_batch_size`
    is the size of the micro-batches, by default "auto"."""
    micro_batch_size: int | Literal["auto"] | None = None
    """The number of rows that go through the stages together; by default the whole batch. While one part is in the
    model, the calling thread finishes the previous part and prepares the next. The result for a row must depend on
    that row alone. Outputs keep their order and equal those of the whole batch up to rounding: a matrix product may
    add in another order for another number of rows. "auto" tries several sizes in the first batches, keeps the
    fastest, and logs it."""
    micro_batch_tokens: int | None = None
    """The largest size of a micro-batch in the unit of `sort_by`: its rows times its longest length. Micro-batches
    have few rows where rows are long, and many where they are short. A longer row is a micro-batch for itself."""
    preserve_order: bool = True
    """Whether results are put back in the order of the batch's rows after `sort_by`. Then `postprocess` must return
    one row for each. Set `False` if it returns other numbers of rows; rows are then in the order of their lengths."""
    concurrent_stages: bool = False
    """Whether `preprocess` and `postprocess` of different parts may run at the same time, in two threads. Set it only
    if the two methods share no state that two threads must not use at once: no tokenizer, no connection, no counter.
    By default they take turns, and only the model runs beside them."""

    on_error: Literal["raise", "null"] = "raise"
    """What happens to rows that raise in `preprocess`, `predict` or `postprocess`. With "null" they do not end the
    job. `error_column` says what was raised, and is null for the other rows, for which `postprocess` must return one
    row each. Columns that `postprocess` passes on unchanged (the same Arrow memory) keep their values. Other columns
    are null for failed rows. Ray Data cannot read nulls in tensor columns, so these have NaN, 0 for integers, or an
    empty tensor where shapes vary. To find the failed rows, the methods run on halves of the part, and on halves of
    these. If all rows of a batch fail, the columns of an earlier batch of this actor are used. If there was none, the
    rows have the batch's columns (those of `keep_columns`, without your own `postprocess`) and the errors, with a
    warning. If no row has ever reached the end of `predict`
    and `postprocess`, their error ends the job, because it is not about single rows."""
    error_column: str | None = "error"
    """The column that `on_error="null"` adds: the method that failed, the type and the message, such as
    `preprocess: ValueError: ...`. It is null for rows that did not fail. `None` adds no column."""


OPTIONS = tuple(Options.__annotations__)


def check_options(options: Any, name: str) -> None:
    """Raise TypeError with the class, the option and the possible values, unless each option has one of these.

    Raises ValueError where two columns have one argument, or two outputs one column.
    """
    _check_columns(options, name)
    dtype = options.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}.dtype is {dtype!r}. Give a floating dtype of torch, such as torch.bfloat16.")
    if not isinstance(options.compile, (bool, Mapping)):
        raise TypeError(f"{name}.compile is {options.compile!r}. Give True, False, or options of torch.compile.")
    warmup = options.warmup
    if warmup is not None and not isinstance(warmup, (pa.Table, pa.RecordBatch, Mapping)) and not callable(warmup):
        raise TypeError(f"{name}.warmup is {warmup!r}. Give a pyarrow.Table, a dict, or a function that makes one.")
    for option in ("concurrent_stages", "inference_mode", "preserve_order"):
        if not isinstance(getattr(options, option), bool):
            raise TypeError(f"{name}.{option} is {getattr(options, option)!r}. Give True or False.")
    if options.on_error not in ("raise", "null"):
        raise TypeError(f"{name}.on_error is {options.on_error!r}. Give 'raise' or 'null'.")
    if options.error_column is not None and not _are_names(options.error_column, sequence=False):
        raise TypeError(f"{name}.error_column is {options.error_column!r}. Give the name of a column, or None.")
    _check_sizes(options, name)


def _check_columns(options: Any, name: str) -> None:
    inputs, outputs, keep = options.input_columns, options.output_column, options.keep_columns
    if inputs is not None and not _are_names(inputs, sequence=True, of_mapping=list):
        raise TypeError(
            f"{name}.input_columns is {inputs!r}. Give the names of columns, or a mapping from column to the name of "
            f"an argument of the model."
        )
    if outputs is not None and not _are_names(outputs, sequence=False, of_mapping=dict.values):
        raise TypeError(
            f"{name}.output_column is {outputs!r}. Give the name of a column, or a mapping from an output of the "
            f"model to the name of its column."
        )
    for option, given in (("input_columns", inputs), ("output_column", outputs)):
        counts = Counter(given.values() if isinstance(given, Mapping) else ())
        if twice := [repr(value) for value, count in counts.items() if count > 1]:
            raise ValueError(f"{name}.{option} names {', '.join(twice)} twice: {given!r}. Give each another name.")
    if not isinstance(keep, bool) and keep != () and keep != [] and not _are_names(keep, sequence=True):
        raise TypeError(f"{name}.keep_columns is {keep!r}. Give True, False, or the names of columns.")


def _check_sizes(options: Any, name: str) -> None:
    size, tokens, sort_by = options.micro_batch_size, options.micro_batch_tokens, options.sort_by
    if size is not None and size != "auto" and not _is_count(size):
        raise TypeError(
            f"{name}.micro_batch_size is {size!r}. Give a number of rows, 'auto', or None for the whole batch."
        )
    if tokens is not None and not _is_count(tokens):
        raise TypeError(f"{name}.micro_batch_tokens is {tokens!r}. Give a whole number, in the unit of sort_by.")
    if sort_by is not None and not callable(sort_by) and not _are_names(sort_by, sequence=False):
        raise TypeError(
            f"{name}.sort_by is {sort_by!r}. Give the name of a column, or a function that takes the batch and "
            f"returns a length for each row."
        )
    if callable(sort_by) and not isinstance(options, type) and not _takes_one(sort_by):
        raise TypeError(
            f"{name}.sort_by does not take one argument, the batch. Write it as a method, def sort_by(self, batch), "
            f"or as a function of the batch, sort_by = staticmethod(lambda batch: ...)."
        )


def check_combinations(options: Any, name: str) -> None:
    """Raise ValueError if two options contradict each other."""
    size, tokens = options.micro_batch_size, options.micro_batch_tokens
    if tokens is not None and options.sort_by is None:
        raise ValueError(
            f"{name}.micro_batch_tokens is {tokens}, which needs the lengths of the rows. Add sort_by='text', with "
            f"the name of your column."
        )
    if tokens is not None and size == "auto":
        raise ValueError(
            f"{name} has micro_batch_tokens={tokens} and micro_batch_size='auto', which would choose another. Give "
            f"one of the two."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True


def _are_names(value: Any, sequence: bool, of_mapping: Any = None) -> bool:
    names: list[Any] = [None]
    if isinstance(value, str):
        names = [value]
    elif isinstance(value, Mapping) and of_mapping:
        names = list(of_mapping(dict(value)))
    elif isinstance(value, (list, tuple)) and sequence:
        names = list(value)
    return bool(names) and all(isinstance(name, str) for name in names)
