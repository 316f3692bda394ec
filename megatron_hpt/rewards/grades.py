"""Answers, which are graded, and grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to one problem."""

    response: str
    ground_truth: str
    """What the verifier compares with; its form is the reward's own."""
    prompt: str = ""
    """The problem as the policy saw it."""
    data_source: str = ""


class Cause(StrEnum):
    """Why there is no grade."""

    DEADLINE = "deadline"
    MEMORY = "memory"
    CRASH = "crash"
    """The grader process died."""
    ERROR = "error"
    """The reward raised, or its server failed."""


@dataclass(frozen=True, slots=True)
class Grade:
    """A score, or why there is none. `graded` and `ungraded` make them."""

    score: float | None
    """None: the answer is ungraded; it is counted and left out of the gate, and never taken for a 0."""
    cause: Cause | None = None
    detail: str = ""

    @property
    def reason(self) -> str | None:
        """Cause and detail in one line; None: graded."""
        return f"{self.cause}: {self.detail}" if self.cause else None


def graded(score: float) -> Grade:
    """Make the grade of a verifier's number.

    Raises:
        ValueError: it is not finite.
    """
    if score - score != 0:  # infinite, or not a number
        raise ValueError(f"a reward of {score}")
    return Grade(float(score))


def ungraded(cause: Cause, detail: str) -> Grade:
    """Make a grade without a number, with the reason."""
    return Grade(None, cause, detail)


class Ungradable(Exception):
    """Raised by a reward that cannot judge an answer: a ground truth that it cannot read, a tool that is not there."""


def as_answers(answers: Sequence[Answer | tuple[str, str]]) -> list[Answer]:
    """Plain (response, ground truth) pairs as answers."""
    return [one if isinstance(one, Answer) else Answer(*one) for one in answers]
