"""Corrections of the train-inference mismatch: what separates the engine's probabilities from the trainer's.

They act on rollout rows only. With one optimizer step a batch the trainer's own π_θold is π_θ before the step, so a
corrected term measures its ratio from there and weighs tokens by w = π_θold (trainer) / π (engine).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_hpt.objective.tokens import Tokens


class Corrected(NamedTuple):
    """What a correction gives a term, all [tokens] and without gradient."""

    old_logprobs: Tensor
    """log π_θold for the ratio."""
    weights: Tensor
    """Factor of each token; 0 drops it."""


class Correction(Protocol):
    """A choice of correction."""

    @property
    def formula(self) -> str:
        """The factor, for people."""

    def __call__(self, tokens: Tokens) -> Corrected:
        """Old log-probabilities and factors."""


@dataclass(frozen=True)
class NoCorrection:
    """π_θold is the engine's own probability: one forward less, and the ratio itself holds the mismatch."""

    formula: str = ""

    def __call__(self, tokens: Tokens) -> Corrected:
        return Corrected(tokens.behaviour_logprobs, torch.ones_like(tokens.behaviour_logprobs))


@dataclass(frozen=True)
class _Mismatch:
    """A bound on w, per token or per sequence (geometric mean over the response)."""

    high: float
    sequence: bool = False

    def ratio(self, tokens: Tokens) -> Tensor:
        """w, [tokens]."""
        log_ratio = tokens.logprobs.detach() - tokens.behaviour_logprobs
        return (tokens.row_mean(log_ratio) if self.sequence else log_ratio).exp()


@dataclass(frozen=True)
class Truncated(_Mismatch):
    """TIS, truncated importance sampling: min(w, high) ("Your efficient RL framework secretly brings you off-policy
    RL training", Yao et al. 2025)."""

    @property
    def formula(self) -> str:
        return f"tis: min(w, {self.high:g})"

    def __call__(self, tokens: Tokens) -> Corrected:
        return Corrected(tokens.logprobs.detach(), self.ratio(tokens).clamp(max=self.high))


@dataclass(frozen=True)
class Masked(_Mismatch):
    """MIS, masked importance sampling: w up to `high`, tokens or sequences beyond it are dropped (Liu, Li et al. 2025,
    "When speed kills stability")."""

    @property
    def formula(self) -> str:
        return f"mis: w·1[w ≤ {self.high:g}]"

    def __call__(self, tokens: Tokens) -> Corrected:
        ratio = self.ratio(tokens)
        # torch.where: an overflowed ratio times 0 is no number.
        return Corrected(tokens.logprobs.detach(), torch.where(ratio <= self.high, ratio, 0.0))


@dataclass(frozen=True)
class IcePop(_Mismatch):
    """IcePop: w inside [low, high], nothing outside (Ring-1T report, arXiv 2510.18855)."""

    low: float = 0.0

    @property
    def formula(self) -> str:
        return f"icepop: w·1[{self.low:g} ≤ w ≤ {self.high:g}]"

    def __call__(self, tokens: Tokens) -> Corrected:
        ratio = self.ratio(tokens)
        return Corrected(tokens.logprobs.detach(), torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0))
