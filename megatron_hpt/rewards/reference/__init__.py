"""The rule that HPT reports with: the last \\boxed{…} of the response against the ground truth.

Version 6 of the reference (docs/rewards.md): equal after undoing ways of writing, or equal as one would say it, or equal by
math-verify. No box, an empty one, or one that does not close is a wrong answer, not an ungraded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix

from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.reference import symbolic
from megatron_hpt.rewards.reference.boxes import last_boxed, unboxed
from megatron_hpt.rewards.reference.forms import listed, number, rational, readable, spoken, typeset

Truth = str | int | float | Sequence[str]

_ROUNDING = Fraction(2, 10**6)
"""Plain numbers that differ by less may be equal after math-verify's rounding to six places."""
_REPETITIVE_FROM, _REPETITIVE_SHARE = 128, 0.2


def reward(answer: Answer) -> float:
    """As `grade`."""
    return grade(answer.response, answer.ground_truth)


def grade(response: str, ground_truth: Truth) -> float:
    """1.0 if the last boxed answer equals the ground truth, or one of several, else 0.0. It may take long."""
    given = last_boxed(response)
    if given is None or not given.strip():
        return 0.0
    accepted = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    return float(any(equal(given, unboxed(str(truth))) for truth in accepted))


@lru_cache(maxsize=4096)
def equal(given: str, truth: str) -> bool:
    """Whether two answers are the same. What is cheap comes first; a truth that is not an expression is compared as text."""
    given, truth = given.strip(), truth.strip()
    if given == truth:
        return True
    plain = _compare_numbers(given, truth)
    if plain is not None:
        return plain
    if not (symbolic.is_parsable(given) and symbolic.is_parsable(truth)):
        return False
    if typeset(given) == typeset(truth) or _same_spoken(given, truth):
        return True
    if _is_repetitive(given) or _is_repetitive(truth):
        return False
    return _same_expression(given, truth)


def _same_spoken(given: str, truth: str) -> bool:
    said = spoken(given)
    return bool(said) and said == spoken(truth)


def _same_expression(given: str, truth: str) -> bool:
    given, truth = listed(given), listed(truth)
    if symbolic.equal(given, truth):
        return True
    plain = readable(given), readable(truth)
    return plain != (given, truth) and symbolic.equal(*plain)


def _compare_numbers(given: str, truth: str) -> bool | None:
    """Whether two plain numbers or fractions are equal; None if one is neither, or they differ by what is rounded away."""
    one: Decimal | Fraction | None = number(given)
    other: Decimal | Fraction | None = number(truth)
    if one is None or other is None:
        one, other = rational(given), rational(truth)
    if one is None or other is None:
        return None
    if one == other:
        return True
    return False if abs(one - other) > _ROUNDING else None


def _is_repetitive(text: str) -> bool:
    """Long, and over a fifth of its substrings have occurred before: what a policy writes that has got stuck."""
    if len(text) <= _REPETITIVE_FROM:
        return False
    suffixes = sorted(text[start:] for start in range(len(text)))
    repeated = sum(len(commonprefix(pair)) for pair in pairwise(suffixes))  # noqa: RUF071 (of characters)
    return repeated > _REPETITIVE_SHARE * len(text) * (len(text) + 1) / 2
