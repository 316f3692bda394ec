"""Replay: what another gate would have decided on a finished run's rollouts, read from its ledger without engines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt.batch.history import last_choices
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Source
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.objective.gate import Choice, Decision, Gate, Situation
from megatron_hpt.objective.gates import hybrid
from megatron_hpt.overrides import apply_overrides, load_yaml
from megatron_hpt.run import open_run


@dataclass(frozen=True)
class ReplayedStep:
    """The decisions of one step under the run's gate and under another, or their sums over steps."""

    step: int | str
    """Its number, or what the sum is called."""
    recorded: Counter[Choice]
    replayed: Counter[Choice]
    recorded_weights: tuple[float, float]
    """Sums over the prompts of α (the rollouts' factor) and of β (the demonstration's)."""
    replayed_weights: tuple[float, float]
    changed: int
    """Prompts for which the other gate's choice or weights differ."""
    prompts: int

    def plus(self, other: ReplayedStep) -> ReplayedStep:
        """Return the sums of both."""
        return ReplayedStep(
            self.step,
            self.recorded + other.recorded,
            self.replayed + other.replayed,
            _sum(self.recorded_weights, other.recorded_weights),
            _sum(self.replayed_weights, other.replayed_weights),
            self.changed + other.changed,
            self.prompts + other.prompts,
        )


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def print_replay(run: Path, settings: Sequence[str], console: Console) -> None:
    """Replay a run under the gate of its configuration with other settings, and print a line for each step.

    The run may be of any algorithm that generates: what HPT's gate would have done to a GRPO run is a fair question.

    Args:
        settings: ``key=value`` of the gate's section in the configuration.

    Raises:
        ConfigError: `run` is no run directory, a setting is unknown, or the run has no rollouts.
        DataError: a batch cannot be read.
    """
    opened = open_run(run)
    config = load_yaml(opened.config)
    recorded = of_run(config).gate
    gate = hybrid(apply_overrides(config, [f"algorithm.gate.{setting}" for setting in settings]).algorithm.gate)
    console.print(f"recorded: {recorded.formula}\nreplayed: {gate.formula}", highlight=False, markup=False)
    table = Table(box=None, header_style="bold", caption="prompts, recorded → replayed", caption_justify="left")
    for name in ("step", *(choice.replace("_", "-") for choice in Choice), "mean α", "mean β", "changed", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    total = ReplayedStep("all", Counter(), Counter(), (0.0, 0.0), (0.0, 0.0), 0, 0)
    for step in replay(Ledger(opened.batches), gate):
        table.add_row(*_cells(step))
        total = total.plus(step)
    table.add_section()
    table.add_row(*_cells(total))
    console.print(table)


def _cells(step: ReplayedStep) -> list[str]:
    counts = [f"{step.recorded[choice]}→{step.replayed[choice]}" for choice in Choice]
    pairs = zip(step.recorded_weights, step.replayed_weights, strict=True)
    means = [f"{before / step.prompts:.2f}→{after / step.prompts:.2f}" for before, after in pairs]
    return [str(step.step), *counts, *means, str(step.changed), str(step.prompts)]


def replay(ledger: Ledger, gate: Gate) -> Iterator[ReplayedStep]:
    """Decide every recorded prompt again, step by step; steps that generated nothing are left out.

    The rollouts stay those of the run, although under another gate the policy, and so its answers, would have become others.
    Rollouts that were cancelled count as ungraded: the other gate might have waited for them.

    Raises:
        ConfigError: the ledger is empty, or no step has rollouts to decide by.
        DataError: a batch cannot be read.
    """
    previous: dict[str, Choice] = {}
    decided = 0
    for step in ledger.steps():
        batch = ledger.read(step)
        rewards = _rewards(batch)
        if not rewards:
            continue
        decisions = [gate(_situation(batch, index, rewards, previous)) for index in range(len(batch.decisions))]
        previous |= last_choices([asdict(decision) for decision in decisions])
        decided += 1
        yield _compared(batch, decisions)
    if not decided:
        raise ConfigError(f"{ledger.folder}: no step has rollouts; a gate decides by them, and this run generated none")


def _situation(batch: Batch, index: int, rewards: dict[int, list[float | None]], previous: dict[str, Choice]) -> Situation:
    recorded = batch.decisions[index]
    return Situation(
        prompt_id=recorded["prompt_id"],
        rewards=rewards.get(index, []),
        has_demonstration=recorded["has_demonstration"],
        step=batch.step,
        data_source=recorded["data_source"],
        previous=previous.get(recorded["prompt_id"]),
        cancelled=recorded.get("cancelled", 0),  # older ledgers do not have it
    )


def _compared(batch: Batch, decisions: Sequence[Decision]) -> ReplayedStep:
    pairs = list(zip(batch.decisions, decisions, strict=True))
    fields = ("choice", "rollout_weight", "demonstration_weight")
    return ReplayedStep(
        step=batch.step,
        recorded=Counter(Choice(before["choice"]) for before, _ in pairs),
        replayed=Counter(after.choice for _, after in pairs),
        recorded_weights=_weights([(before["rollout_weight"], before["demonstration_weight"]) for before, _ in pairs]),
        replayed_weights=_weights([(after.rollout_weight, after.demonstration_weight) for _, after in pairs]),
        changed=sum(any(before[field] != getattr(after, field) for field in fields) for before, after in pairs),
        prompts=len(pairs),
    )


def _weights(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(alpha for alpha, _ in pairs), math.fsum(beta for _, beta in pairs)


def _rewards(batch: Batch) -> dict[int, list[float | None]]:
    """Return the rewards of each group's rollouts as the verifier gave them; a group is a prompt of the step."""
    groups: dict[int, list[float | None]] = {}
    for row in batch.rows:
        if row.source is Source.ROLLOUT:
            groups.setdefault(row.group, []).append(row.reward)
    return groups
