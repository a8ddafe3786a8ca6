"""Which columns of a batch have a tensor form, and the errors for those that have none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import torch

__all__ = [
    "DTYPES",
    "RAY_FIXED",
    "RAY_VARIABLE",
    "Column",
    "check_type",
    "columns_of",
    "find_column",
    "is_extension",
    "is_list",
    "is_over_lists",
    "nulls_within",
    "ragged_error",
    "unequal_dimensions",
]


DTYPES = {  # by id: Python's own types of extensions have no hash
    pa.int8().id: torch.int8,
    pa.int16().id: torch.int16,
    pa.int32().id: torch.int32,
    pa.int64().id: torch.int64,
    pa.uint8().id: torch.uint8,
    pa.uint16().id: torch.uint16,
    pa.uint32().id: torch.uint32,
    pa.uint64().id: torch.uint64,
    pa.float16().id: torch.float16,
    pa.float32().id: torch.float32,
    pa.float64().id: torch.float64,
}
# By name, so that a batch without Ray's types does not import ray.data.
RAY_FIXED = frozenset({"ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"})
RAY_VARIABLE = frozenset({"ray.data.arrow_variable_shaped_tensor"})
RAY_PICKLED = frozenset({"ray.data.arrow_pickled_object"})
MOST_NAMED = 20  # how many columns of a batch an error names


class Column(NamedTuple):
    """A column without nulls whose type has a tensor form.

    Attributes:
        name: Its name.
        kind: The Arrow type of its chunks.
        chunks: At least one. Those of an extension over lists are the lists.
        declared: The Arrow type of the column.
    """

    name: str
    kind: Any
    chunks: list[Any]
    declared: Any

    @property
    def label(self) -> str:
        return f"column '{self.name}' ({self.declared})"


def find_column(batch: Any, name: str) -> Column:
    if isinstance(batch, pa.RecordBatch):
        batch = pa.Table.from_batches([batch])
    if not isinstance(batch, pa.Table):
        raise TypeError(
            f"the batch is a {type(batch).__module__}.{type(batch).__qualname__}, not a pyarrow.Table. Ask Ray Data "
            f"for Arrow: ds.map_batches(..., batch_format='pyarrow')."
        )
    if not isinstance(name, str):
        raise TypeError(f"the name of a column is a str, not a {type(name).__qualname__}. {columns_of(batch)}")
    found = batch.schema.get_all_field_indices(name)
    if len(found) != 1:
        raise ValueError(
            f"the batch has {len(found) or 'no'} column{'s' * (len(found) > 1)} '{name}'. {columns_of(batch)}"
            + (" Rename them so that all names differ." if found else "")
        )
    chunked = batch.column(found[0])
    kind = chunked.type
    metadata = batch.schema.field(found[0]).metadata or {}
    if metadata.get(b"ARROW:extension:name", b"").decode() in RAY_FIXED | RAY_VARIABLE:
        raise ValueError(
            f"column '{name}' ({kind}) is a tensor column of Ray, but it was read before Ray registered its types "
            f"with Arrow, so its rows have lost their shape. Import ray.data before you read the batch."
        )
    check_type(kind, name, kind)
    if chunked.null_count:
        fill = f" Fill them, pc.fill_null(batch[{name!r}], 0), or drop" if kind.id in DTYPES else " Drop"
        raise ValueError(
            f"column '{name}' ({kind}) has {chunked.null_count} nulls in {len(chunked)} rows, and tensors have no "
            f"nulls.{fill} those rows: batch.filter(pc.is_valid(batch[{name!r}])). pc is pyarrow.compute."
        )
    declared, chunks = kind, chunked.chunks or [pa.nulls(0, kind)]
    while is_over_lists(kind):
        kind, chunks = kind.storage_type, [chunk.storage for chunk in chunks]
    return Column(name, kind, chunks, declared)


def columns_of(batch: pa.Table) -> str:
    """Return a sentence that names the columns of a batch, at most `MOST_NAMED` of them, for an error."""
    names = batch.column_names
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"It has {', '.join(map(repr, names[:MOST_NAMED])) or 'no columns'}{more}."


def is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_extension(kind: Any, names: frozenset[str]) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name in names


def is_over_lists(kind: Any) -> bool:
    """Tell whether a type is an extension over lists that Arrow and Ray do not define, such as `Array2D` of datasets.

    Its rows are those of its storage.
    """
    if not isinstance(kind, pa.BaseExtensionType) or isinstance(kind, pa.FixedShapeTensorType):
        return False
    stored = getattr(kind, "storage_type", None)
    known = kind.extension_name.startswith("ray.data.")
    return stored is not None and not known and (is_list(stored) or pa.types.is_fixed_size_list(stored))


def check_type(kind: Any, name: str, column_kind: Any) -> None:
    """Raise TypeError with a remedy unless `kind`, the column's type or a type inside it, has a tensor form."""
    if kind.id in DTYPES:
        return
    if is_list(kind) or pa.types.is_fixed_size_list(kind):
        return check_type(kind.value_type, name, column_kind)
    if is_over_lists(kind):
        return check_type(kind.storage_type, name, column_kind)
    if isinstance(kind, pa.FixedShapeTensorType) or is_extension(kind, RAY_FIXED | RAY_VARIABLE):
        stored = kind.storage_type
        rows = stored.field("data").type if pa.types.is_struct(stored) else stored
        return check_type(rows.value_type, name, column_kind)
    raise TypeError(
        f"column '{name}' ({column_kind}) {'has' if kind == column_kind else 'holds'} type {kind}, which has no "
        f"tensor form. {_remedy(kind, name, column_kind)}"
    )


