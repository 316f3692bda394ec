"""What another gate would have decided on a finished run's rollouts, read from its ledger without engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt.config import apply_overrides, load_yaml
from megatron_hpt.data.ledger import Ledger
from megatron_hpt.data.rows import Batch, Source
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.objective.gate import Choice, Gate, Situation
from megatron_hpt.objective.gates import hybrid
from megatron_hpt.run import open_run


@dataclass(frozen=True)
class ReplayedStep:
    """One step under the run's gate and under another."""

    step: int | str
    recorded: Counter[Choice]
    replayed: Counter[Choice]
    changed: int
    """Prompts that are decided otherwise."""
    prompts: int

    def plus(self, other: ReplayedStep) -> ReplayedStep:
        """Both together."""
        return ReplayedStep(
            self.step,
            self.recorded + other.recorded,
            self.replayed + other.replayed,
            self.changed + other.changed,
            self.prompts + other.prompts,
        )


def print_replay(run: Path, settings: Sequence[str], console: Console) -> None:
    """Replay a run under the gate of its configuration with other settings, and print a line a step.

    The run may be of any algorithm that generates: what HPT's gate would have done to a GRPO run is a fair question.

    Args:
        settings: ``key=value`` of the gate's section in the configuration.

    Raises:
        ConfigError: not a run directory, unknown settings, no rollouts.
    """
    opened = open_run(run)
    config = load_yaml(opened.config)
    before = of_run(config).gate
    gate = hybrid(apply_overrides(config, [f"algorithm.gate.{setting}" for setting in settings]).algorithm.gate)
    console.print(f"recorded: {before.formula}\nreplayed: {gate.formula}", highlight=False, markup=False)
    table = Table(box=None, header_style="bold", caption="prompts, recorded → replayed", caption_justify="left")
    for name in ("step", *(choice.replace("_", "-") for choice in Choice), "changed", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    total = ReplayedStep("all", Counter(), Counter(), 0, 0)
    for step in replay(Ledger(opened.batches), gate):
        table.add_row(*_cells(step))
        total = total.plus(step)
    table.add_section()
    table.add_row(*_cells(total))
    console.print(table)


def _cells(step: ReplayedStep) -> list[str]:
    counts = [f"{step.recorded[choice]} → {step.replayed[choice]}" for choice in Choice]
    return [str(step.step), *counts, str(step.changed), str(step.prompts)]


def replay(ledger: Ledger, gate: Gate) -> Iterator[ReplayedStep]:
    """Decide every recorded prompt again, step by step.

    The rollouts stay those of the run: under another gate the policy, and so its answers, would have drifted away.

    Raises:
        ConfigError: the ledger is empty, or has no rollouts to decide by.
        DataError: a batch cannot be read.
    """
    steps = ledger.steps()
    if not steps:
        raise ConfigError(f"{ledger.folder}: no batch to replay")
    previous: dict[str, Choice] = {}
    for step in steps:
        yield _step(ledger.read(step), gate, previous)


def _step(batch: Batch, gate: Gate, previous: dict[str, Choice]) -> ReplayedStep:
    rewards = _rewards(batch)
    if batch.decisions and not any(rewards.values()):
        raise ConfigError(f"step {batch.step} has no rollouts; a gate decides by them, and this run generated none")
    recorded, replayed, changed = Counter(), Counter(), 0
    for index, decision in enumerate(batch.decisions):
        situation = Situation(
            prompt_id=decision["prompt_id"],
            rewards=rewards.get(index, []),
            has_demonstration=decision["has_demonstration"],
            step=batch.step,
            data_source=decision["data_source"],
            previous=previous.get(decision["prompt_id"]),
        )
        before, after = Choice(decision["choice"]), gate(situation).choice
        previous[situation.prompt_id] = after
        recorded[before] += 1
        replayed[after] += 1
        changed += before is not after
    return ReplayedStep(batch.step, recorded, replayed, changed, len(batch.decisions))


def _rewards(batch: Batch) -> dict[int, list[float | None]]:
    """The rewards of each group's rollouts, as the verifier gave them."""
    groups: dict[int, list[float | None]] = {}
    for row in batch.rows:
        if row.source is Source.ROLLOUT:
            groups.setdefault(row.group, []).append(row.reward)
    return groups
