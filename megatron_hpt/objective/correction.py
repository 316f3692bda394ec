"""Corrections of the train-inference mismatch: what separates the engine's probabilities from the trainer's.

They act on rollout rows only. A corrected term measures its ratio from the trainer's own π_θold, the policy when the batch
arrived, and weighs tokens by w = π_θold (trainer) / π (engine): decoupled PPO (arXiv 2505.24298). With one optimizer
step a batch that is π_θ before the step; with more, `Tokens.old_logprobs` has it (algorithm.old_policy=trainer).
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
    """π_θold is the engine's own probability: one forward less, and the ratio itself holds the mismatch.

    With `Tokens.old_logprobs` it is the trainer's, and nothing accounts for the mismatch.
    """

    formula: str = ""

    def __call__(self, tokens: Tokens) -> Corrected:
        old = tokens.behaviour_logprobs if tokens.old_logprobs is None else tokens.old_logprobs
        return Corrected(old, torch.ones_like(old))


@dataclass(frozen=True)
class _Mismatch:
    """A bound on w, per token or per sequence (geometric mean over the response)."""

    high: float
    sequence: bool = False

    def old_logprobs(self, tokens: Tokens) -> Tensor:
        """log π_θold of the trainer, [tokens]."""
        return tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs

    def ratio(self, tokens: Tokens) -> Tensor:
        """w, [tokens]."""
        log_ratio = self.old_logprobs(tokens) - tokens.behaviour_logprobs
        return (tokens.row_mean(log_ratio) if self.sequence else log_ratio).exp()


@dataclass(frozen=True)
class Truncated(_Mismatch):
    """TIS, truncated importance sampling: min(w, high) ("Your efficient RL framework secretly brings you off-policy
    RL training", Yao et al. 2025)."""

    @property
    def formula(self) -> str:
        return f"tis: min(w, {self.high:g})"

    def __call__(self, tokens: Tokens) -> Corrected:
        return Corrected(self.old_logprobs(tokens), self.ratio(tokens).clamp(max=self.high))


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
        return Corrected(self.old_logprobs(tokens), torch.where(ratio <= self.high, ratio, 0.0))


@dataclass(frozen=True)
class IcePop(_Mismatch):
    """IcePop: w inside [low, high], nothing outside (Ring-1T report, arXiv 2510.18855)."""

    low: float = 0.0

    @property
    def formula(self) -> str:
        return f"icepop: w·1[{self.low:g} ≤ w ≤ {self.high:g}]"

    def __call__(self, tokens: Tokens) -> Corrected:
        ratio = self.ratio(tokens)
        return Corrected(self.old_logprobs(tokens), torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0))
