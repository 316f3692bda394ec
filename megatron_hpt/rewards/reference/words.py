"""Words beside a number that do not change what the answer says.

The reference's list comes from MathQA. Left out of it are words that tell two answers apart (more and less, increase and
decrease, east and west, am and pm, profit and loss) and single letters that are variables at least as often as units.
"""

from __future__ import annotations

import re

_MEASURES = """
    degree deg mile mph kmph kmh feet foot inch yard acre hectare gallon gal litre liter metre meter centimeter kilometer
    millimeter mtr gram kilogram pound ounce ton ohm watt joule newton volt hertz second sec minute min hour day week month
    year square cubic cube unit percent rupee
"""
_THINGS = """
    apple coin toy pie tile mark soldier man men woman women monkey round number way ratio people person student ticket
    point edge digit meal time item
"""
_SHORT = "m s g h l d ft mm dm km kg gm lb lbs hr hrs yr yrs mt cc rs sq cu"
"""Only behind a number and a space."""


def _any(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_SPACE = r"(?:\s|~|\\[ ,;:!])"
_POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
_UNITS = rf"(?:(?:{_any(_MEASURES + _THINGS)})(?:es|s)?|cm|{_any(_SHORT)})"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # \text{…} at the end: of a number it can say anything, of an expression only a unit
        rf"(?<=[\d}})%$]){_SPACE}*\\text\s*\{{[^{{}}]*\}}{_POWER}\s*\.?$",
        rf"(?<=\w){_SPACE}*\\(?:text|mathrm|textrm|mbox)\s*\{{{_SPACE}*{_UNITS}{_SPACE}*\}}{_POWER}\s*\.?$",
        rf"(?<![A-Za-z\\])(?:{_any(_MEASURES + _THINGS)})(?:es|s)?(?![A-Za-z]){_POWER}",
        rf"(?<=[\d}})]){_SPACE}*cm(?![A-Za-z]){_POWER}",
        rf"(?<=[\d}})]){_SPACE}+(?:{_any(_SHORT)})(?![A-Za-z]){_POWER}\.?",
        r"(?<=\d)\s*\^?\s*\{?\s*\\(?:text|mathrm|textrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?",
        r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°",
    )
)
_CUT_INTO = tuple("=+-*/^_(,{")


def without_units(latex: str) -> str:
    """The answer without its units; where that leaves nothing, or half an expression, the unit was the answer and stays."""
    for pattern in _PATTERNS:
        rest = pattern.sub("", latex).strip()
        if rest and not rest.endswith(_CUT_INTO):
            latex = rest
    return latex
