"""What the coordinator remembers from step to step; all of it is read from the ledger, so a resumed run knows the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.data import curriculum
from megatron_hpt.objective.gate import Choice


def last_choices(decisions: Sequence[dict[str, Any]]) -> dict[str, Choice]:
    """Return what each prompt learnt from, by prompt id; prompts that were skipped are left out, so an older choice stands."""
    choices = {decision["prompt_id"]: Choice(decision["choice"]) for decision in decisions}
    return {prompt_id: choice for prompt_id, choice in choices.items() if choice is not Choice.SKIPPED}


@dataclass(frozen=True)
class Remembered:
    """What is known of the steps before some time."""

    choices: Mapping[str, Choice]
    """Prompt id → what the prompt last learnt from."""
    streaks: Mapping[str, int]
    """Prompt id → its streak of solved or failed visits (`curriculum.advance`)."""


class History:
    """What is remembered of the steps before the current one; made of the steps before `start`."""

    def __init__(self, ledger: Ledger, start: int) -> None:
        self._ledger = ledger
        self.choices: dict[str, Choice] = {}
        """As `Remembered.choices`."""
        self.streaks: dict[str, int] = {}
        """As `Remembered.streaks`."""
        self.steps = 0
        """How many steps it knows."""
        self.next_prompt = 0
        """Position in the data where the next step goes on."""
        for step in range(start):
            self.add(step)

    def add(self, step: int) -> None:
        """Read a step that is in the ledger; steps are added in their order."""
        decisions, metrics = self._ledger.read_meta(step)
        self.choices |= last_choices(decisions)
        curriculum.advance(self.streaks, decisions)
        self.steps, self.next_prompt = step + 1, metrics["data/next_prompt"]

    def snapshot(self) -> Remembered:
        """Return what it knows now; steps that are added later do not change it."""
        return Remembered(dict(self.choices), dict(self.streaks))
