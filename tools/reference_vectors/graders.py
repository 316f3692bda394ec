"""The reference's graders: this project's `math_reference` against its version 6, the one that HPT reports with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_hpt.errors import DataError
from megatron_hpt.files import check_input
from megatron_hpt.rewards.reference import grade

from .check import CaseOutcome

VERSION = "6"
DIFFERENT = {
    "boxed/equation_swap": "5=x is the equation x=5; the reference's math-verify 0.6 unwraps one and compares 5 with an "
    "equation",
}
"""Cases that are answered differently on purpose, and why (docs/rewards.md)."""


def check_graders(path: Path) -> CaseOutcome:
    """Grade every answer.

    Raises:
        DataError: not a file of grader vectors.
    """
    outcome = CaseOutcome(f"grader: math_reference (version {VERSION})")
    check_input(path)
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        graded = [(c["name"], c["response"], c["ground_truth"], c["score"][VERSION]) for c in cases]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of grader vectors: {type(error).__name__}: {error}") from None
    for name, response, truth, theirs in graded:
        outcome.cases += 1
        outcome.quantities += 1
        ours = _grade(response, truth)
        if ours != theirs and name in DIFFERENT:
            outcome.treated.setdefault(DIFFERENT[name], []).append(name)
        elif ours != theirs:
            outcome.misses.append(f"{name}: ours {ours}, theirs {theirs} (ground truth {truth!r})")
    return outcome


def _grade(response: str, truth: Any) -> bool | str:
    """Our verdict."""
    try:
        return grade(response, truth) == 1.0
    except Exception as error:  # the pool would call it ungraded
        return f"ungraded ({type(error).__name__}: {error})"
