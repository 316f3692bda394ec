"""The verifier of mathematics: the answer in the last box against the ground truth, as a mathematician would judge it.

How a text is read: `writing` (one spelling), `structure` (lists, sets, relations), `quantities` (units), `expressions` (LaTeX);
what is equal: `equality`, and `values` for expressions. No box, an empty one, or one that does not close is a wrong answer,
not an ungraded one; so is a box inside the reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megatron_hpt.rewards.boxes import boxed_answer, unboxed
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.math import equality
from megatron_hpt.rewards.math.quantities import marks

Truth = str | int | float | Sequence[str]

_equal = lru_cache(maxsize=4096)(equality.equal)


def reward(answer: Answer) -> float:
    """As `grade`."""
    return grade(answer.response, answer.ground_truth)


def grade(response: str, ground_truth: Truth) -> float:
    """1.0 if the last box behind the reasoning says the same as the ground truth, or as one of several, else 0.0."""
    given = boxed_answer(response)
    if given is None:
        return 0.0
    accepted = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    return float(any(_equal(given, unboxed(str(truth))) for truth in accepted))


def strict(answer: Answer) -> float:
    """As `reward`, and what stands behind the number must be written alike: units, words, per cent; so must a name."""
    given, truth = boxed_answer(answer.response), unboxed(answer.ground_truth)
    return float(given is not None and marks(given) == marks(truth) and _equal(given, truth))
