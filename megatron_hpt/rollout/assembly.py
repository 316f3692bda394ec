"""From graded groups to the rows of a batch. The functions are pure; the coordinator calls them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_hpt.batch.advantages import TokenRewards, overlong_penalties, with_advantages
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.config import Config
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample
from megatron_hpt.objective.algorithm import Algorithm
from megatron_hpt.objective.gate import Choice, Decision, Gate, Situation, decides_early


@dataclass(frozen=True)
class Group:
    """A prompt, its rollouts and their rewards (None: ungraded)."""

    prompt: Prompt
    samples: Sequence[Sample] = ()
    rewards: Sequence[float | None] = ()
    demonstration_reward: float | None = None
    """The reward of the prompt's demonstration; None where the algorithm does not compare with it, or it is ungraded."""
    cancelled: int = 0
    """How many samples were requested, and cancelled when the decision was fixed."""


def decide(step: int, groups: Sequence[Group], gate: Gate, prompts: int, previous: Mapping[str, Choice]) -> list[Decision]:
    """Ask the gate about each group. Of a gate that refills, groups that train beyond the step's `prompts` are skipped.

    The coordinator calls this after every round of dynamic sampling; `assemble` calls it with all groups of the step.
    """
    decisions, full = [], 0
    for group in groups:
        decision = gate(situation(step, group, previous))
        if gate.refills and decision.choice is not Choice.SKIPPED:
            full += 1
            if full > prompts:
                skipped = {"choice": Choice.SKIPPED, "rollout_weight": 0.0, "demonstration_weight": 0.0}
                decision = replace(decision, **skipped)
        decisions.append(decision)
    return decisions


def situation(step: int, group: Group, previous: Mapping[str, Choice]) -> Situation:
    """Collect what the gate may know of a group.

    Args:
        previous: prompt id → the choice when the prompt was last seen.
    """
    prompt = group.prompt
    return Situation(
        prompt_id=prompt.prompt_id,
        rewards=group.rewards,
        has_demonstration=prompt.demonstration is not None,
        step=step,
        data_source=prompt.data_source,
        previous=previous.get(prompt.prompt_id),
        cancelled=group.cancelled,
    )


@dataclass(frozen=True)
class GateDecider:
    """The `Decider` of training: it asks the gate while a step's rollouts are made."""

    gate: Gate
    step: int
    previous: Mapping[str, Choice]

    def decides_early(self, prompt: Prompt, wanted: int) -> bool:
        return decides_early(self.gate, situation(self.step, Group(prompt), self.previous), wanted)

    def decided(self, prompt: Prompt, rewards: Sequence[float | None], wanted: int) -> bool:
        return self.gate.decided(situation(self.step, Group(prompt, rewards=rewards), self.previous), wanted)


def assemble(
    step: int,
    groups: Sequence[Group],
    algorithm: Algorithm,
    config: Config,
    metrics: dict[str, Any],
    previous: Mapping[str, Choice] | None = None,
) -> Batch:
    """Decide each group and lay out its rows.

    Every rollout becomes a row; rows that do not train have weight 0. A demonstration that trains is a row of its own.
    Rewards are recorded, and judged by the gate, as the verifier gave them; overlong penalties change the advantages only.

    Args:
        groups: of all rounds of the step, graded.
        metrics: what the coordinator measured; it is kept in the batch with the metrics that are computed here.
        previous: prompt id → the choice when the prompt was last seen.
    """
    decisions = decide(step, groups, algorithm.gate, config.trainer.prompts_per_step, previous or {})
    rows = [
        row
        for index, (group, decision) in enumerate(zip(groups, decisions, strict=True))
        for row in _rows(index, group, decision)
    ]
    penalties = overlong_penalties(rows, config)
    rows = with_advantages(rows, [index for index, row in enumerate(rows) if row.weight], algorithm, penalties)
    rows = [replace(row, weight=0.0) if _is_left_out(row, algorithm, config.algorithm.overlong.mask) else row for row in rows]
    numbers = {
        **rollout_metrics(groups),
        **_cancelled_metrics(groups),
        **_gate_metrics(decisions),
        **_row_metrics(rows, penalties),
        **metrics,
    }
    return Batch(step, rows, [asdict(decision) for decision in decisions], numbers)


