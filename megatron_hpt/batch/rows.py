"""The row, which is what the coordinator hands to the trainer, and its Arrow schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from megatron_hpt.errors import DataError
from megatron_hpt.objective.roles import Role


class Source(StrEnum):
    """Who wrote the response."""

    ROLLOUT = "rollout"
    DEMONSTRATION = "demonstration"


@dataclass(frozen=True)
class Row:
    """One response to one prompt. It is recorded as token ids, so that no text is tokenised again."""

    prompt_id: str
    group: int
    """Index of the prompt in the step."""
    source: Source
    tokens: Sequence[int]
    """Ids of the prompt and of the response."""
    prompt_length: int
    behaviour_logprobs: Sequence[float] | None
    """log π of the engine for every response token; None for a demonstration."""
    reward: float | None
    """None if it was not graded; a demonstration is graded only where its advantage depends on it."""
    advantage: float | None
    """Â of every token; None where it is not estimated (nothing is trained, or no reward), or differs from token to token."""
    weight: float
    """Factor of the row in the loss; a row of weight 0 is recorded and not trained."""
    policy_version: int | None
    """Version of the weights that sampled it; None for a demonstration."""
    finish_reason: str | None = None
    off_policy: bool = False
    """Whether it is a demonstration that trains by off-policy RL instead of being imitated."""
    token_advantages: Sequence[float] | None = None
    """Â of each response token, where it differs between them."""
    routes: bytes | None = None
    """Experts that the engine chose, int16 [tokens − 1, layers, top-k]; None if not recorded: routed live in training."""

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
    ]
)
_META = b"megatron_hpt"


@dataclass(frozen=True)
class Batch:
    """One step: its rows, the gate's decisions and the coordinator's metrics."""

    step: int
    rows: Sequence[Row]
    decisions: Sequence[dict[str, Any]] = field(default_factory=tuple)
    metrics: dict[str, Any] = field(default_factory=dict)


def to_table(batch: Batch) -> pa.Table:
    """Return the rows as an Arrow table; its schema's metadata hold the step, the decisions and the metrics as JSON."""
    meta = {"step": batch.step, "decisions": list(batch.decisions), "metrics": batch.metrics}
    schema = SCHEMA.with_metadata({_META: json.dumps(meta).encode()})
    return pa.Table.from_pylist([asdict(row) for row in batch.rows], schema=schema)


def from_table(table: pa.Table) -> Batch:
    """Read what `to_table` wrote.

    Raises:
        DataError: the table has another schema.
    """
    if not table.schema.equals(SCHEMA, check_metadata=False):
        raise DataError(f"not a batch of this project: columns {table.schema.names}, expected {SCHEMA.names}")
    meta = _meta(table.schema)
    rows = [Row(**{**row, "source": Source(row["source"])}) for row in table.to_pylist()]
    return Batch(meta["step"], rows, meta["decisions"], meta["metrics"])


def from_schema(schema: pa.Schema) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the decisions and metrics from the schema of what `to_table` wrote."""
    meta = _meta(schema)
    return meta["decisions"], meta["metrics"]


def _meta(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {})[_META])
