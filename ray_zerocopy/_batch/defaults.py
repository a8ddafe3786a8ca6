"""The default methods of a predictor: columns to arguments, outputs to columns; dtypes and compiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .._arrow.columns import columns_of
from .._model.aoti import CompiledModel
from .._model.compiled import compile_named
from ..arrow import column_to_tensor, tensor_to_column
from .options import Columns
from .tables import described

__all__ = [
    "Arguments",
    "Dtypes",
    "append_outputs",
    "columns_to_inputs",
    "compile_model",
    "kept",
    "plan_dtypes",
    "weights_dtype",
]

_COMPUTED_WITH = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_AUTOCAST = frozenset({torch.float16, torch.bfloat16})


class Arguments(tuple):  # type: ignore[type-arg]
    """Several inputs that become positional arguments of the model. Any other tuple is one argument."""


# ---------------------------------------------------------------- columns to arguments


def columns_to_inputs(batch: pa.Table, columns: Columns, name: str) -> Any:
    """Return the columns as one tensor, as positional `Arguments`, or as a dict of keyword arguments.

    Raises ValueError if a column is missing, has nulls or is ragged, and TypeError if its type has no tensor form.
    The message begins with the class and the option.
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
    """Return the columns of the batch that stay beside the outputs."""
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

    Raises TypeError if an output is missing or not a tensor. Raises ValueError if it does not have one row for each
    row of the batch, or if the batch already has a column of that name.
    """
    if isinstance(output_column, str):
        columns = {output_column: (outputs, "outputs")}
    else:
        columns = {column: (_field(outputs, field, name), f"{field!r}") for field, column in output_column.items()}
    for column, (values, what) in columns.items():
        if column in batch.column_names:
            raise ValueError(
                f"{name}.output_column: the batch already has a column '{column}'. Choose another name, or drop "
                f"the column with keep_columns=[...]."
            )
        try:
            array = _to_column(values, rows)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{name}.output_column: the model's {what}, {described(values)}, cannot become column '{column}': "
                f"{error}{_offer(values)} Or write postprocess(self, outputs, batch)."
            ) from None
        if len(array) != rows:
            raise ValueError(
                f"{name}.output_column: the model's {what}, {described(values)}, have {len(array)} rows for a batch "
                f"of {rows}, so they cannot become column '{column}'. Write postprocess(self, outputs, batch), "
                f"which may return any number of rows."
            )
        batch = batch.append_column(column, array) if batch.num_columns else pa.table({column: array})
    return batch


def _to_column(values: Any, rows: int) -> pa.Array:
    if isinstance(values, torch.Tensor):
        return tensor_to_column(values)
    if not isinstance(values, list):  # a tuple means several outputs, even if it is as long as the batch
        raise TypeError("a column is made of a tensor, or of a list with one tensor, number or text for each row.")
    if not values and not rows:
        return tensor_to_column(torch.empty(0))
    if values and all(value is None or isinstance(value, _PLAIN) for value in values):
        return pa.array(values)
    values = [torch.as_tensor(value) if isinstance(value, (np.ndarray, np.generic)) else value for value in values]
    numbers_only = all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in values)
    return tensor_to_column(torch.stack(values) if values and numbers_only else values)


_PLAIN = (bool, int, float, str, bytes)


def _field(outputs: Any, field: Any, name: str) -> Any:
    """Return one of several outputs by key, attribute or position, or the list of this output of each row."""
    if isinstance(outputs, (list, tuple)) and outputs and _is_in_rows(outputs, field):
        return [row[field] if isinstance(row, Mapping) else getattr(row, field) for row in outputs]
    if isinstance(outputs, Mapping) and field in outputs:
        return outputs[field]
    if isinstance(field, str) and not isinstance(outputs, (Mapping, torch.Tensor)) and hasattr(outputs, field):
        return getattr(outputs, field)
    if isinstance(outputs, Mapping) and hasattr(outputs, "to_tuple"):  # a ModelOutput of transformers
        outputs = outputs.to_tuple()
    if isinstance(field, int) and isinstance(outputs, (list, tuple)) and -len(outputs) <= field < len(outputs):
        return outputs[field]
    if isinstance(outputs, list) and not outputs:
        return outputs  # of no rows
    what = f"returned {described(outputs)}, which has no output {field!r}."
    if isinstance(outputs, (list, tuple)) and any(_has(row, field) for row in outputs):
        row = next(number for number, row in enumerate(outputs) if not _has(row, field))
        what = f"returned {described(outputs)}, in which row {row} has no output {field!r}."
    raise TypeError(f"{name}.output_column: the model {what}{_offer(outputs)}")


def _is_in_rows(outputs: Sequence[Any], field: Any) -> bool:
    """Tell whether outputs are a mapping or object for each row, such as a detector's, that all have the field."""
    return all(_has(row, field) for row in outputs)


