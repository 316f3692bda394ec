"""JSONL files by ranges of bytes, which are to JSONL what row groups are to parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa

from megatron_hpt.data.storage.blocks import OPEN_FILES, Block
from megatron_hpt.data.storage.columns import COLUMNS as NEEDED
from megatron_hpt.data.storage.columns import READ, expected
from megatron_hpt.data.storage.jsonl import NotJson, check_beginning, depth, is_blank, lines, record
from megatron_hpt.data.storage.locations import Location
from megatron_hpt.errors import DataError, shown

BLOCK_BYTES = 512 << 10
"""Bytes of a block, without its last line; so much is parsed before its first row is there."""
_DEEPEST = 100
"""How deep the further fields of a message may be nested: they are written as JSON, and read again whenever a row is taken."""
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())]))
"""`more`: the fields that a message has besides, as JSON."""
_SCHEMA = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("target", _MESSAGES),
        ("target_lst", pa.list_(_MESSAGES)),
        ("data_source", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string()), ("level", pa.string())])),
    ]
)
"""All rows of all files have this schema: a line whose fields are of other types is refused, and no type is guessed."""


class Lines:
    """Files with one JSON object a line. The lines are counted once; after that a block is read by its range of bytes."""

    def __init__(self) -> None:
        self._file = lru_cache(OPEN_FILES)(Location.open)

    def schema(self, location: Location) -> pa.Schema:
        """Return `_SCHEMA`, or the names in the first line if that lacks a needed column. Others may come later."""
        with location.open() as file:
            try:
                check_beginning(file.read(1 << 10))
                file.seek(0)
                first = next((line for line in lines(file) if not is_blank(line)), b"{}")
                names = list(record(first))
            except NotJson as why:
                raise DataError(f"{location.name}, row 0: {why}") from None
        if first != b"{}" and any(needed not in names for needed in NEEDED):
            return pa.schema([(name, pa.null()) for name in names])
        return _SCHEMA

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """Make blocks of about `BLOCK_BYTES`; blank lines are no rows."""
        blocks: list[Block] = []
        first = rows = start = end = 0

        def close() -> None:
            if rows:
                blocks.append(Block(location, start, first, rows, end - start, f"bytes {start} to {end - 1}"))

        with location.open() as file:
            try:
                for line in lines(file):
                    end += len(line)
                    rows += not is_blank(line)
                    if end - start >= BLOCK_BYTES:
                        close()
                        first, rows, start = first + rows, 0, end
            except NotJson as why:
                raise DataError(f"{location.name}, row {first + rows}: {why}") from None
        close()
        return blocks

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows of the block as one batch.

        Raises:
            DataError: with file, row and field: a line that is no object, or has a field of another type.
        """
        names = [name for name in _SCHEMA.names if any(column.partition(".")[0] == name for column in columns)]
        data = self._file(block.location).read_at(block.bytes, block.index)
        found = (line for line in data.split(b"\n") if not is_blank(line))
        records = [_record(line, block, row) for row, line in enumerate(found)]
        yield pa.RecordBatch.from_arrays([arrow_column(records, name, block) for name in names], names)

    def restored(self, row: dict[str, Any]) -> dict[str, Any]:
        """Give the messages of a row all of their fields back."""
        return {name: _restored(value) for name, value in row.items()}


def _record(line: bytes, block: Block, row: int) -> dict[str, Any]:
    try:
        return record(line)
    except NotJson as why:
        raise DataError(f"{block.place(row)}: {why}") from None


def arrow_column(records: Sequence[dict[str, Any]], name: str, block: Block) -> pa.Array:
    """Make a column of a block. Where the values are as `_SCHEMA` has them Arrow does it alone, which is ten times faster."""
    values, kind = [fields.get(name) for fields in records], _SCHEMA.field(name).type
    if all(map(_has_messages if pa.types.is_list(kind) else _is_scalar_or_object, values)):
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            pass  # what is wrong with which row is found below
    return pa.concat_arrays([arrow_value(value, name, block.place(row)) for row, value in enumerate(values)])


def _is_scalar_or_object(value: Any) -> bool:
    """Whether a value is no list; Arrow would take an empty list for an object."""
    return type(value) is not list


def _has_messages(value: Any) -> bool:
    """Whether a value is null, or a list of messages that have nothing but role and content."""
    return value is None or (
        type(value) is list and all(type(message) is dict and message.keys() <= {"role", "content"} for message in value)
    )


def arrow_value(value: Any, name: str, where: str) -> pa.Array:
    """Make a column of one row, by the rules that Arrow alone would not keep.

    Raises:
        DataError: it is of another type.
    """
    try:
        return pa.array([COLUMNS[name](value, where, name)], _SCHEMA.field(name).type)
    except UnicodeEncodeError:
        raise DataError(f"{where}, {name}: not Unicode: half of a surrogate pair is spelt there") from None


def _refuse(value: Any, where: str, column: str) -> DataError:
    return DataError(f"{where}, {column}: given {shown(value)}; expected {expected(column)}")


def _text(value: Any, where: str, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _refuse(value, where, column)
    return value


def _messages(value: Any, where: str, column: str) -> list[dict[str, str | None]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise _refuse(value, where, column)
    return [_message(message, where, column) for message in value]


def _message(given: Mapping[str, Any], where: str, column: str) -> dict[str, str | None]:
    rest = {key: value for key, value in given.items() if key not in ("role", "content")}
    if rest and depth(rest) > _DEEPEST:
        raise DataError(f"{where}, {column}: a message has fields that are nested more than {_DEEPEST} deep: {shown(rest)}")
    said = {key: _text(given.get(key), where, column) for key in ("role", "content")}
    return {**said, "more": json.dumps(rest) if rest else None}


def _demonstrations(value: Any, where: str, column: str) -> list[list[dict[str, str | None]] | None] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _refuse(value, where, column)
    as_messages = ([{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in value)
    return [_messages(one, where, column) for one in as_messages]


def _truth(value: Any, where: str, column: str) -> dict[str, str | None] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse(value, where, column)
    truth = value.get("ground_truth")
    if truth is not None and not isinstance(truth, str):
        raise DataError(
            f"{where}, {column}.ground_truth: given {shown(truth)}; expected text (in quotation marks; tools/prepare_data.py "
            "columns writes numbers so)"
        )
    return {"ground_truth": truth}


def _identity(value: Any, where: str, column: str) -> dict[str, str | None] | None:
    if value is None:
        return None
    index = value.get("index") if isinstance(value, Mapping) else 0.5
    if isinstance(index, bool | float) or not isinstance(index, str | int | None):
        raise _refuse(value, where, column)
    level = value.get("level")
    if isinstance(level, list | Mapping):
        raise _refuse(value, where, column)
    return {"index": None if index is None else str(index), "level": None if level is None else str(level)}


COLUMNS: dict[str, Callable[[Any, str, str], Any]] = {
    "prompt": _messages,
    "target": _messages,
    "target_lst": _demonstrations,
    "data_source": _text,
    "reward_model": _truth,
    "extra_info": _identity,
}
"""Column → the function that brings one of its values into the form of `_SCHEMA`."""
assert set(COLUMNS) == {column.partition(".")[0] for column in READ}


def _restored(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [_restored(one) if isinstance(one, list) else _whole(one) for one in value]


def _whole(message: dict[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in message.items() if key != "more"}
    return {**said, **json.loads(message["more"])} if message["more"] else said
