"""The rule that HPT reports with: the last \\boxed{…} of the response against the ground truth.

Equal strings and plain numbers are decided here; everything else by math-verify. No box is a wrong answer, not an
ungraded one: the reference's version 6 says so too.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import cache

_PLAIN = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…}, or None if there is none or its braces do not balance."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start + len("\\boxed{") : position]
    return None


def grade(response: str, ground_truth: str) -> float:
    """1.0 if the last boxed answer equals the ground truth, else 0.0. Runs in a grader process: it may hang."""
    answer = last_boxed(response)
    if answer is None:
        return 0.0
    truth = last_boxed(ground_truth) or ground_truth
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return 1.0
    numbers = _number(answer), _number(truth)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return float(_equivalent(answer, truth))


def _number(text: str) -> Decimal | None:
    if not _PLAIN.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


@cache
def _extraction() -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _equivalent(answer: str, truth: str) -> bool:
    from math_verify import parse, verify

    # math-verify's own alarms are off: they need the main thread, and the pool's deadline covers the whole call.
    options = {"extraction_config": _extraction(), "fallback_mode": "no_fallback", "parsing_timeout": None}
    gold = parse(f"${truth}$", **options)
    if not gold:  # nothing to compare with: ungraded, not wrong
        raise ValueError(f"the ground truth {truth!r} is not a mathematical expression")
    return verify(gold, parse(f"${answer}$", **options), timeout_seconds=None, raise_on_error=True)
