"""How long the prompts and responses of a step are. Pure; no torch. `ledger_lengths` measures them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_hpt.config import Config

EVEN_PARTS = 12
"""Equal parts of the responses; the last is halved until a part is `LONGEST_PART`, because what is longest ends a batch."""
LONGEST_PART = 1 / 2048


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts and responses of a batch."""

    prompt: float
    """Mean of the prompts."""
    parts: tuple[tuple[float, float], ...]
    """(tokens, share of all responses with about as many), rising."""
    demonstration: float
    """Mean of the demonstrations' responses."""
    origin: str
    """Where they are known from, as a plan shows it."""

    @property
    def response(self) -> float:
        """Mean of the responses."""
        return sum(tokens * share for tokens, share in self.parts)

    @property
    def longest(self) -> float:
        """The longest responses."""
        return self.parts[-1][0]

    def rows(self, count: int) -> list[int]:
        """Return the tokens, prompt included, of so many rows of rollouts: each part has its share of them."""
        ends = [round(count * share) for share in accumulate(share for _, share in self.parts)]
        parts = zip(pairwise([0, *ends[:-1], count]), self.parts, strict=True)
        return [max(2, round(self.prompt + tokens)) for (start, end), (tokens, _) in parts for _ in range(start, end)]


def of_means(prompt: float, response: float, limit: float, origin: str) -> Lengths:
    """Return lengths of which only means are known.

    The responses have the distribution with this mean on 0 … `limit` that assumes least (its entropy is the largest): a
    truncated exponential, which is even where the mean is half the limit and has a long tail where it is a small part of it.
    """
    response = min(response, limit)
    tilt = _tilt(response / limit)
    middles = [(low + high) / 2 for low, high in pairwise(_levels())]
    tokens = [limit * _quantile(level, tilt) for level in middles]
    shares = [high - low for low, high in pairwise(_levels())]
    # Middles of parts have nearly the mean that was asked for; the rest of the difference is shared in proportion.
    scale = response / sum(each * share for each, share in zip(tokens, shares, strict=True))
    parts = tuple((min(limit, each * scale), share) for each, share in zip(tokens, shares, strict=True))
    return Lengths(prompt, parts, response, origin)


def of_fill(config: Config, fill: float) -> Lengths:
    """Return lengths whose means are a share of their limits."""
    limit = config.data.max_response_length
    return of_means(fill * config.data.max_prompt_length, fill * limit, limit, f"{fill:.0%} of their limits on average")


def of_responses(rising: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Return the parts of measured lengths, which are sorted; parts into which no response falls are left out."""
    ends = [round(len(rising) * level) for level in _levels()]
    cuts = [(start, end) for start, end in pairwise(ends) if start < end]
    return tuple((sum(rising[start:end]) / (end - start), (end - start) / len(rising)) for start, end in cuts)


def _levels() -> list[float]:
    """Return the shares of responses at which parts begin and end, 0 and 1 included."""
    even = [part / EVEN_PARTS for part in range(EVEN_PARTS)]
    tail = [1 - 2**-halving / EVEN_PARTS for halving in range(1, math.ceil(-math.log2(LONGEST_PART * EVEN_PARTS)) + 1)]
    return [*even, *tail, 1.0]


def _tilt(mean: float) -> float:
    """Return the λ of a density in proportion to e^(λx) on 0 … 1 that has this mean, by bisection."""
    low, high = -700.0, 700.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(middle) < mean else (low, middle)
    return (low + high) / 2


def _mean(tilt: float) -> float:
    if abs(tilt) < 1e-4:
        return 0.5 + tilt / 12
    return 1 / -math.expm1(-tilt) - 1 / tilt


def _quantile(level: float, tilt: float) -> float:
    if abs(tilt) < 1e-4:
        return level
    if tilt > 0:  # as below, without e^λ, which may be too large for a float
        return 1 + math.log(level + (1 - level) * math.exp(-tilt)) / tilt
    return math.log1p(level * math.expm1(tilt)) / tilt
