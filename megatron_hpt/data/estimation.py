"""Advantages of a batch's rows, by the algorithm's estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_hpt.data.rows import Row, Source
from megatron_hpt.objective.advantage import Outcome
from megatron_hpt.objective.algorithm import Algorithm


def with_advantages(
    rows: Sequence[Row],
    estimated: Sequence[int],
    algorithm: Algorithm,
    token_rewards: Mapping[int, Sequence[float]] | None = None,
) -> list[Row]:
    """The rows with their advantages filled in.

    Args:
        estimated: indices of the rows that take part; the others have no advantage.
        token_rewards: index of a row → reward of each of its response tokens besides `Row.reward` (a KL penalty).
    """
    result = [replace(row, advantage=None, token_advantages=None) for row in rows]
    penalties = token_rewards or {}
    outcomes = [_outcome(rows[index], penalties.get(index)) for index in estimated]
    estimates = algorithm.estimate([rows[index].role for index in estimated], outcomes)
    for index, estimate in zip(estimated, estimates, strict=True):
        scalar = estimate[0] if isinstance(estimate, list) and len(set(estimate)) == 1 else estimate
        field = "token_advantages" if isinstance(scalar, list) else "advantage"
        result[index] = replace(result[index], **{field: scalar})
    return result


def _outcome(row: Row, token_rewards: Sequence[float] | None) -> Outcome:
    return Outcome(row.group, row.reward, row.response_length, row.source is Source.DEMONSTRATION, token_rewards)