def _has(row: Any, field: Any) -> bool:
    """Tell whether the outputs of one row have a field."""
    if isinstance(row, Mapping):
        return field in row
    is_one_value = isinstance(row, (torch.Tensor, np.ndarray, np.generic, list, *_PLAIN))
    return isinstance(field, str) and not is_one_value and hasattr(row, field)


def _offer(outputs: Any) -> str:
    """Return a sentence with the fields that the outputs have, as a mapping for `output_column`."""
    fields: Iterable[Any] = ()
    if isinstance(outputs, (list, tuple)) and outputs and all(isinstance(row, Mapping) for row in outputs):
        outputs = outputs[0]
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
    """How `dtype=` is applied: inputs are cast to `inputs`, and the forward runs under autocast to `autocast`."""

    def __init__(self, inputs: torch.dtype | None, autocast: torch.dtype | None) -> None:
        self.inputs = inputs
        self.autocast = autocast


def weights_dtype(model: Any) -> torch.dtype | None:
    """Return the dtype of a model's floating-point parameters, if they have one and torch computes in it.

    For a compiled model it is the dtype of its floating-point inputs, because the code takes no other.
    """
    if isinstance(model, CompiledModel):
        found = model.floating_inputs()
    elif isinstance(model, torch.nn.Module):
        found = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    else:
        return None
    return found.pop() if len(found) == 1 and found <= _COMPUTED_WITH else None


def plan_dtypes(model: Any, dtype: torch.dtype | None, from_columns: bool, name: str) -> Dtypes:
    """Return how `dtype` is applied to a shared model. The weights are never cast here.

    Raises ValueError if the weights would have to be cast.
    """
    own = weights_dtype(model)
    if dtype is None:
        return Dtypes(own if from_columns else None, None)
    if dtype == own:
        return Dtypes(own, None)
    if isinstance(model, CompiledModel):
        raise ValueError(
            f"{name}.dtype is {dtype}, and the model was compiled for inputs of {own or 'several dtypes'}. Compile "
            f"the model that you want to run: prepare_model_for_actors(model.to({dtype}), compile=...)."
        )
    if dtype in _AUTOCAST:
        return Dtypes(own if from_columns else None, dtype)
    raise ValueError(
        f"{name}.dtype is {dtype}, and the weights are {own or 'not of one floating dtype'}. Casting them in each "
        f"worker would make a copy for each. Cast before sharing: prepare_model_for_actors(model.to({dtype}))."
    )


def compile_model(model: Any, options: bool | Mapping[str, Any], name: str) -> None:
    """Make torch compile the model's forward at the first call. The weights are not copied."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}.compile is set, but torch.compile cannot compile {described(model)}. Remove the option compile."
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    # Not model.compile(): it compiles a function of torch.nn, and torch skips frames of torch.nn. A class whose
    # forward is in torch.nn, such as Sequential, would not be compiled at all.
    model._compiled_call_impl = compile_named(
        call, f"{name}.compile", options if isinstance(options, Mapping) else {}
    )