def _remedy(kind: Any, name: str, column_kind: Any) -> str:
    types, column = pa.types, f"batch[{name!r}]"

    def cast(to: str, why: str = "") -> str:
        if kind == column_kind:
            return f"{why}Cast it: {column}.cast(pa.{to}())."
        return f"{why}Make the column with values of type {to}, or cast what is inside it."

    if types.is_boolean(kind):
        return cast("uint8", "Arrow packs eight bools into a byte. ")
    if types.is_decimal(kind):
        return cast("float64")
    if types.is_date32(kind) or types.is_time32(kind):
        return cast("int32")
    if types.is_temporal(kind) and not types.is_interval(kind):
        return cast("int64")
    if kind == column_kind:
        if types.is_dictionary(kind):
            decoded = f"{column}.cast({column}.type.value_type)"
            return f"Decode it: {decoded}. Or use the codes of each chunk: chunk.indices."
        if types.is_struct(kind):
            return f"Use one of its fields: pyarrow.compute.struct_field({column}, ...)."
        if "list_view" in str(kind):
            # Not with Arrow's cast, which returns broken lists (pyarrow 26).
            return f"Convert it to lists: pa.array({column}.to_pylist(), pa.list_({column}.type.value_type))."
        if types.is_map(kind):
            return f"Convert it to lists: pa.array([[value for _, value in row] for row in {column}.to_pylist()])."
    if types.is_null(kind):
        return "All its values are null. Give the column a type where it is made."
    if "binary" in str(kind) and kind == column_kind:
        return (
            f"Decode encoded rows, such as images, first. Rows of raw bytes of one length are a tensor: "
            f"torch.stack([torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in {column}.to_pylist()])."
        )
    if "string" in str(kind) or "binary" in str(kind):
        return f"Convert it to numbers first, text with a tokenizer: tokenizer({column}.to_pylist())."
    if is_extension(kind, RAY_PICKLED):
        return (
            "Ray Data pickled the rows, because no Arrow type holds them. Make rows of one dtype and one number of "
            "dimensions. If some are null, use batch_format='pyarrow', which has nulls."
        )
    if kind == column_kind and isinstance(kind, pa.BaseExtensionType) and hasattr(kind, "storage_type"):
        return f"Cast it to its storage type: {column}.cast({column}.type.storage_type)."
    return f"Convert it to numbers first, from {column}.to_pylist()."


def nulls_within(column: Column, array: Any) -> str:
    return (
        f"{column.label} has {array.null_count} nulls within its rows, in {len(array)} entries of one chunk, and "
        f"tensors have no nulls. Fill them where the column is made."
    )


def ragged_error(column: Column, fact: str, outermost: bool) -> str:
    if outermost and (is_list(column.kind) or is_extension(column.kind, RAY_VARIABLE)):
        remedy = f"Use column_to_padded(batch, {column.name!r}), which returns a padded tensor and the lengths."
    else:
        remedy = "Pad the inner lists where the column is made."
    return f"{column.label} is ragged: {fact}. {remedy}"


def unequal_dimensions(column: Column, dimensions: Iterable[int]) -> str:
    return (
        f"{column.label} has rows of {' and '.join(map(str, sorted(set(dimensions))))} dimensions. Give them all the "
        f"same number where the column is made."
    )
