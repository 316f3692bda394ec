"""Which prompts are passed over because they have nothing to teach: always solved lately, or never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hpt.data.order import uniform

Streaks = Mapping[str, int]
"""Prompt id → its last visits in a row in which every rollout was correct; negative: in which none was. 0 is left out."""


def advance(streaks: dict[str, int], decisions: Iterable[Mapping[str, Any]]) -> None:
    """Take over a step's decisions, in order.

    A visit without a graded rollout says nothing and leaves the streak. One that was cut short does not count as failed:
    which of its answers were graded in time depends on the clock.
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
    """Passes over prompts by their streaks."""

    visits: int
    """Length from which a streak counts."""
    keep_solved: float
    """Share of its turns at which a prompt is taken that has been solved in all of its last visits; 0: never again."""
    keep_failed: float
    """As `keep_solved`, where it has been failed."""
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
