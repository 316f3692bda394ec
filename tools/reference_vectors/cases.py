"""The format of vector files, and how a number of ours is compared with one of theirs.

A file is ``{description, conventions, cases: [{name, function, config, inputs, expected, expected_grad?, note?}]}``;
numbers that are none are the strings NaN, Infinity and -Infinity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hpt.errors import DataError
from megatron_hpt.files import check_input

RELATIVE = 1e-10
ABSOLUTE = 1e-13
"""Tolerance for numbers that are zero but for rounding."""


@dataclass(frozen=True)
class Case:
    """One call of a reference function."""

    name: str
    function: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    expected: dict[str, Any]
    gradients: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One quantity of a case: ours beside theirs."""

    quantity: str
    ours: Any
    theirs: Any
    treated: str = ""
    """Why this project gives something else on purpose; `ours` is then checked to be finite."""

    @property
    def misses(self) -> str | None:
        """What is wrong with the quantity, or None where nothing is."""
        if self.treated:
            return None if _finite(self.ours) else f"{self.quantity}: ours is {self.ours}, which is no number"
        return _difference(self.quantity, _plain(self.ours), _plain(self.theirs))


Checker = Callable[[Case], Iterator[Comparison]]


def read(path: Path) -> list[Case]:
    """Read a file of cases.

    Raises:
        DataError: not a file of this format; names what is missing.
    """
    check_input(path)
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        found = [
            Case(
                name=case["name"],
                function=case["function"],
                config=case.get("config", {}),
                inputs=_numbers(case["inputs"]),
                expected=_numbers(case["expected"]),
                gradients=_numbers(case.get("expected_grad", {})),
            )
            for case in cases
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of test vectors: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"{path}: has no cases")
    return found


_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _numbers(value: Any) -> Any:
    """Replace strings that stand for numbers by those numbers."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _finite(value: Any) -> bool:
    value = _plain(value)
    if isinstance(value, list):
        return all(_finite(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)


def _difference(where: str, ours: Any, theirs: Any) -> str | None:
    """Return the first place where two values differ, or None where they agree."""
    if isinstance(theirs, list) and isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where}: ours has {len(ours)} entries, theirs {len(theirs)}"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((found for i, (a, b) in pairs if (found := _difference(f"{where}[{i}]", a, b))), None)
    if isinstance(theirs, bool) or not isinstance(theirs, int | float):
        return None if ours == theirs else f"{where}: ours {ours!r}, theirs {theirs!r}"
    if not isinstance(ours, int | float):
        return f"{where}: ours {ours!r}, theirs {theirs!r}"
    if math.isnan(theirs) and math.isnan(ours):
        return None
    close = math.isclose(ours, theirs, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return None if close else f"{where}: ours {ours!r}, theirs {theirs!r}"