def _rows(index: int, group: Group, decision: Decision) -> list[Row]:
    """Lay out the rows of a group with the weights of its decision, and without advantages."""
    prompt = group.prompt
    prompt_tokens = np.array(prompt.tokens, dtype=np.int32)
    rows = [
        Row(
            prompt_id=prompt.prompt_id,
            group=index,
            source=Source.ROLLOUT,
            tokens=np.concatenate([prompt_tokens, sample.tokens]),
            prompt_length=len(prompt.tokens),
            behaviour_logprobs=sample.logprobs,
            reward=reward,
            advantage=None,
            weight=decision.rollout_weight,
            policy_version=sample.version,
            finish_reason=sample.finish_reason,
            versions=sample.spans,
        )
        for sample, reward in zip(group.samples, group.rewards, strict=True)
    ]
    if decision.demonstration_weight and prompt.demonstration is not None:
        rows.append(
            Row(
                prompt_id=prompt.prompt_id,
                group=index,
                source=Source.DEMONSTRATION,
                tokens=[*prompt.tokens, *prompt.demonstration],
                prompt_length=len(prompt.tokens),
                behaviour_logprobs=None,
                reward=group.demonstration_reward,
                advantage=None,
                weight=decision.demonstration_weight,
                policy_version=None,
                off_policy=decision.choice is Choice.OFF_POLICY,
            )
        )
    return rows


def _is_left_out(row: Row, algorithm: Algorithm, mask_truncated: bool) -> bool:
    """Whether a row is kept out of the loss: it has no reward and the term of its role needs one, or it was cut off at the
    length limit and the recipe masks such rows."""
    if row.source is Source.ROLLOUT and mask_truncated and row.finish_reason == "length":
        return True
    return not row.is_estimated and algorithm.needs_estimate(row.role)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float | None]:
    """Average accuracy and lengths, and count failures, over all rollouts; averages are None where nothing was generated."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [reward for group in groups for reward in group.rewards]
    graded = [reward for reward in rewards if reward is not None]
    return {
        "rollout/accuracy": statistics.fmean(graded) if graded else None,
        "rollout/response_tokens": statistics.fmean(len(s.tokens) for s in samples) if samples else None,
        "rollout/truncated": statistics.fmean(s.finish_reason == "length" for s in samples) if samples else None,
        "rollout/tokens": sum(len(s.tokens) for s in samples),
        "rollout/ungraded": len(rewards) - len(graded),
    }


def lag_metrics(step: int, groups: Sequence[Group], max_lag: int) -> dict[str, float | None]:
    """Measure by how many steps the weights that sampled each response token are older than those that will train it.

    Args:
        max_lag: `rollout.max_lag`; for each lag up to it there is the share of the tokens.

    Returns:
        Metrics; averages and shares are None where nothing was generated.
    """
    tokens: Counter[int] = Counter()
    for group in groups:
        for sample in group.samples:
            for version, length in sample.spans:
                tokens[step - version] += length
    total = tokens.total()
    shares = {f"rollout/lag_{lag}_share": tokens[lag] / total if total else None for lag in range(max_lag + 1)}
    mean = sum(lag * number for lag, number in tokens.items()) / total if total else None
    oldest = max(tokens, default=None)
    return {
        "rollout/policy_version": None if oldest is None else step - oldest,
        "rollout/lag": mean,
        "rollout/lag_max": oldest,
        **(shares if max_lag else {}),
    }


def _cancelled_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Count the cancelled samples, and estimate how many tokens were saved.

    The samples of a prompt are decoded side by side, so a cancelled one was about as long as the longest finished one of
    its prompt; it would have become as long as the finished ones of the step that are longer than that are on average.
    """
    lengths = [len(sample.tokens) for group in groups for sample in group.samples]
    saved = 0.0
    for group in groups:
        if group.cancelled:
            reached = max(len(sample.tokens) for sample in group.samples)
            further = [length - reached for length in lengths if length > reached]
            saved += group.cancelled * statistics.fmean(further) if further else 0.0
    return {"rollout/cancelled": sum(group.cancelled for group in groups), "rollout/saved_tokens": saved}


def _gate_metrics(decisions: Sequence[Decision]) -> dict[str, float]:
    chosen = Counter(decision.choice for decision in decisions)
    shares = {choice: chosen[choice] / max(1, len(decisions)) for choice in Choice}
    return {
        "gate/sft_share": shares[Choice.DEMONSTRATION],
        "gate/rl_share": shares[Choice.ROLLOUTS],
        "gate/off_policy_share": shares[Choice.OFF_POLICY],
        "gate/both_share": shares[Choice.BOTH],
        "gate/skipped_share": shares[Choice.SKIPPED],
        "gate/prompts": len(decisions),
        "gate/rollout_weight": statistics.fmean(d.rollout_weight for d in decisions) if decisions else 0.0,
        "gate/demonstration_weight": statistics.fmean(d.demonstration_weight for d in decisions) if decisions else 0.0,
        "gate/missing_demonstrations": sum(decision.missing_demonstration for decision in decisions),
    }


def _row_metrics(rows: Sequence[Row], penalties: TokenRewards) -> dict[str, float]:
    rollouts = [row for row in rows if row.source is Source.ROLLOUT]
    return {
        "gate/ungraded_demonstrations": sum(row.source is Source.DEMONSTRATION and not row.is_estimated for row in rows),
        "overlong/penalty": -math.fsum(penalty[-1] for penalty in penalties.values()) / max(1, len(rollouts)),
        "overlong/masked": sum(row.is_estimated and not row.weight for row in rollouts),
    }
