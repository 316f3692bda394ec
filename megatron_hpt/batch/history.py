"""What the coordinator remembers from step to step; all of it can be read from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.data import curriculum
from megatron_hpt.objective.gate import Choice


def last_choices(decisions: Sequence[dict[str, Any]]) -> dict[str, Choice]:
    """What prompts learnt from, by id; a prompt that was skipped stays where it was."""
    choices = {decision["prompt_id"]: Choice(decision["choice"]) for decision in decisions}
    return {prompt_id: choice for prompt_id, choice in choices.items() if choice is not Choice.SKIPPED}


class History:
    """Last decision on every prompt that was seen, its streak of solved or failed visits, and where the data goes on."""

    def __init__(self, ledger: Ledger, start: int) -> None:
        """Read the steps before `start`."""
        self._ledger = ledger
        self.choices: dict[str, Choice] = {}
        self.streaks: dict[str, int] = {}
        self.next_prompt = 0
        for step in range(start):
            self.add(step)

    def add(self, step: int) -> None:
        """Take over a step that is in the ledger."""
        decisions, metrics = self._ledger.read_meta(step)
        self.choices |= last_choices(decisions)
        curriculum.advance(self.streaks, decisions)
        self.next_prompt = metrics["data/next_prompt"]
