"""What a predictor does where nothing was written: columns to arguments, outputs to columns, dtypes, compiling."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch

from .._arrow.columns import columns_of
from ..arrow import column_to_tensor, tensor_to_column
from .rows import described

__all__ = [
    "Arguments",
    "Columns",
    "Dtypes",
    "append_outputs",
    "check_options",
    "columns_to_inputs",
    "compile_model",
    "kept",
    "plan_dtypes",
    "weights_dtype",
]

Columns = str | Sequence[str] | Mapping[str, str]

_COMPUTED_WITH = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_AUTOCAST = frozenset({torch.float16, torch.bfloat16})


class Arguments(tuple):  # type: ignore[type-arg]
    """Several inputs that go to the model as positional arguments; any other tuple is one argument."""


# ---------------------------------------------------------------- columns to arguments


def columns_to_inputs(batch: pa.Table, columns: Columns, name: str) -> Any:
    """Return what `input_columns` says as one tensor, as positional `Arguments`, or as a dict of arguments.

    Raises ValueError for a column that is not there, has nulls or is ragged, TypeError for one of a type that has
    no tensor form; the message begins with the class and the option.
    """

    def tensor(column: str) -> torch.Tensor:
        try:
            return column_to_tensor(batch, column)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.input_columns: {error}") from None

    if isinstance(columns, str):
        return tensor(columns)
    if isinstance(columns, Mapping):
        return {argument: tensor(column) for column, argument in columns.items()}
    tensors = [tensor(column) for column in columns]
    return tensors[0] if len(tensors) == 1 else Arguments(tensors)


# ---------------------------------------------------------------- outputs to columns


def kept(batch: pa.Table, keep_columns: bool | str | Iterable[str], name: str) -> pa.Table:
    """Return the columns of the batch that go on beside the outputs."""
    if keep_columns is True:
        return batch
    names = [keep_columns] if isinstance(keep_columns, str) else list(keep_columns or ())
    if missing := [column for column in names if column not in batch.column_names]:
        raise ValueError(
            f"{name}.keep_columns names {', '.join(map(repr, missing))}, which the batch does not have. "
            f"{columns_of(batch)}"
        )
    return batch.select(names)


def append_outputs(
    outputs: Any, batch: pa.Table, rows: int, output_column: str | Mapping[Any, str], name: str
) -> pa.Table:
    """Return the `rows` rows of the batch with the model's outputs as columns, in the order of `output_column`.

    Raises TypeError where an output is not there or is no tensor, ValueError where it does not have a row for each
    of the batch, or where its column is there already.
    """
    if isinstance(output_column, str):
        columns = {output_column: (outputs, "outputs")}
    else:
        columns = {column: (_field(outputs, field, name), f"{field!r}") for field, column in output_column.items()}
    for column, (values, what) in columns.items():
        if column in batch.column_names:
            raise ValueError(
                f"{name}.output_column: the batch has a column '{column}' already. Name another, or leave that one "
                f"out with keep_columns=[...]."
            )
        try:
            array = tensor_to_column(_rows(values, rows))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{name}.output_column: the model's {what}, {described(values)}, make no column '{column}': {error}"
                f"{_offer(values)} Or write postprocess(self, outputs, batch)."
            ) from None
        if len(array) != rows:
            raise ValueError(
                f"{name}.output_column: the model's {what}, {described(values)}, have {len(array)} rows for a batch "
                f"of {rows}, so they make no column '{column}'. Write postprocess(self, outputs, batch), which "
                f"may return any number of rows."
            )
        batch = batch.append_column(column, array) if batch.num_columns else pa.table({column: array})
    return batch


def _rows(values: Any, rows: int) -> Any:
    if isinstance(values, torch.Tensor):
        return values
    if not isinstance(values, list):  # a tuple is several outputs, also where they are as many as the rows
        raise TypeError("a column is made of a tensor, or of a list with a tensor a row.")
    if not values and not rows:
        return torch.empty(0)
    numbers_only = all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in values)
    return torch.stack(values) if values and numbers_only else values


def _field(outputs: Any, field: Any, name: str) -> Any:
    """Return one of several outputs: by key, by attribute, or by position."""
    if isinstance(outputs, Mapping) and field in outputs:
        return outputs[field]
    if isinstance(field, str) and not isinstance(outputs, (Mapping, torch.Tensor)) and hasattr(outputs, field):
        return getattr(outputs, field)
    if isinstance(outputs, Mapping) and hasattr(outputs, "to_tuple"):  # a ModelOutput of transformers
        outputs = outputs.to_tuple()
    if isinstance(field, int) and isinstance(outputs, (list, tuple)) and -len(outputs) <= field < len(outputs):
        return outputs[field]
    raise TypeError(
        f"{name}.output_column: the model returned {described(outputs)}, which has no output {field!r}."
        f"{_offer(outputs)}"
    )


def _offer(outputs: Any) -> str:
    """Say which fields several outputs have, as a mapping to write."""
    fields: Iterable[Any] = ()
    if isinstance(outputs, Mapping):
        fields = list(outputs)
    elif hasattr(outputs, "_fields"):
        fields = outputs._fields
    elif isinstance(outputs, (list, tuple)):
        fields = range(len(outputs))
    given = ", ".join(f"{field!r}: ..." for field in fields)
    return f" Name the outputs: output_column={{{given}}}." if given else ""


# ---------------------------------------------------------------- dtypes, and compiling


class Dtypes:
    """How `dtype=` is met: inputs cast to `inputs`, and the forward run under autocast to `autocast`."""

    def __init__(self, inputs: torch.dtype | None, autocast: torch.dtype | None) -> None:
        self.inputs = inputs
        self.autocast = autocast


def weights_dtype(model: Any) -> torch.dtype | None:
    """Return the one dtype of a model's floating parameters, if it is one to compute with."""
    if not isinstance(model, torch.nn.Module):
        return None
    found = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return found.pop() if len(found) == 1 and found <= _COMPUTED_WITH else None


