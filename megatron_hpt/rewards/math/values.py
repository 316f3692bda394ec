"""Whether two expressions have the same value: exactly where they are rational, else to a hundred digits at many points.

There is no absolute tolerance. At a point all that is inside must be real too (the square root of a negative number has no
value, but for expressions in which i occurs), so that sqrt(a) sqrt(b) is sqrt(ab), and sqrt(x^2) is not x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from megatron_hpt.rewards.math.exact import rational
from megatron_hpt.rewards.math.nodes import Node, NoValue
from megatron_hpt.rewards.math.numeric import Point, arithmetic, number_at

_SAME = 100
"""Digits of which both have to agree: e^(pi sqrt(163)) is a whole number to 30."""
_FEWEST_POINTS = 4
_ENOUGH_DIGITS = 6
"""Significant digits from which a decimal may stand for the number that it was rounded from."""
_POINTS: tuple[tuple[str, ...], ...] = (
    ("2", "3", "5", "7", "11", "13"),
    ("5", "2", "4", "3", "6", "9"),
    ("0.3178372451", "0.7310585786", "0.5772156649", "0.1421356237", "0.8660254037", "0.4812118250"),
    ("1.9021605831", "1.3862943611", "2.2360679775", "3.3166247903", "1.6487212707", "2.6651441426"),
    ("4.6692016091", "2.5029078750", "1.2020569031", "5.6568542494", "2.8077702420", "3.2758229187"),
    ("-0.6180339887", "-1.7320508075", "-2.4142135623", "-0.9159655941", "-1.2824271291", "-3.1462643699"),
    ("-2.3025850929", "0.8346268416", "-0.7642236535", "2.6854520010", "-1.1865691104", "1.4560749485"),
    ("0.2614972128", "-1.4513692348", "3.3598856662", "-0.5682605120", "2.5849817595", "-1.3063778838"),
    ("17.2915026221", "-31.7490157327", "23.5777087640", "-40.2664991614", "29.3851648071", "-19.7238052947"),
    ("-1031.7082039324", "523.2665999126", "-617.4165738677", "911.6227766017", "-733.1143823540", "839.5358983848"),
)
"""Values for up to six names: whole, between 0 and 1, above 1, negative, mixed, far from 0."""
_WHOLE = tuple(
    tuple((7 * turn * turn + 11 * turn * place + 5 * place + turn) % 23 + 1 for place in range(6)) for turn in range(24)
)
"""Whole numbers for up to six names, odd and even in every mixture, for expressions that have values at few other points."""
_COUNTED = frozenset("ijklmn")
"""Names that stand for whole numbers where there are floors and ceilings."""


def same(given: Node, truth: Node) -> bool:
    """Whether both have the same value, whatever their names stand for."""
    return any(_same(given, truth, base) for base in _bases(given, truth))


def proportional(given: Node, truth: Node, positive: bool = False) -> bool:
    """Whether one is a constant multiple of the other, by a positive number if that is asked; neither is constant itself."""
    if given.names != truth.names or not truth.names:
        return False
    ratios = []
    for point in _points(given, truth):
        pair = _at(given, truth, point, "e")
        if pair and pair[0] != 0 and pair[1] != 0:
            ratios.append(pair[0] / pair[1])
        elif pair and (pair[0] == 0) != (pair[1] == 0):
            return False
    if len(ratios) < _FEWEST_POINTS or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return False
    return not positive or (ratios[0].imag == 0 and ratios[0].real > 0)


def real(node: Node) -> float | None:
    """The value of a constant expression as a plain number; None if it has none."""
    if node.names:
        return None
    exact = rational(node)
    try:
        return float(number_at(node, {}, "e", True).real if exact is None else exact)
    except (NoValue, OverflowError):
        return None


def _bases(given: Node, truth: Node) -> tuple[str, ...]:
    """What a logarithm without a base may mean: both readings are looked at, the same one on both sides."""
    return ("e", "10") if given.has("log?") or truth.has("log?") else ("e",)


def _same(given: Node, truth: Node, base: str) -> bool:
    one, other = rational(given), rational(truth)
    if one is not None and other is not None:
        return one == other or _rounded(given, one, other) or _rounded(truth, other, one)
    if _digits(given) and other is None and not truth.names:
        return False  # a decimal is never an irrational number
    found = missing = 0
    for point in _points(given, truth):
        pair = _at(given, truth, point, base)
        if pair is None:
            missing += 1
        elif not _agree(given, truth, pair):
            return False
        else:
            found += 1
    names = given.names | truth.names
    if not names:
        return found == 1
    if missing:  # the few points that are left may be chance
        whole = [_at(given, truth, point, base) for point in _whole_points(names)]
        if not all(pair is None or _agree(given, truth, pair) for pair in whole):
            return False
        found += sum(pair is not None for pair in whole)
    return found >= _FEWEST_POINTS


def _agree(given: Node, truth: Node, pair: tuple[Any, Any]) -> bool:
    return _close(*pair) or (bool(_digits(truth)) and not given.names and _rounds(truth, *pair))


def _digits(node: Node) -> int:
    """Significant digits of a plain decimal; 0 of anything else."""
    return _digits(node.parts[0]) if node.kind == "neg" else node.digits


def _rounded(decimal: Node, value: Fraction, other: Fraction) -> bool:
    """Whether a decimal with enough digits is another rational number, rounded."""
    digits = _digits(decimal)
    if digits < _ENOUGH_DIGITS or value == 0:
        return False
    return abs(value - other) <= abs(value) * Fraction(1, 2 * 10 ** (digits - 1)) and _unit(decimal) >= 2 * abs(value - other)


def _unit(decimal: Node) -> Fraction:
    """One in the last place."""
    number = decimal.parts[0] if decimal.kind == "neg" else decimal
    places = number.value.denominator
    exponent = 0
    while 10**exponent % places:
        exponent += 1
    return Fraction(1, 10 ** max(exponent, number.digits - len(str(abs(int(number.value)) or ""))))


def _rounds(truth: Node, given: Any, value: Any) -> bool:
    """Whether the truth is a decimal with enough digits, to which the given value is rounded."""
    digits = _digits(truth)
    return digits >= _ENOUGH_DIGITS and abs(given - value) <= abs(value) * arithmetic().mpf(10) ** (1 - digits) / 2


def _close(one: Any, other: Any) -> bool:
    return abs(one - other) <= arithmetic().mpf(10) ** -_SAME * max(abs(one), abs(other))


def _points(given: Node, truth: Node) -> Iterator[Point]:
    names = given.names | truth.names
    if not names:
        yield {}
    elif given.has("floor", "ceiling") or truth.has("floor", "ceiling"):
        yield from _whole_points(names)
        if not names <= _COUNTED:
            yield from map(partial(_point, names), _POINTS)
    else:
        yield from map(partial(_point, names), _POINTS)


def _whole_points(names: frozenset[str]) -> Iterator[Point]:
    """A name alone counts from 1 to 60; several take many whole numbers."""
    alone = ((number,) for number in range(1, 61))
    yield from map(partial(_point, names), alone if len(names) == 1 else _WHOLE)


def _point(names: frozenset[str], values: Sequence[Any]) -> Point:
    number = arithmetic().mpf
    wrapped = ((name, *divmod(place, len(values))) for place, name in enumerate(sorted(names)))
    return {name: number(values[place]) + turn for name, turn, place in wrapped}


def _at(given: Node, truth: Node, point: Point, base: str) -> tuple[Any, Any] | None:
    """Both values; None where one has none."""
    is_real = not (given.has("i") or truth.has("i"))
    try:
        return number_at(given, point, base, is_real), number_at(truth, point, base, is_real)
    except NoValue:
        return None
