"""maj@k: whether the most frequent answer of k samples is correct.

The expectation over all subsets of k of the n graded samples, so maj@1 is avg@k's mean and maj@n has no chance in it. Of
answers that are equally frequent each is taken with the same probability. A sample without an answer has no vote; if
none of the k has one, the result is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from math import comb

import numpy as np

EXACT_UP_TO = 64
"""Samples of a problem for which every subset is counted; of more, DRAWS subsets are drawn."""
DRAWS = 400


@dataclass(frozen=True)
class Votes:
    """The answers of one problem's graded samples, equal ones together."""

    counts: tuple[int, ...]
    """How many samples gave each answer."""
    correct: tuple[float, ...]
    """Share of them that the grader found correct: 0 or 1, unless it looks at more than the answer."""
    abstained: int = 0
    """How many samples had no answer."""

    @property
    def samples(self) -> int:
        """The number of all samples."""
        return sum(self.counts) + self.abstained


def votes(answers: Sequence[str | None], scores: Sequence[float | None]) -> Votes:
    """Count answers; answers with equal normal forms count as one. Samples without a grade are left out."""
    groups: dict[str, list[float]] = {}
    abstained = 0
    for answer, score in zip(answers, scores, strict=True):
        if score is None:
            continue
        if answer is None:
            abstained += 1
        else:
            groups.setdefault(normal_form(answer), []).append(score)
    counts = tuple(len(group) for group in groups.values())
    return Votes(counts, tuple(sum(group) / len(group) for group in groups.values()), abstained)


def majority_at_k(votes: Votes, ks: Sequence[int]) -> list[float]:
    """Compute for every k the probability that the majority of k of a problem's samples is correct.

    It is exact up to 64 samples; of more it is the mean over 400 subsets, which are always the same.

    Raises:
        ValueError: a k is not among 1 … n.
    """
    if any(not 1 <= k <= votes.samples for k in ks):
        raise ValueError(f"maj@k for k in {list(ks)} of {votes.samples} samples: k is at least 1 and at most that many")
    return (_exact if votes.samples <= EXACT_UP_TO else _drawn)(votes, ks)


def _exact(votes: Votes, ks: Sequence[int]) -> list[float]:
    """Count the subsets whose winners are correct, separately for each number v of votes that the winners have.

    For one v: `ways[t, s]` is the number of ways to choose s samples of the answers so far such that t answers have v votes
    and the others fewer, `right[t, s]` the same, each way times the sum of `correct` over those t.
    """
    size = max(ks)
    total = np.zeros(size + 1)
    for v in range(1, min(size, max(votes.counts, default=0)) + 1):
        rivals = [(m, share) for m, share in zip(votes.counts, votes.correct, strict=True) if m >= v]
        harmless = votes.samples - sum(m for m, _ in rivals)  # any number of them stays below v, or has no vote
        ways, right = np.zeros((2, len(rivals) + 1, size + 1))
        ways[0] = _choices(harmless, harmless, size)
        for m, share in rivals:
            below, at = _choices(m, v - 1, size), comb(m, v)
            new_ways, new_right = _times(ways, below), _times(right, below)
            new_ways[1:, v:] += at * ways[:-1, : size + 1 - v]
            new_right[1:, v:] += at * (right + share * ways)[:-1, : size + 1 - v]
            ways, right = new_ways, new_right
        total += (right[1:] / np.arange(1, len(rivals) + 1)[:, None]).sum(axis=0)
    return [float(total[k] / comb(votes.samples, k)) for k in ks]


def _choices(m: int, most: int, size: int) -> np.ndarray:
    """Return in how many ways s ≤ most of m can be chosen, for s = 0 … size."""
    return np.array([comb(m, s) if s <= most else 0 for s in range(size + 1)], dtype=np.float64)


def _times(ways: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Multiply polynomials along the last axis, and cut the product at its length."""
    product = np.zeros_like(ways)
    for s in np.flatnonzero(choices):
        product[:, s:] += choices[s] * ways[:, : ways.shape[1] - s]
    return product


def _drawn(votes: Votes, ks: Sequence[int]) -> list[float]:
    """Average over prefixes of shuffled samples."""
    answers = len(votes.counts)
    labels = np.repeat(np.arange(answers + 1), (*votes.counts, votes.abstained))
    shuffled = np.random.default_rng(0).permuted(np.tile(labels, (DRAWS, 1)), axis=1)
    rows = np.arange(DRAWS)[:, None] * (answers + 1)
    correct = np.array(votes.correct)
    found = []
    for k in ks:
        flat = (rows + shuffled[:, :k]).ravel()
        counts = np.bincount(flat, minlength=DRAWS * (answers + 1)).reshape(DRAWS, answers + 1)[:, :answers]
        most = counts.max(axis=1, initial=0, keepdims=True)
        tied = (counts == most) & (most > 0)
        found.append(float(((tied * correct).sum(axis=1) / np.maximum(tied.sum(axis=1), 1)).mean()))
    return found


_COMMANDS = re.compile(r"\\(?:(?:left|right|displaystyle)(?![a-zA-Z])|[,!;:\s])|~|\$")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"(?P<sign>[+-]?)(?:\\frac\{(?P<a>\d+)\}\{(?P<b>\d+)\}|(?P<c>\d+)/(?P<d>\d+))")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")


def normal_form(answer: str) -> str:
    r"""Return the same text for answers that are plainly the same: spacing, ``\left``, ``\dfrac``, ``\text{…}``, 0.50 and 1/2.

    It does no algebra, and knows nothing of the correct answer: wrong answers are as likely to be found equal as right ones.
    """
    text = _TEXT.sub(r"\1", _COMMANDS.sub("", answer))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\s+", "", text)).rstrip(".")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return _value(text) or text


def _value(text: str) -> str | None:
    """Write a plain number or fraction as a reduced fraction; None if it is neither, or has hostilely many digits."""
    if len(text) > 100:
        return None
    if match := _FRACTION.fullmatch(text):
        above, below = int(match["a"] or match["c"]), int(match["b"] or match["d"])
        return str(Fraction(above, below) * (-1 if match["sign"] == "-" else 1)) if below else None
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", text):
        return None
    try:
        return str(Fraction(Decimal(text)))
    except InvalidOperation:
        return None
