"""Estimate the advantages of a batch's rows with the algorithm's estimators.

The coordinator does so when it assembles a batch; the trainer does it again where a KL penalty enters the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.config import Config
from megatron_hpt.objective.advantage import Outcome
from megatron_hpt.objective.algorithm import Algorithm

TokenRewards = Mapping[int, np.ndarray]
"""Index of a row → reward of each of its response tokens (float64), which is added to what the verifier gave the response."""


def with_advantages(
    rows: Sequence[Row], estimated: Sequence[int], algorithm: Algorithm, *token_rewards: TokenRewards
) -> list[Row]:
    """Estimate the advantages of some rows; return all rows with the new advantages in place of those that they had.

    An advantage that is the same for all tokens of a row goes to `Row.advantage`, else to `Row.token_advantages`.

    Args:
        estimated: indices of the rows that take part; the others get no advantage.
        token_rewards: penalties on rewards; those of the same token are added.
    """
    result = [replace(row, advantage=None, token_advantages=None) for row in rows]
    outcomes = [_outcome(rows[index], [penalty[index] for penalty in token_rewards if index in penalty]) for index in estimated]
    estimates = algorithm.estimate([rows[index].role for index in estimated], outcomes)
    for index, estimate in zip(estimated, estimates, strict=True):
        scalar = estimate[0] if isinstance(estimate, list) and len(set(estimate)) == 1 else estimate
        field = "token_advantages" if isinstance(scalar, list) else "advantage"
        result[index] = replace(result[index], **{field: scalar})
    return result


def _outcome(row: Row, penalties: Sequence[np.ndarray]) -> Outcome:
    sums = sum(penalties).tolist() if penalties else None
    return Outcome(row.group, row.reward, row.response_length, row.source is Source.DEMONSTRATION, sums)


def overlong_penalties(rows: Sequence[Row], config: Config) -> TokenRewards:
    """Compute DAPO's soft punishment of long rollouts, which is given to their last token (arXiv 2503.14476, eq. 13).

    It grows from 0 to `overlong.penalty` over the last `overlong.buffer` tokens before the limit. Rollouts that are shorter,
    and demonstrations, are absent from the result.
    """
    overlong, limit = config.algorithm.overlong, config.data.max_response_length
    if not overlong.buffer:
        return {}
    penalties = {}
    for index, row in enumerate(rows):
        beyond = row.response_length - (limit - overlong.buffer)
        if row.source is Source.ROLLOUT and beyond > 0:
            penalties[index] = np.zeros(row.response_length)
            penalties[index][-1] = -overlong.penalty * min(1.0, beyond / overlong.buffer)
    return penalties
