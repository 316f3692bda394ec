"""Rewards that compare simply: a letter, a text or a number of the final answer, or the form of the whole response."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.boxes import last_boxed, unboxed, visible
from megatron_hpt.rewards.grades import Answer, Ungradable
from megatron_hpt.rewards.math.equality import number

_FONT = r"(?:\\(?:text|textbf|textrm|mathrm|mathbf|bf|rm)(?![A-Za-z])\s*\{?)?"
_OPENED = rf"[\s({{\[*$]*{_FONT}[\s({{\[*$]*(?:(?i:option|choice|answer)\s*:?\s*)?[({{\[]*"
_ONE = r"([A-D])(?![A-Za-z0-9'^])"
_LETTER = re.compile(_OPENED + _ONE)
_REST = re.compile(r"[\s)}\]*$]*(?:[.):](?P<option>.*)|\)?)[\s)}\]*$.]*|[\s}*$]*\)(?P<behind>.*)", re.DOTALL)
"""What may stand behind the letter in a box: nothing, or the option's own text behind a mark."""
_OTHER = re.compile(
    r"(?<![A-Za-z\\])[A-E](?![A-Za-z'])|(?<![A-Za-z])(?i:or|and|not|wrong|incorrect|maybe|possibly|all|none)(?![A-Za-z])"
)
_ANNOUNCED = re.compile(
    rf"(?i:answer|option|choice|choose)(?i:\s+is)?\s*:?\s*{_OPENED}{_ONE}(?=\)\s|[*$)}}\]]*\s*(?:[.,;:/&|+-]|\n|$|<|or\b|and\b|[A-D]\b))"
)
_HEDGED = re.compile(
    rf"[\s)}}\]*$]*\s*(?:[.,/;|+-]\s*)?(?:\\?&|(?i:or|and)\b)?\s*(?:(?i:or|and|maybe|possibly)\s+)*{_OPENED}{_ONE}(?=[\s)}}\]*$.]*(?:$|\n|[,/;&|+-]|or\b|and\b|[({{\[]))"
)
_BOXES = re.compile(r"\\boxed\s*\{[^{}]*\}\s*\$?\s*(?:,|/|&|(?i:or|and)\b)\s*\$?\s*\\boxed")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?<=\d)")


def final(response: str) -> str:
    """Return the last box behind the reasoning, or all that follows the reasoning if there is no box."""
    shown = visible(response)
    boxed = last_boxed(shown)
    return (shown if boxed is None else boxed).strip()


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
    """Return the one letter in the last box behind the reasoning, or else the last one that is announced ("Answer: B").

    None if there is no letter, or if it is hedged ("A or B").
    """
    shown = unicodedata.normalize("NFKC", visible(response))
    boxed = last_boxed(shown)
    found = _LETTER.match(boxed) if boxed is not None else None
    if found:
        return None if _BOXES.search(shown) else _alone(boxed, found)
    announced = list(_ANNOUNCED.finditer(shown))
    return _unless_hedged(shown, announced[-1]) if announced else None


def _alone(boxed: str, found: re.Match[str]) -> str | None:
    """Return the letter, if nothing else is in the box but the text of its option, and that names no other letter."""
    rest = _REST.fullmatch(boxed, found.end())
    option = rest and (rest["option"] or rest["behind"] or "")
    return found[1] if rest and not _OTHER.search(option) else None


def _unless_hedged(text: str, found: re.Match[str]) -> str | None:
    other = _HEDGED.match(text, found.end())
    return None if other and other[1] != found[1] else found[1]


def exact(answer: Answer) -> float:
    """1.0 if the final answer is the ground truth, character by character but for space."""
    truth = unboxed(answer.ground_truth).split()
    return float(bool(truth) and final(answer.response).split() == truth)


def numeric(settings: RewardConfig) -> Callable[[Answer], float]:
    """Make the reward that is 1.0 if the box, or the last number without a box, is the ground truth within the tolerance."""

    def grade(answer: Answer) -> float:
        truth = _true_number(unboxed(answer.ground_truth))
        if truth is None:
            raise Ungradable(f"the ground truth {answer.ground_truth!r} has no number")
        given = _given_number(answer.response)
        return float(given is not None and abs(given - truth) <= settings.tolerance * abs(truth))

    return grade


def _true_number(truth: str) -> float | None:
    """Return the value of the whole text, or else the last number in it."""
    value = number(truth)
    return _last_number(truth) if value is None else value


def _given_number(response: str) -> float | None:
    """Return the value of the box as a whole, or the last number of a response without a box."""
    shown = visible(response)
    boxed = last_boxed(shown)
    return _last_number(shown) if boxed is None else number(boxed)


def _last_number(text: str) -> float | None:
    found = [match[0] for match in _NUMBER.finditer(text.replace("\\!", "").replace("{,}", ",")) if match[0]]
    return float(found[-1].replace(",", "")) if found else None


def form(settings: RewardConfig) -> Callable[[Answer], float]:
    """Make the reward that is 1.0 if the whole response matches the pattern."""
    pattern = re.compile(settings.pattern)
    return lambda answer: float(pattern.fullmatch(answer.response) is not None)
