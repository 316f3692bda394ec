"""Rewards that compare the final answer with simple means: a letter, a text, a number, the form of the response."""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.boxes import last_boxed, unboxed
from megatron_hpt.rewards.grades import Answer, Ungradable

_LETTER = re.compile(r"[\s({\[*]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?[\s({\[*]*([A-D])(?![A-Za-z0-9'])")
_ANNOUNCED = re.compile(r"(?i:answer(?:\s+is)?|option|choice)\s*:?\s*[*$({\[\s]*([A-D])[*$)}\]]*(?=\s*(?:[.,;:]|\n|$|<))")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?<=\d)")


def visible(response: str) -> str:
    """What follows the reasoning."""
    return response.rpartition("</think>")[2]


def final(response: str) -> str:
    """The last box, or all that follows the reasoning if there is none."""
    boxed = last_boxed(response)
    return (visible(response) if boxed is None else boxed).strip()


def choice(answer: Answer) -> float:
    """1.0 if the letter chosen, A to D, is that of the ground truth. Case counts: options are often lettered a to d inside.

    Raises:
        Ungradable: the ground truth is not such a letter.
    """
    truth = _LETTER.fullmatch(unboxed(answer.ground_truth).strip(" ().")) or _LETTER.match(unboxed(answer.ground_truth))
    if truth is None:
        raise Ungradable(f"the ground truth {answer.ground_truth!r} is not a letter from A to D")
    return float(chosen(answer.response) == truth[1])


def chosen(response: str) -> str | None:
    """The letter in the last box, or the last one that is announced ("Answer: B"); None if there is none."""
    boxed = last_boxed(response)
    if boxed is not None:
        found = _LETTER.match(boxed)
        return found[1] if found else None
    announced = _ANNOUNCED.findall(visible(response))
    return announced[-1] if announced else None


def exact(answer: Answer) -> float:
    """1.0 if the final answer is the ground truth, character by character but for space."""
    return float(final(answer.response).split() == unboxed(answer.ground_truth).split())


def numeric(settings: RewardConfig) -> Callable[[Answer], float]:
    """1.0 if the last number of the final answer is that of the ground truth, within the tolerance."""

    def grade(answer: Answer) -> float:
        truth = _last_number(unboxed(answer.ground_truth))
        if truth is None:
            raise Ungradable(f"the ground truth {answer.ground_truth!r} has no number")
        given = _last_number(final(answer.response))
        return float(given is not None and abs(given - truth) <= settings.tolerance * abs(truth))

    return grade


def _last_number(text: str) -> float | None:
    found = [match[0] for match in _NUMBER.finditer(text.replace("\\!", "").replace("{,}", ",")) if match[0]]
    return float(found[-1].replace(",", "")) if found else None


def form(settings: RewardConfig) -> Callable[[Answer], float]:
    """1.0 if the whole response matches the pattern."""
    pattern = re.compile(settings.pattern)
    return lambda answer: float(pattern.fullmatch(answer.response) is not None)
