"""The table: every algorithm is a record of choices, not a branch.

A record is made from the recipe's settings because some choices carry numbers (the gate's threshold, Dr. GRPO's
constant length); no number of the paper stands in the code.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_hpt.config import AlgorithmConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.advantage import Advantage, GroupCentred, GroupStandardised, One
from megatron_hpt.objective.aggregation import Aggregation, ConstantLength, SequenceMean, TokenMean
from megatron_hpt.objective.gate import AlwaysDemonstrations, AlwaysRollouts, Choice, Gate, Switch
from megatron_hpt.objective.reference import Current, Old, Reference
from megatron_hpt.objective.shaping import Identity, Shaping
from megatron_hpt.objective.stability import Clip, NoMask, Stability


@dataclass(frozen=True)
class Term:
    """One source of gradient: mask · 1/π_ref · Â · ∇π, and how its tokens are added up."""

    reference: Reference
    advantage: Advantage
    aggregation: Aggregation
    stability: Stability = field(default_factory=NoMask)
    shaping: Shaping = field(default_factory=Identity)
    coefficient: float = 1.0


@dataclass(frozen=True)
class Algorithm:
    """What happens to rollouts, to demonstrations, and which prompt gives which."""

    rollouts: Term
    demonstrations: Term
    gate: Gate
    entropy_coefficient: float = 0.0


def sft(config: AlgorithmConfig, length: int) -> Algorithm:
    """Supervised fine-tuning: token-mean negative log-likelihood of the demonstrations."""
    return Algorithm(_centred(length), _likelihood(config), AlwaysDemonstrations(), config.entropy_coefficient)


def grpo(config: AlgorithmConfig, length: int) -> Algorithm:
    """GRPO (arXiv 2402.03300): clipped ratio, standardised within the group, mean over each sequence."""
    rollouts = Term(Old(), GroupStandardised(), SequenceMean(), Clip())
    return Algorithm(rollouts, _likelihood(config), AlwaysRollouts(), config.entropy_coefficient)


def dr_grpo(config: AlgorithmConfig, length: int) -> Algorithm:
    """Dr. GRPO (arXiv 2503.20783): centred only, constant length, clipped ratio."""
    rollouts = Term(Old(), GroupCentred(), ConstantLength(length), Clip())
    return Algorithm(rollouts, _likelihood(config), AlwaysRollouts(), config.entropy_coefficient)


def hpt(config: AlgorithmConfig, length: int) -> Algorithm:
    """Hybrid post-training (arXiv 2509.04419): Dr. GRPO above the gate, SFT below.

    As in the reference code the ratio is not clipped, and demonstrations are a token mean. Unlike there, both
    denominators are global: the reference sums rollouts over rows and averages demonstrations within a micro-batch, so
    the balance of the two depends on how the batch was cut.
    """
    without = Choice.ROLLOUTS if config.gate.missing_demonstration == "rollouts" else Choice.SKIPPED
    gate = Switch(config.gate.threshold, without)
    return Algorithm(_centred(length), _likelihood(config), gate, config.entropy_coefficient)


def _centred(length: int) -> Term:
    return Term(Old(), GroupCentred(), ConstantLength(length))


def _likelihood(config: AlgorithmConfig) -> Term:
    return Term(Current(), One(), TokenMean(), coefficient=config.demonstration_coefficient)


ALGORITHMS: dict[str, Callable[[AlgorithmConfig, int], Algorithm]] = {
    "sft": sft,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "hpt": hpt,
}


def build(config: AlgorithmConfig, max_response_length: int) -> Algorithm:
    """The record that a recipe names.

    Raises:
        ConfigError: no such row in the table.
    """
    if config.name not in ALGORITHMS:
        close = difflib.get_close_matches(config.name, ALGORITHMS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"algorithm.name: given {config.name!r}; allowed: {', '.join(ALGORITHMS)}{hint}")
    return ALGORITHMS[config.name](config, config.constant_length or max_response_length)
