"""The gate: for each prompt, its own success decides what it learns from (arXiv 2509.04419, eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Choice(StrEnum):
    """What a prompt learns from in this step."""

    ROLLOUTS = "rollouts"
    DEMONSTRATION = "demonstration"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Decision:
    """One prompt's outcome, as it is recorded."""

    prompt_id: str
    solved: int
    graded: int
    choice: Choice
    missing_demonstration: bool = False
    """The gate asked for a demonstration that the data does not have."""


class Gate(Protocol):
    """A rule from rewards to a choice."""

    needs_rollouts: bool
    needs_demonstrations: bool

    def __call__(self, prompt_id: str, rewards: Sequence[float | None], has_demonstration: bool) -> Decision:
        """Decide for one prompt; rewards are those of its n rollouts, None where ungraded."""


def count_solved(rewards: Sequence[float | None]) -> tuple[int, int]:
    """Correct and graded answers: correct is a reward of exactly 1, as in the reference."""
    graded = [r for r in rewards if r is not None]
    return sum(r == 1.0 for r in graded), len(graded)


@dataclass(frozen=True)
class Switch:
    """HPT's hard switch: solved ≤ threshold → demonstration, else rollouts.

    A threshold of 1 or more is a count of the n rollouts, as in the reference (0 and 2 of 8); below 1 it is a share of
    them. Ungraded answers are left out: the threshold shrinks in proportion. A prompt without a single graded answer
    is skipped, because nothing is known about it.
    """

    threshold: float = 0
    without_demonstration: Choice = Choice.ROLLOUTS
    needs_rollouts: bool = True
    needs_demonstrations: bool = True

    def __call__(self, prompt_id: str, rewards: Sequence[float | None], has_demonstration: bool) -> Decision:
        solved, graded = count_solved(rewards)
        if graded == 0:
            return Decision(prompt_id, solved, graded, Choice.SKIPPED)
        of = len(rewards) if self.threshold >= 1 else 1
        if solved * of > self.threshold * graded:
            return Decision(prompt_id, solved, graded, Choice.ROLLOUTS)
        if has_demonstration:
            return Decision(prompt_id, solved, graded, Choice.DEMONSTRATION)
        return Decision(prompt_id, solved, graded, self.without_demonstration, missing_demonstration=True)


@dataclass(frozen=True)
class AlwaysRollouts:
    """Pure RL."""

    needs_rollouts: bool = True
    needs_demonstrations: bool = False

    def __call__(self, prompt_id: str, rewards: Sequence[float | None], has_demonstration: bool) -> Decision:
        solved, graded = count_solved(rewards)
        return Decision(prompt_id, solved, graded, Choice.ROLLOUTS if graded else Choice.SKIPPED)


@dataclass(frozen=True)
class AlwaysDemonstrations:
    """Pure SFT; nothing is generated."""

    needs_rollouts: bool = False
    needs_demonstrations: bool = True

    def __call__(self, prompt_id: str, rewards: Sequence[float | None], has_demonstration: bool) -> Decision:
        choice = Choice.DEMONSTRATION if has_demonstration else Choice.SKIPPED
        return Decision(prompt_id, 0, 0, choice, missing_demonstration=not has_demonstration)
