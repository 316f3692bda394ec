"""The columns that prompts are made of: what types they may have, and which of a batch's rows need a closer look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_hpt.errors import DataError

COLUMNS = ("prompt", "reward_model")
"""The columns that a file must have."""
READ = ("prompt", "target", "target_lst", "data_source", "reward_model.ground_truth", "extra_info.index", "extra_info.level")
"""What is read of those and of the optional columns; a file may have any others."""


def check_schema(schema: pa.Schema, name: str) -> None:
    """Check that the columns have types that prompts can be made of.

    Args:
        name: of the file.

    Raises:
        DataError: one is missing, or of another type.
    """
    check_names(schema, name)
    missing = [column for column in COLUMNS if column not in schema.names]
    if missing:
        raise DataError(
            f"{name}: column {', '.join(missing)} missing; it has {', '.join(schema.names)}, needed: {', '.join(COLUMNS)} "
            "(tools/prepare_data.py writes such a file from others)"
        )
    for column, (fits, expected) in _TYPES.items():
        if column in schema.names:
            found = schema.field(column).type
            if not fits(found) and not (pa.types.is_null(found) and column not in COLUMNS):
                raise DataError(f"{name}, column {column}: is of type {found}; expected {expected}")


def check_names(schema: pa.Schema, name: str) -> None:
    """Check that no two columns have one name: nobody could say which of them is meant.

    Raises:
        DataError: two have.
    """
    for column, number in Counter(schema.names).items():
        if number > 1:
            raise DataError(f"{name}: {number} columns are called {column!r}; leave out or rename all but one of them")


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)


def _is_list(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found)


def _fields(found: pa.DataType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in found} if pa.types.is_struct(found) else {}


def _is_messages(found: pa.DataType) -> bool:
    if not _is_list(found):
        return False
    fields = _fields(found.value_type)
    return pa.types.is_null(found.value_type) or all(_is_text(fields.get(key, pa.bool_())) for key in ("role", "content"))


def _is_demonstrations(found: pa.DataType) -> bool:
    return _is_list(found) and (_is_text(found.value_type) or _is_messages(found.value_type))


def _is_truth(found: pa.DataType) -> bool:
    return _is_text(_fields(found).get("ground_truth", pa.bool_()))


def _is_identity(found: pa.DataType) -> bool:
    index, level = (_fields(found).get(name, pa.null()) for name in ("index", "level"))
    is_plain = _is_text(level) or pa.types.is_integer(level) or pa.types.is_floating(level) or pa.types.is_boolean(level)
    return pa.types.is_struct(found) and is_plain and (_is_text(index) or pa.types.is_integer(index))


_TYPES = {
    "prompt": (_is_messages, "a list of messages {role, content}, both text"),
    "target": (_is_messages, "a list of messages {role, content}, both text"),
    "target_lst": (_is_demonstrations, "a list of demonstrations, each a text or a list of messages {role, content}"),
    "data_source": (_is_text, "text"),
    "reward_model": (_is_truth, "a record with the text ground_truth"),
    "extra_info": (
        _is_identity,
        "a record with index (text or a whole number) and level (text or a number), or without",
    ),
}


def expected(column: str) -> str:
    """Describe in words what the values of a column are."""
    return _TYPES[column][1]


def doubtful(batch: pa.RecordBatch) -> np.ndarray:
    """Return the rows that may not be usable (int64, ascending); `fields.check_row` says of each what is wrong, if anything."""
    prompt, truth = batch.column("prompt"), truths(batch)
    empty = pc.fill_null(pc.less(pc.list_value_length(prompt), 1), True).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.binary_length(truth.cast(pa.string())), 0).to_numpy(zero_copy_only=False)
    rows = [np.flatnonzero(empty | (lengths == 0)), _blank_messages(prompt)]
    for name in ("target", "target_lst"):
        if name in batch.schema.names and _is_list(batch.schema.field(name).type):
            column = batch.column(name)
            if name == "target":
                several = pc.fill_null(pc.greater(pc.list_value_length(column), 1), False)
                rows.append(np.flatnonzero(several.to_numpy(zero_copy_only=False)))
            rows.append(_blank_messages(column))
    return np.unique(np.concatenate(rows))


def _blank_messages(column: pa.Array) -> np.ndarray:
    """Return the rows of a list column in which a message or a text is missing or blank."""
    parents, inner = pc.list_parent_indices(column), column.flatten()
    if _is_list(inner.type):
        lengths = pc.fill_null(pc.list_value_length(inner), 0).to_numpy(zero_copy_only=False)
        return parents.to_numpy()[np.union1d(_blank_messages(inner), np.flatnonzero(lengths != 1))]
    texts = [_inner(inner, key) for key in ("role", "content")] if pa.types.is_struct(inner.type) else [inner]
    blank = np.zeros(len(inner), dtype=bool)
    for text in texts:
        text = text.cast(pa.string()) if pa.types.is_null(text.type) else text
        missing = pc.or_(pc.equal(pc.binary_length(text), 0), pc.utf8_is_space(text))
        blank |= pc.fill_null(missing, True).to_numpy(zero_copy_only=False)
    return parents.to_numpy()[blank]


def _inner(column: pa.StructArray, field: str) -> pa.Array:
    """Return a field of a column of records; it is null where the record is."""
    return pc.struct_field(column, field)


def truths(batch: pa.RecordBatch) -> pa.Array:
    """Return `reward_model.ground_truth` of each row."""
    return _inner(batch.column("reward_model"), "ground_truth")


def roles(batch: pa.RecordBatch) -> list[str | None]:
    """Return the roles of each prompt's messages, joined by slashes; None where they cannot be read."""
    column = batch.column("prompt")
    if not pa.types.is_struct(column.type.value_type):
        return [None] * batch.num_rows
    lists = pa.LargeListArray if pa.types.is_large_list(column.type) else pa.ListArray
    names = _inner(column.values, "role").cast(pa.string())
    return pc.binary_join(lists.from_arrays(column.offsets, names), "/").to_pylist()


def identities(batch: pa.RecordBatch) -> list[str | None]:
    """Return `extra_info.index` of each row as text; None where there is none."""
    column = batch.column("extra_info") if "extra_info" in batch.schema.names else None
    if column is None or "index" not in _fields(column.type):
        return [None] * batch.num_rows
    return _inner(column, "index").cast(pa.string()).to_pylist()


def data_sources(batch: pa.RecordBatch) -> set[str]:
    """Return the different values of `data_source`."""
    if "data_source" not in batch.schema.names:
        return {""}
    return {value or "" for value in pc.unique(batch.column("data_source")).to_pylist()}


def demonstrations(batch: pa.RecordBatch) -> int:
    """Count the rows that have a demonstration."""
    has = np.zeros(batch.num_rows, dtype=bool)
    for name in ("target", "target_lst"):
        if name in batch.schema.names and _is_list(batch.schema.field(name).type):
            some = pc.fill_null(pc.greater(pc.list_value_length(batch.column(name)), 0), False)
            has |= some.to_numpy(zero_copy_only=False)
    return int(has.sum())


def readable(schema: pa.Schema) -> Sequence[str]:
    """Return what a file has of `READ`."""

    def has(column: str) -> bool:
        outer, _, inner = column.partition(".")
        return outer in schema.names and (not inner or inner in _fields(schema.field(outer).type))

    return [column for column in READ if has(column)]
