"""Exact values of expressions of whole numbers and fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from math import comb, factorial, gcd, lcm

from megatron_hpt.rewards.math.nodes import Node, NoValue

_LARGEST_BITS = 60_000
"""Of a rational number that is computed exactly."""
_MANY = 5_000
"""Largest argument of a factorial or binomial that is computed."""


def rational(node: Node) -> Fraction | None:
    """The exact value of an expression of whole numbers and fractions; None if it is none, or too large."""
    try:
        return _exact(node)
    except (NoValue, ZeroDivisionError, OverflowError):
        return None


def _exact(node: Node) -> Fraction | None:
    if node.kind in ("number", "based"):
        return node.value
    if node.kind not in _EXACT:
        return None
    parts = [_exact(part) for part in node.parts]
    if any(part is None for part in parts):
        return None
    value = _EXACT[node.kind](*parts)
    if value is not None and max(abs(value.numerator), value.denominator).bit_length() > _LARGEST_BITS:
        raise NoValue
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    size = max(abs(base.numerator), base.denominator).bit_length()
    if abs(base) not in (0, 1) and size * abs(exponent) > _LARGEST_BITS:
        raise NoValue
    return base ** (int(exponent) % 2 if abs(base) == 1 else int(exponent))


def _whole(*values: Fraction) -> list[int]:
    if any(value.denominator != 1 or abs(value) > 10**18 for value in values):
        raise NoValue
    return [int(value) for value in values]


def _exact_factorial(value: Fraction) -> Fraction:
    (number,) = _whole(value)
    if not 0 <= number <= _MANY:
        raise NoValue
    return Fraction(factorial(number))


def _exact_binomial(above: Fraction, below: Fraction) -> Fraction:
    n, k = _whole(above, below)
    if not 0 <= n <= _MANY or k < 0:
        raise NoValue
    return Fraction(comb(n, k))


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "+": lambda *parts: sum(parts, Fraction()),
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "neg": lambda a: -a,
    "^": _exact_power,
    "abs": abs,
    "floor": lambda a: Fraction(a.__floor__()),
    "ceiling": lambda a: Fraction(a.__ceil__()),
    "factorial": _exact_factorial,
    "binomial": _exact_binomial,
    "max": lambda *parts: max(parts),
    "min": lambda *parts: min(parts),
    "gcd": lambda *parts: Fraction(reduce(gcd, _whole(*parts))),
    "lcm": lambda *parts: Fraction(reduce(lcm, _whole(*parts))),
}