def plan_dtypes(model: Any, dtype: torch.dtype | None, from_columns: bool, name: str) -> Dtypes:
    """Return what `dtype` means for a model as it was shared; the weights are never cast here.

    Raises ValueError for a dtype that only casting the weights could meet.
    """
    own = weights_dtype(model)
    if dtype is None:
        return Dtypes(own if from_columns else None, None)
    if dtype == own:
        return Dtypes(own, None)
    if dtype in _AUTOCAST:
        return Dtypes(own if from_columns else None, dtype)
    raise ValueError(
        f"{name}.dtype is {dtype}, and the weights are {own or 'not of one floating dtype'}. Casting them in each "
        f"worker would give each a copy of its own: cast before sharing, prepare_model_for_actors(model.to({dtype}))."
    )


def compile_model(model: Any, options: bool | Mapping[str, Any], name: str) -> None:
    """Have torch compile the model's forward, in place, at the first call; the weights stay where they are."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}.compile is set, and the model is {described(model)}, which torch.compile does not take. "
            f"Leave compile out."
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    # As model.compile(), which hands torch's own function over: torch leaves a frame of torch.nn as it is, and so
    # compiles nothing of a class whose forward is there too, such as Sequential.
    model._compiled_call_impl = torch.compile(call, **(options if isinstance(options, Mapping) else {}))


# ---------------------------------------------------------------- what an option may be


def check_options(options: Any, name: str) -> None:
    """Raise TypeError with the class, the option and what may be given, unless each option is of its kind.

    Raises ValueError where two columns have one argument, or two outputs one column.
    """
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
            raise ValueError(
                f"{name}.{option} names {', '.join(twice)} twice: {given!r}. Give each a name of its own."
            )
    if not isinstance(keep, bool) and keep != () and keep != [] and not _are_names(keep, sequence=True):
        raise TypeError(f"{name}.keep_columns is {keep!r}. Give True, False, or the names of columns.")
    dtype = options.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}.dtype is {dtype!r}. Give a floating dtype of torch, such as torch.bfloat16.")
    if not isinstance(options.compile, (bool, Mapping)):
        raise TypeError(f"{name}.compile is {options.compile!r}. Give True, False, or options of torch.compile.")
    size = options.micro_batch_size
    if size is not None and (not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1):
        raise TypeError(f"{name}.micro_batch_size is {size!r}. Give a number of rows, or None for the whole batch.")
    if options.on_error not in ("raise", "null"):
        raise TypeError(f"{name}.on_error is {options.on_error!r}. Give 'raise' or 'null'.")


def _are_names(value: Any, sequence: bool, of_mapping: Any = None) -> bool:
    names: list[Any] = [None]
    if isinstance(value, str):
        names = [value]
    elif isinstance(value, Mapping) and of_mapping:
        names = list(of_mapping(dict(value)))
    elif isinstance(value, (list, tuple)) and sequence:
        names = list(value)
    return bool(names) and all(isinstance(name, str) for name in names)
