"""The row, which is what the coordinator hands to the trainer, and its Arrow schema.

What a row has for every token are arrays. Read from a ledger they are views into the memory-mapped file, of which the system
reads a row's part only when it is used: every rank has all rows, so that all ranks make the same plan, and reads the tokens,
log-probabilities and routes of those that it packs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_hpt.arrays import ArrayRecord
from megatron_hpt.errors import DataError
from megatron_hpt.objective.roles import Role


class Source(StrEnum):
    """Who wrote the response."""

    ROLLOUT = "rollout"
    DEMONSTRATION = "demonstration"


_ARRAYS = {"tokens": np.int32, "behaviour_logprobs": np.float32, "token_advantages": np.float64, "routes": np.int16}
"""What a row has as arrays, in the ledger as views of its buffers, and the dtype of their elements."""


@dataclass(frozen=True, eq=False)
class Row(ArrayRecord):
    """One response to one prompt. It is recorded as token ids, so that no text is tokenised again."""

    prompt_id: str
    group: int
    """Index of the prompt in the step."""
    source: Source
    tokens: np.ndarray
    """int32: ids of the prompt and of the response."""
    prompt_length: int
    behaviour_logprobs: np.ndarray | None
    """float32: log π of the engine for every response token; None for a demonstration."""
    reward: float | None
    """None if it was not graded; a demonstration is graded only where its advantage depends on it."""
    advantage: float | None
    """Â of every token; None where it is not estimated (nothing is trained, or no reward), or differs from token to token."""
    weight: float
    """Factor of the row in the loss; a row of weight 0 is recorded and not trained."""
    policy_version: int | None
    """Oldest version of the weights that sampled it; None for a demonstration."""
    finish_reason: str | None = None
    off_policy: bool = False
    """Whether it is a demonstration that trains by off-policy RL instead of being imitated."""
    token_advantages: np.ndarray | None = None
    """float64: Â of each response token, where it differs between them."""
    routes: np.ndarray | None = None
    """int16 [tokens − 1, layers, top-k] or flat: experts that the engine chose; None if not recorded: training routes live."""
    versions: tuple[tuple[int, int], ...] | None = None
    """Versions that sampled the response, in order, each with its number of tokens; None for a demonstration, and for rollouts
    in ledgers that were written before there could be several."""

    def __post_init__(self) -> None:
        self.hold(**_ARRAYS)

    @property
    def role(self) -> Role:
        """Which terms of the loss the row belongs to."""
        if self.source is Source.ROLLOUT:
            return Role.ROLLOUT
        return Role.OFF_POLICY if self.off_policy else Role.DEMONSTRATION

    @property
    def is_estimated(self) -> bool:
        """Whether the row has an advantage."""
        return self.advantage is not None or self.token_advantages is not None

    @property
    def response_length(self) -> int:
        """Number of tokens of the response, end-of-sequence included."""
        return len(self.tokens) - self.prompt_length


SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("behaviour_logprobs", pa.list_(pa.float32())),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("policy_version", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("off_policy", pa.bool_(), nullable=False),
        pa.field("token_advantages", pa.list_(pa.float64())),
        pa.field("routes", pa.binary()),
        pa.field("versions", pa.list_(pa.struct({"version": pa.int32(), "tokens": pa.int32()}))),
    ]
)
PART_BYTES = 2**28
"""Rows of about so many bytes become one record batch. Arrow counts the bytes of a column of one record batch in 32 bits, and
the routes of a large batch are more; a batch without routes is one record batch."""
_META = b"megatron_hpt"
_PLAIN = [name for name in SCHEMA.names if name not in (*_ARRAYS, "versions")]
"""Columns of one value a row."""


@dataclass(frozen=True)
class Batch:
    """One step: its rows, the gate's decisions and the coordinator's metrics."""

    step: int
    rows: Sequence[Row]
    decisions: Sequence[dict[str, Any]] = field(default_factory=tuple)
    metrics: dict[str, Any] = field(default_factory=dict)


def schema_of(batch: Batch) -> pa.Schema:
    """Return the schema of a batch's table; its metadata hold the step, the decisions and the metrics as JSON."""
    meta = {"step": batch.step, "decisions": list(batch.decisions), "metrics": batch.metrics}
    return SCHEMA.with_metadata({_META: json.dumps(meta).encode()})


