"""From graded groups to the rows of a batch: a pure function."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hpt.data.prompts import Prompt
from megatron_hpt.data.rows import Batch, Row, Source
from megatron_hpt.objective.algorithms import Algorithm
from megatron_hpt.objective.gate import Choice, Decision
from megatron_hpt.rollout.engine import Sample


@dataclass(frozen=True)
class Group:
    """A prompt, its rollouts and their rewards (None: ungraded)."""

    prompt: Prompt
    samples: Sequence[Sample] = ()
    rewards: Sequence[float | None] = ()


def assemble(step: int, groups: Sequence[Group], algorithm: Algorithm, metrics: dict[str, Any]) -> Batch:
    """Decide each group and lay out its rows.

    Every rollout is recorded; those that do not train have weight 0. A demonstration is a row of its own.
    """
    decisions = [algorithm.gate(g.prompt.prompt_id, g.rewards, g.prompt.demonstration is not None) for g in groups]
    rows = [
        row
        for index, (group, decision) in enumerate(zip(groups, decisions, strict=True))
        for row in _rows(index, group, decision.choice, algorithm)
    ]
    return Batch(step, rows, [asdict(d) for d in decisions], {**rollout_metrics(groups), **_gate_metrics(decisions), **metrics})


def _rows(index: int, group: Group, choice: Choice, algorithm: Algorithm) -> list[Row]:
    prompt, advantages = group.prompt, algorithm.rollouts.advantage(group.rewards)
    rows = [
        Row(
            prompt_id=prompt.prompt_id,
            group=index,
            source=Source.ROLLOUT,
            tokens=[*prompt.tokens, *sample.tokens],
            prompt_length=len(prompt.tokens),
            behaviour_logprobs=sample.logprobs,
            reward=reward,
            advantage=advantage,
            weight=1.0 if choice is Choice.ROLLOUTS and advantage is not None else 0.0,
            policy_version=sample.version,
            finish_reason=sample.finish_reason,
        )
        for sample, reward, advantage in zip(group.samples, group.rewards, advantages, strict=True)
    ]
    if choice is Choice.DEMONSTRATION and prompt.demonstration is not None:
        advantage = algorithm.demonstrations.advantage([1.0])[0]
        tokens = [*prompt.tokens, *prompt.demonstration]
        rows.append(
            Row(prompt.prompt_id, index, Source.DEMONSTRATION, tokens, len(prompt.tokens), None, None, advantage, 1.0, None)
        )
    return rows


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float | None]:
    """Accuracy, lengths and failures over all rollouts; None where nothing was generated."""
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


def _gate_metrics(decisions: Sequence[Decision]) -> dict[str, float]:
    def share(choice: Choice) -> float:
        return statistics.fmean(decision.choice is choice for decision in decisions)

    return {
        "gate/sft_share": share(Choice.DEMONSTRATION),
        "gate/rl_share": share(Choice.ROLLOUTS),
        "gate/skipped_share": share(Choice.SKIPPED),
        "gate/missing_demonstrations": sum(decision.missing_demonstration for decision in decisions),
    }
