"""Values of expressions at a point, to 130 digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_hpt.rewards.math.nodes import Node, NoValue

Point = dict[str, Any]
_DIGITS = 130
_LARGEST_EXPONENT = 10**9


@cache
def arithmetic() -> Any:
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = _DIGITS
    return context


# Exact values.


def number_at(node: Node, point: Point, base: str, is_real: bool) -> Any:
    """The value, with `_DIGITS` digits.

    Raises:
        NoValue: there is none.
    """
    try:
        return _walk(node, point, base, is_real)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise NoValue from error


def _walk(node: Node, point: Point, base: str, is_real: bool) -> Any:
    mp = arithmetic()
    if node.kind in ("number", "based"):
        return mp.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "symbol":
        return point[node.name]
    parts = [_walk(part, point, base, is_real) for part in node.parts]
    if node.kind == "log?":
        parts.append(mp.e if base == "e" else mp.mpf(10))
    if node.kind not in _COMPUTED:
        raise NoValue
    value = _COMPUTED[node.kind](mp, *parts)
    if not mp.isfinite(value) or (is_real and mp.im(value) != 0):
        raise NoValue
    return mp.re(value) if is_real else value


def _power(mp: Any, base: Any, exponent: Any) -> Any:
    if abs(exponent) > _LARGEST_EXPONENT:
        raise NoValue
    return mp.power(base, exponent)


def _root(mp: Any, value: Any, degree: Any) -> Any:
    """The real one of a negative number, where there is one."""
    if abs(degree) > _LARGEST_EXPONENT:
        raise NoValue
    if mp.isint(degree) and int(degree.real) % 2 and mp.im(value) == 0 and mp.re(value) < 0:
        return -mp.root(-mp.re(value), int(degree.real)) if 0 < degree.real < 1000 else -mp.power(-value, 1 / degree)
    return mp.power(value, 1 / degree)


def _gamma(mp: Any, value: Any) -> Any:
    if abs(value) > 10**6:
        raise NoValue
    return mp.gamma(value + 1)


def _binomial(mp: Any, above: Any, below: Any) -> Any:
    if max(abs(above), abs(below)) > 10**6:
        raise NoValue
    return mp.binomial(above, below)


def _exponential(mp: Any, value: Any) -> Any:
    if abs(value) > _LARGEST_EXPONENT:
        raise NoValue
    return mp.exp(value)


def _periodic(name: str) -> Callable[[Any, Any], Any]:
    def of(mp: Any, value: Any) -> Any:
        if abs(value) > _LARGEST_EXPONENT:
            raise NoValue
        return getattr(mp, name)(value)

    return of


def _named(name: str) -> Callable[..., Any]:
    return lambda mp, *values: getattr(mp, name)(*values)


_COMPUTED: dict[str, Callable[..., Any]] = {
    "+": lambda mp, *parts: sum(parts, mp.mpf(0)),
    "*": lambda mp, a, b: a * b,
    "/": lambda mp, a, b: a / b,
    "neg": lambda mp, a: -a,
    "^": _power,
    "sqrt": lambda mp, a: mp.sqrt(a),
    "root": _root,
    "abs": lambda mp, a: abs(a),
    "floor": _named("floor"),
    "ceiling": _named("ceil"),
    "factorial": _gamma,
    "binomial": _binomial,
    "degrees": lambda mp, a: a * mp.pi / 180,
    "max": lambda mp, *parts: max(parts),
    "min": lambda mp, *parts: min(parts),
    "pi": lambda mp: +mp.pi,
    "e": lambda mp: +mp.e,
    "i": lambda mp: mp.j,
    "exp": _exponential,
    "ln": lambda mp, a: mp.log(a),
    "log?": lambda mp, a, base: mp.log(a) / mp.log(base),
    "logarithm": lambda mp, a, base: mp.log(a) / mp.log(base),
    **{name: _periodic(name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: _periodic(name) for name in ("sinh", "cosh", "tanh", "coth")},
    **{f"arc{name}": _named(f"a{name}") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
}
"""Kinds of nodes that have a value; gcd, lcm and infinity have an exact one or none."""
