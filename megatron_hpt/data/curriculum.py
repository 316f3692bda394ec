"""Which prompts are passed over because they have nothing to teach: lately they were always solved, or never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hpt.data.order import uniform

Streaks = Mapping[str, int]
"""Prompt id → how many of its last visits in a row had only correct rollouts; negative where they had none. 0 is left out."""


def advance(streaks: dict[str, int], decisions: Iterable[Mapping[str, Any]]) -> None:
    """Bring the streaks up to date with a step's decisions, in order; `batch.history` calls this for every step.

    A visit without a graded rollout leaves the streak as it is. A visit that was cut short ends it and counts neither as
    solved nor as failed: which of its answers were graded in time depends on the clock.
    """
    for decision in decisions:
        prompt_id, solved, graded = decision["prompt_id"], decision["solved"], decision["graded"]
        if not graded:
            continue
        before = streaks.pop(prompt_id, 0)
        if not decision.get("cancelled", 0) and solved in (0, graded):  # older ledgers have no `cancelled`
            streaks[prompt_id] = max(0, before) + 1 if solved else min(0, before) - 1


@dataclass(frozen=True)
class Curriculum:
    """Decides by their streaks which prompts are passed over."""

    visits: int
    """The length from which a streak counts."""
    keep_solved: float
    """Share of its turns at which a prompt with a solved streak is taken; with 0 it never is."""
    keep_failed: float
    """Likewise for a prompt with a failed streak."""
    seed: int

    def passes(self, streak: int, position: int) -> str | None:
        """Why the prompt at a position is passed over, ``solved`` or ``failed``; None: it is taken."""
        if abs(streak) < self.visits:
            return None
        reason = "solved" if streak > 0 else "failed"
        return reason if uniform(self.seed, "curriculum", position) >= self.keeps(reason) else None

    def keeps(self, reason: str) -> float:
        """Share of such a prompt's turns at which it is taken."""
        return self.keep_solved if reason == "solved" else self.keep_failed
