"""Equality of two answers by math-verify."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

LONGEST = 1000
"""Characters of an answer that is parsed; a longer one that is written differently is another one."""
DEEPEST = 40
"""Braces within braces, likewise."""
_FAR = 2e-6
"""math-verify rounds decimals to six places: numbers that are further apart are different, in whatever way they are rounded."""
_POINTS = (0.7310585786, 1.3862943611, 2.2360679775, 0.5772156649, 1.9021605831)


@cache
def _math_verify() -> Any:
    import math_verify

    return math_verify


@cache
def _options() -> dict[str, Any]:
    # math-verify's own alarms are off: they need the main thread, and the grader process has one for the whole answer.
    configs = (_math_verify().LatexExtractionConfig(boxed_match_priority=0), _math_verify().ExprExtractionConfig())
    return {
        "extraction_config": configs,
        "fallback_mode": "no_fallback",
        "extraction_mode": ["first_match"],  # as the reference calls it: what this list does is what any_match does
        "parsing_timeout": None,
    }


@lru_cache(maxsize=1024)
def parse(latex: str) -> tuple[Any, ...]:
    """What math-verify reads; empty if it is not an expression."""
    return tuple(_math_verify().parse(latex if "$" in latex else f"${latex}$", **_options()))


def is_parsable(latex: str) -> bool:
    """It is short and flat enough."""
    return len(latex) <= LONGEST and _depth(latex) <= DEEPEST


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[{}()\[\]]", text):
        depth += 1 if bracket in "{([" else -1
        deepest = max(deepest, depth)
    return deepest


def equal(answer: str, truth: str) -> bool:
    """Whether math-verify reads both and finds them equal."""
    gold, given = parse(truth), parse(answer)
    if not gold or not given or not _is_exact(gold[0], given[0]) or _differ(gold[0], given[0]):
        return False
    return _math_verify().verify(list(gold), list(given), timeout_seconds=None)


def _differ(gold: Any, given: Any) -> bool:
    """They certainly do: they have other values at some point. Cheap beside math-verify, which simplifies first."""
    from sympy import Expr, Symbol, UnevaluatedExpr
    from sympy.core.relational import Relational

    if isinstance(gold, Relational) and isinstance(given, Relational):
        return gold.free_symbols != given.free_symbols
    if not (isinstance(gold, Expr) and isinstance(given, Expr)):
        return False
    if any(isinstance(one, Symbol) or one.has(UnevaluatedExpr) for one in (gold, given)):  # words and per cent
        return False
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    point = {symbol: _POINTS[place % len(_POINTS)] + place for place, symbol in enumerate(symbols)}
    first, second = _value(gold, point), _value(given, point)
    if first is None or second is None:
        return False
    return abs(first - second) > max(_FAR, 1e-9 * max(abs(first), abs(second)))


def _value(expression: Any, point: dict[Any, float]) -> complex | None:
    try:
        value = complex(expression.evalf(15, subs=point))
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):  # it has none, or sympy cannot tell
        return None
    return value if abs(value) < 1e300 else None  # false for "not a number" too


def _is_exact(gold: Any, given: Any) -> bool:
    """No irrational number is compared with a decimal, which can only be near it."""
    return not (_near_only(gold, given) or _near_only(given, gold))


def _near_only(one: Any, other: Any) -> bool:
    from sympy import Float, Number

    exact, near = _elements(one), _elements(other)
    if len(exact) != len(near) or not any(isinstance(element, Float) for element in near):
        return False
    return sum(map(_is_irrational, exact)) > sum(not isinstance(element, Number) for element in near)


def _is_irrational(expression: Any) -> bool:
    from sympy import Float, Number

    if isinstance(expression, Number) or not getattr(expression, "is_number", False) or expression.atoms(Float):
        return False
    return not isinstance(expression.doit(), Number)


def _elements(expression: Any) -> tuple[Any, ...]:
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(expression, Interval):  # an ordered pair is read as one
        return (expression.start, expression.end)
    return tuple(expression.args) if isinstance(expression, (FiniteSet, Tuple)) else (expression,)
