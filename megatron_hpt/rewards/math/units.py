"""Units, scales, and words that stand behind a number."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_hpt.rewards.math.vocabulary import word_set

SCALES = {
    **{"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"lakh": 10**5, "crore": 10**7, "k": 10**3, "K": 10**3, "M": 10**6, "bn": 10**9},
}
_DIMENSIONS: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter metre mtr", "1000": "km kilometer kilometre", "1/10": "dm", "1/100": "cm centimeter centimetre",
        "1/1000": "mm millimeter millimetre", "0.3048": "ft foot feet", "0.0254": "in inch", "0.9144": "yd yard",
        "1609.344": "mi mile",
    },
    "time": {"1": "s sec second", "60": "min minute", "3600": "h hr hour", "86400": "day", "604800": "week"},
    "mass": {"1": "g gm gram", "1000": "kg kilogram", "1/1000": "mg milligram", "1000000": "t ton tonne",
             "453.59237": "lb pound"},
    "money": {"1": "dollar usd", "1/100": "cent"},
    "volume": {"1": "l L liter litre", "1/1000": "ml milliliter millilitre cc"},
    "length/time": {"1397/3125": "mph", "5/18": "kmph kmh kph"},
    "angle": {"1": "degree deg"},
    "degrees Celsius": {"1": "celsius"},
    "degrees Fahrenheit": {"1": "fahrenheit"},
    "percent": {"1": "percent"},
}  # fmt: skip
"""Dimension → how many of its first unit one is → names in the singular."""
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, factors in _DIMENSIONS.items()
    for factor, names in factors.items()
    for name in names.split()
}
"""Name → dimension and factor."""
ALIASES = {
    "°": "degree",
    "%": "percent",
    "pct": "percent",
    "percentage": "percent",
    "sq": "square",
    "cu": "cubic",
    "yr": "year",
    "per": "/",
}


TELLING = word_set(
    """
    am pm bc ad bce ce even odd north south east west northeast northwest southeast southwest left right up clockwise
    counterclockwise anticlockwise upward downward positive increase increasing more profit gain remainder r above before after
    minimum maximum local global red black white blue green head tail mod
    """
)
"""Words that tell two answers apart: the answer must have them if the truth does."""
SENTENCE = word_set(
    """
    is are was were be not no none never isn t cannot wrong false incorrect true correct or if unless but except and than then
    so because answer it they approximately about over plus minus times divided half halves third quarter squared cubed
    factorial point excluded excluding most least maybe possibly undefined dne base zero one two three four five six seven eight
    nine ten negative loss below decrease decreasing down less anything opposite
    """
)
"""Words of which a phrase is no unit: it says more of the number, or denies it."""
SAYING_NOTHING = word_set("st nd rd th unit of")
_SHORT = word_set("st nd rd th am pm odd men way day")
"""Short words that are no product of letters."""
_ATTACHED = word_set("cm km mm ft lb hr min sec mph kmh cents")
"""Plain letters right behind a number that are no product."""


def is_wordlike(words: str, attached: bool) -> bool:
    """Whether letters behind a number are words, and not a product as xy.

    Args:
        attached: no space is before them.
    """
    if attached:
        return words.strip().rstrip("s") in _ATTACHED or words.strip() in _SHORT
    first = re.split(r"[ /-]", words.strip())[0].rstrip(".")
    first = first if len(first) < 3 else first.lower()
    known = {first, stem(first)} & (UNITS.keys() | SCALES.keys() | ALIASES.keys() | _SHORT)
    return bool(known) or len(first) > 3 or " " in words.strip()


def stem(word: str) -> str:
    """A word in the singular."""
    if word in UNITS or len(word) < 3 or word.endswith("ss"):
        return word
    without = word.removesuffix("es")
    return without if without in UNITS else word.removesuffix("s")


def known(unit: str) -> tuple[str, Fraction]:
    """Dimension and factor of a unit, also of a square, a cube, a quotient; an empty one and 1 if it is not known."""
    above, slash, below = unit.partition(" / ")
    if slash:
        (first, one), (second, other) = known(above), known(below)
        return (f"{first}/{second}", one / other) if first and second else ("", Fraction(1))
    name, _, power = unit.partition("^")
    words, exponent = name.split(), int(power or 1)
    for word, value in (("square", 2), ("cubic", 3)):
        if len(words) == 2 and word in words:
            exponent = value
            words.remove(word)
    if len(words) != 1 or words[0] not in UNITS or not -3 <= exponent <= 3:
        return "", Fraction(1)
    dimension, factor = UNITS[words[0]]
    return (dimension if exponent == 1 else f"{dimension}^{exponent}"), factor**exponent
