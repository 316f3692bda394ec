"""What stands behind a number: units, scales such as million, and words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_hpt.rewards.math.nodes import Unreadable
from megatron_hpt.rewards.math.units import (
    ALIASES,
    SAYING_NOTHING,
    SCALES,
    SENTENCE,
    TELLING,
    UNITS,
    is_wordlike,
    known,
    stem,
)
from megatron_hpt.rewards.math.writing import normal, plain

_WORDS_AT_MOST = 4
_POWER = r"(?:\s*\^\s*(?:\{\s*(-?\d)\s*\}|(\d)))?"
_TEXT = rf"\\(?:text|mathrm|mbox|textrm)\s*\{{(?P<text>[^{{}}\\]*)\}}{_POWER}"
_PLAIN = r"(?<=[\d}\)])\s*(?P<plain>m/s|[A-Za-z]{2,}\.?(?:[ /-][A-Za-z.]+)*)"
_LAST = tuple(re.compile(pattern) for pattern in (rf"\s*{_TEXT}\s*$", rf"{_PLAIN}{_POWER}\s*$"))
_SIGNS = (
    (re.compile(r"\s*\\%\s*$"), "percent"),
    (re.compile(r"\s*\^\\circ\s*(?:\\(?:text|mathrm)\s*\{\s*C\s*\}|C)\s*$"), "celsius"),
    (re.compile(r"\s*\^\\circ\s*(?:\\(?:text|mathrm)\s*\{\s*F\s*\}|F)\s*$"), "fahrenheit"),
    (re.compile(r"\s*\^\\circ\s*$"), "degree"),
)
_PLAIN_NUMBER = re.compile(r"\s*-?[\d.,]+\s*")
_OF_ANGLES = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_MONEY = re.compile(r"^(-?)\s*\\\$\s*|\s*\\\$\s*$")
_MODULUS = re.compile(r"\s*\(?\s*\\(?:[pb]?mod|text\s*\{\s*mod\s*\})\s*(\{[^{}]*\}|[\w ]+)\)?\s*$")
_COMPOUND = re.compile(r"\s*,?\s*(\d+(?:\.\d+)?)\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*([A-Za-z]+)\.?\s*\}|([A-Za-z]{1,}))")
_NOT_WORDS = frozenset(["sin", "cos", "tan", "log", "ln", "exp", "cot", "sec", "csc", "pi", "mod", "max", "min", "gcd", "lcm"])


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number in LaTeX and what stands behind it."""

    body: str
    unit: str = ""
    """One of `UNITS` with its power, or other words; empty: none."""
    scale: Fraction = Fraction(1)
    """A million, say."""
    factor: Fraction = Fraction(1)
    """To the first unit of its dimension."""
    dimension: str = ""
    """Empty: words that are no unit, or none."""
    is_compound: bool = False
    """Of several numbers, as 5 feet 3 inches."""

    @property
    def is_telling(self) -> bool:
        return bool(set(self.unit.split()) & TELLING)


def quantity(text: str) -> Quantity:
    """A plain text as a number and what stands behind it.

    Raises:
        Unreadable: what stands there is a sentence.
    """
    compound = _compound(text)
    if compound:
        return compound
    body, scale = text, Fraction(1)
    money = bool(_MONEY.search(body))
    body = _MONEY.sub(r"\1", body) if money else body
    unit, body = _sign(body)
    while not unit:
        words, power, rest = _trailing(body)
        if words is None:
            break
        names = _singular(words)
        if names and names[0] in SCALES:
            scale *= SCALES[names[0]]
            names = names[1:]
        body, unit = rest, " ".join(names) + (f"^{power}" if power and names else "")
        if names:
            break
    modulus = _MODULUS.search(body)
    if modulus and not unit:
        body, unit = body[: modulus.start()], f"mod {normal(modulus[1])}"
    if money:
        unit = unit or "dollar"
    dimension, factor = known(unit)
    return Quantity(body, unit, scale, factor, dimension)


def marks(latex: str) -> tuple[list[str], str]:
    """What the strict rule compares beside the value: words, signs of units, indices and moduli, and the case of a name."""
    text = plain(latex)
    signs = re.findall(r"\\(?:%|\$|circ|[pb]?mod)|_\s*\w+", text)
    upright = re.findall(r"\\(?:text|mathrm|mbox)\s*\{\s*([^{}]*?)\s*\}", text)
    return [*signs, *upright, *re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))], text if text.isalpha() else ""


def _sign(body: str) -> tuple[str, str]:
    for pattern, unit in _SIGNS:
        rest = pattern.sub("", body)
        if rest != body and rest.strip() and not _OF_ANGLES.search(rest):
            return unit, rest
    return "", body


def _trailing(body: str) -> tuple[str | None, str, str]:
    """Words at the end, the power behind them, and what is before."""
    for pattern in _LAST:
        found = pattern.search(body)
        if not found or not body[: found.start()].strip():
            continue
        words, rest = found[1].strip(), body[: found.start()]
        plain = "plain" in found.groupdict()
        if not plain and len(words) == 1 and words not in UNITS:  # a symbol in upright type
            continue
        if plain and (words.lower() in _NOT_WORDS or not is_wordlike(words, attached=body[found.start()].isalpha())):
            continue
        if plain and len(words) < 3 and not _PLAIN_NUMBER.fullmatch(rest):  # a product
            continue
        return words, next((group for group in found.groups()[1:] if group), ""), rest
    return None, "", body


def _singular(words: str) -> list[str]:
    """The words, one by one, in one form.

    Raises:
        Unreadable: they are a sentence.
    """
    if not re.fullmatch(r"[\w\s.,\-/%$°'()^]*", words):
        raise Unreadable("words")
    found = re.findall(r"[A-Za-z]+(?:\^-?\d)?|[%$°/]", re.sub(r"(?i)\b([ap])\.\s*m\b\.?", r"\1m", words))
    found = [word if len(word) < 3 and word.lower() not in TELLING else word.lower() for word in found]
    if len(found) > _WORDS_AT_MOST or set(found) & SENTENCE or re.search(r"(?<!\^)(?<!\^-)\d|^\s*[-/]", words):
        raise Unreadable("a sentence")
    names = [ALIASES.get(stem(word), stem(word)) for word in found]
    names = [name for name in names if name not in SAYING_NOTHING]
    return [] if names in (["square"], ["cubic"]) else names


def _compound(text: str) -> Quantity | None:
    """5 feet 3 inches, 1 hour 20 minutes: all of one dimension, the larger first."""
    parts, place = [], 0
    while found := _COMPOUND.match(text, place):
        unit = UNITS.get(stem((found[2] or found[3]).lower()))
        if unit is None:
            return None
        parts.append((Fraction(found[1]), unit))
        place = found.end()
    dimensions = {dimension for _, (dimension, _) in parts}
    if text[place:].strip() or len(parts) < 2 or len(dimensions) != 1:
        return None
    total = sum(value * factor for value, (_, factor) in parts)
    body = str(total.numerator) if total.denominator == 1 else rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
    return Quantity(body, "compound", dimension=dimensions.pop(), is_compound=True)