def to_parts(rows: Sequence[Row]) -> Iterator[pa.RecordBatch]:
    """Yield the rows as record batches of `SCHEMA`, each of at most `PART_BYTES` or of one row.

    They are made one after the other, so that whoever writes them needs the memory of one.
    """
    part: list[Row] = []
    size = 0
    for row in rows:
        own = sum(getattr(row, name).nbytes for name in _ARRAYS if getattr(row, name) is not None)
        if part and size + own > PART_BYTES:
            yield _to_part(part)
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield _to_part(part)


def _to_part(rows: Sequence[Row]) -> pa.RecordBatch:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["versions"] = [spans and [{"version": v, "tokens": n} for v, n in spans] for spans in columns["versions"]]
    arrays = [
        _column(columns[field.name], field.type, _ARRAYS[field.name])
        if field.name in _ARRAYS
        else pa.array(columns[field.name], field.type)
        for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _column(arrays: Sequence[np.ndarray | None], kind: pa.DataType, dtype: type[np.generic]) -> pa.Array:
    """Make a column of lists, or of binary values, from one array a row; the elements are copied once, and by numpy."""
    present = [array.reshape(-1) for array in arrays if array is not None]
    values = np.concatenate([np.empty(0, dtype), *present])
    is_binary = pa.types.is_binary(kind)
    sizes = [0 if array is None else array.nbytes if is_binary else array.size for array in arrays]
    offsets = pa.py_buffer(np.cumsum([0, *sizes], dtype=np.int32))
    valid = None if len(present) == len(arrays) else pa.array([array is not None for array in arrays]).buffers()[1]
    if is_binary:
        return pa.Array.from_buffers(kind, len(arrays), [valid, offsets, pa.py_buffer(values)])
    return pa.Array.from_buffers(kind, len(arrays), [valid, offsets], children=[pa.array(values)])


def from_table(table: pa.Table) -> Batch:
    """Read what `to_parts` and `schema_of` made, or what was written before rows had `versions`.

    The rows' arrays are views of the table's buffers.

    Raises:
        DataError: the table has another schema.
    """
    if "versions" not in table.schema.names:
        versions = SCHEMA.field("versions")
        table = table.append_column(versions, pa.nulls(table.num_rows, versions.type))
    if not table.schema.equals(SCHEMA, check_metadata=False):
        raise DataError(f"not a batch of this project: columns {table.schema.names}, expected {SCHEMA.names}")
    table.validate()
    meta = _meta(table.schema)
    rows = [row for part in table.to_batches() for row in _from_part(part)]
    return Batch(meta["step"], rows, meta["decisions"], meta["metrics"])


def _from_part(part: pa.RecordBatch) -> Iterator[Row]:
    plain = part.select(_PLAIN).to_pylist()
    views = zip(*(_views(part.column(name), dtype) for name, dtype in _ARRAYS.items()), strict=True)
    for row, arrays, spans in zip(plain, views, part.column("versions").to_pylist(), strict=True):
        row["source"] = Source(row["source"])
        versions = None if spans is None else tuple((span["version"], span["tokens"]) for span in spans)
        yield Row(**row, **dict(zip(_ARRAYS, arrays, strict=True)), versions=versions)


def _views(column: pa.ListArray | pa.BinaryArray, dtype: type[np.generic]) -> list[np.ndarray | None]:
    """Return the elements of each row without copying them; None where the row has none."""
    if pa.types.is_binary(column.type):
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, np.int32)[column.offset :] if len(column) else ()
        values = np.frombuffer(data or b"", np.uint8)
    else:
        bounds, values = column.offsets.to_numpy(), column.values.to_numpy()
    return [
        values[start:end].view(dtype) if is_valid else None
        for start, end, is_valid in zip(bounds[:-1], bounds[1:], column.is_valid().to_pylist(), strict=False)
    ]


def from_schema(schema: pa.Schema) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the decisions and metrics from the schema of a batch's table."""
    meta = _meta(schema)
    return meta["decisions"], meta["metrics"]


def _meta(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {})[_META])
