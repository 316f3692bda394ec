"""Reading an expression in LaTeX, wholly or not at all.

math-verify's parser is not used: it reads `2(3)` as 5, passes over primes, the base of a number and what stands behind what it
knows, and falls back to the first number that it meets. Here whatever is not understood makes the whole expression unreadable,
and then it equals only what is written alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from megatron_hpt.rewards.boxes import argument
from megatron_hpt.rewards.math.nodes import Node, Unreadable, number_node
from megatron_hpt.rewards.math.vocabulary import (
    ACCENTS,
    APPLIED,
    CONSTANTS,
    FIGURES,
    FUNCTIONS,
    GREEK,
    INVERSES,
    LISTS,
    ROUNDING,
)

LONGEST = 1000
"""Characters of an expression that is read."""
DEEPEST = 40
"""Brackets and operations within each other."""
_MOST_FACTORS = 100
_MOST_EXPONENTS = 8
_DERIVATIVE = re.compile(
    r"\s*\{\s*(?:d|\\partial)\s*(?:\^\s*\{?\s*\d\s*\}?)?\s*[^{}]*\}\s*\{\s*(?:d|\\partial)\s*[A-Za-z][^{}]*\}"
)
"""Behind \\frac."""
_APPLICATION = re.compile(r"\s*\(\s*-?[\d.]*\s*(?:[A-Za-z]|\\[a-z]+)?\s*\)")
"""A bracket with a number, a name, or a multiple of one: a function's argument and no factor."""
_TOKEN = re.compile(r"\s*(\d+\.\d+|\d+\.?(?![.\d])|\d+|\.\d+|\\[A-Za-z]+|\\.|.)", re.DOTALL | re.ASCII)
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_NAMED_FUNCTIONS = re.compile(
    r"\\(?:operatorname\*?|text|mathrm|textrm)\s*\{\s*([A-Za-z]+)\s*\}\s*$|\\(det|dim|ker|deg|Re|Im|arg)$"
)
_FRACTION = re.compile(r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
"""Of two numbers, behind a whole one."""
_CAPITALS = re.compile(r"[A-Z]*")
"""Behind a capital letter: AB is one name, a segment or a word, and not BA."""
_STARTS = re.compile(r"\d|\.\d|[A-Za-z(\[{|]|\\(?:[A-Za-z]+|\{)")
_STOPS = frozenset({r"\cdot", r"\div", r"\rfloor", r"\rceil", r"\}"})


@lru_cache(maxsize=2048)
def read(text: str) -> Node:
    """The expression that a plain text is.

    Raises:
        Unreadable: it is not, or it is too long or too deep.
    """
    if len(text) > LONGEST:
        raise Unreadable("too long")
    return _Reader(text).all()


class _Reader:
    """Recursive descent: a method a level of precedence."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth, self._bars = text, 0, 0, 0

    def all(self) -> Node:
        found = self._sum()
        if self._peek():
            raise Unreadable(f"{self._peek()!r} is left")
        return found

    # Tokens.

    def _peek(self) -> str:
        found = _TOKEN.match(self._text, self._place)
        return found[1] if found and not found[1].isspace() else ""

    def _next(self) -> str:
        found = _TOKEN.match(self._text, self._place)
        if not found or found[1].isspace():
            raise Unreadable("it ends too early")
        self._place = found.end()
        return found[1]

    def _take(self, token: str) -> bool:
        if self._peek() != token:
            return False
        self._next()
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise Unreadable(f"{token!r} is missing")

    # Levels.

    def _sum(self) -> Node:
        terms = [self._signed(self._product)]
        while (sign := self._peek()) in ("+", "-"):
            self._next()
            term = self._signed(self._product)
            terms.append(Node("neg", (term,)) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def _signed(self, read: Callable[[], Node]) -> Node:
        sign = self._peek()
        if sign in ("+", "-"):
            self._next()
            if self._peek() in ("+", "-"):
                raise Unreadable("two signs")
            return Node("neg", (read(),)) if sign == "-" else read()
        return read()

    def _product(self) -> Node:
        result = self._power()
        for _ in range(_MOST_FACTORS):
            token = self._peek()
            if token in ("*", r"\cdot"):
                self._next()
                result = Node("*", (result, self._signed(self._power)))
            elif token in ("/", r"\div"):
                self._next()
                result = Node("/", (result, self._signed(self._power)))
            elif self._begins_factor(token):
                if token[0] in "0123456789." and self._text[self._place - 1].isdigit():
                    raise Unreadable("two numbers side by side")
                result = Node("*", (result, self._power()))
            else:
                return result
        raise Unreadable("a long product")

    def _begins_factor(self, token: str) -> bool:
        if token == "|":
            return self._bars == 0
        return bool(token) and bool(_STARTS.match(token)) and token not in _STOPS

    def _power(self) -> Node:
        base = self._atom()
        for _ in range(_MOST_EXPONENTS):
            token = self._peek()
            if token == "!":
                self._next()
                if self._peek() == "!":
                    raise Unreadable("a double factorial")
                base = Node("factorial", (base,))
            elif token == "^":
                self._next()
                if self._take(r"\circ"):
                    base = Node("degrees", (base,))
                    continue
                base = Node("^", (base, self._argument(signed=True)))
                if self._peek() == "^":
                    raise Unreadable("two exponents")
            elif token == r"\%":
                self._next()
                base = Node("/", (base, number_node("100")))
            else:
                return base
        raise Unreadable("a long chain of exponents")

    def _argument(self, signed: bool = False) -> Node:
        """A group, or the next number, letter or command."""
        if signed and self._peek() in ("-", "+"):
            return self._signed(self._argument)
        if self._peek() in ("{", "("):
            return self._atom()
        return self._atom(single=True)

    def _digits(self) -> Node:
        """An argument of \\frac or \\sqrt: of `\\frac12` each digit is one."""
        token = self._peek()
        if not token.isdecimal() or len(token) == 1:
            return self._argument()
        while self._text[self._place].isspace():
            self._place += 1
        self._place += 1
        return number_node(self._text[self._place - 1])

    def _atom(self, single: bool = False) -> Node:
        """
        Args:
            single: it is an argument without braces: a bracket behind it belongs to somebody else.
        """
        self._depth += 1
        if self._depth > DEEPEST:
            raise Unreadable("too deep")
        found = self._one(single)
        self._depth -= 1
        return found

    def _one(self, single: bool) -> Node:
        start, token = self._place, self._next()
        if token[0] in "0123456789" or token[0] == ".":
            return self._behind_number(token)
        if token in _CLOSING:
            return self._bracketed(token)
        if token == r"\frac" and (derivative := _DERIVATIVE.match(self._text, self._place)):
            self._place = derivative.end()
            return Node("symbol", name=_squeezed(self._text[start : self._place]))
        if token == r"\frac":
            return Node("/", (self._digits(), self._digits()))
        if token == r"\sqrt":
            return self._root()
        if token == r"\binom":
            return Node("binomial", (self._digits(), self._digits()))
        if token in LISTS:
            return self._several(token)
        if token.startswith("\\") and token[1:] in FUNCTIONS:
            return self._function(token[1:])
        return self._name(token, start, single)

    def _behind_number(self, token: str) -> Node:
        """A number, one in another base, or a whole number and a fraction."""
        if self._take("_"):
            base = self._argument()
            if base.value is None or base.value.denominator != 1 or not 2 <= base.value <= 36 or not token.isdecimal():
                raise Unreadable("an index of a number")
            try:
                value = int(token, int(base.value))
            except ValueError:
                raise Unreadable("a digit that its base has not") from None
            return Node("based", value=Fraction(value), name=f"{token}_{base.value}")
        mixed = _FRACTION.match(self._text, self._place)
        if mixed and token.isdecimal():
            above, below = (int(part) for part in mixed.groups() if part)
            if above < below:
                self._place = mixed.end()
                return Node("+", (number_node(token), Node("/", (number_node(str(above)), number_node(str(below))))))
        return number_node(token)

    def _bracketed(self, token: str) -> Node:
        bars, self._bars = self._bars, int(token == "|")
        inner = self._sum()
        self._expect(_CLOSING[token])
        self._bars = bars
        if token == r"\{":
            raise Unreadable("a set among numbers")
        return Node(ROUNDING[token], (inner,)) if token in ROUNDING else inner

    def _root(self) -> Node:
        degree = None
        if self._take("["):
            degree = self._sum()
            self._expect("]")
        inner = self._digits()
        return Node("root", (inner, degree)) if degree else Node("sqrt", (inner,))

    def _several(self, token: str) -> Node:
        opening = self._next()
        if opening not in ("(", r"\{"):
            raise Unreadable(f"{token} without a bracket")
        parts = [self._sum()]
        while self._take(","):
            parts.append(self._sum())
        self._expect(_CLOSING[opening])
        return Node(LISTS[token], tuple(parts))

    def _function(self, name: str) -> Node:
        base = power = None
        while self._peek() in ("^", "_"):
            if self._next() == "^":
                power = self._argument(signed=True)
            else:
                base = number_node("10") if self._take("10") else self._digits()
        if name in ("log", "lg"):
            base = base or (number_node("10") if name == "lg" else None)
            name = "logarithm" if base else "log?"
        elif base:
            raise Unreadable("an index of a function")
        if power and name in INVERSES and power == Node("neg", (number_node("1"),)):
            name, power = INVERSES[name], None
        inner = self._argument() if self._peek() in ("(", "{") else self._implied()
        found = Node(name, (inner, base) if base else (inner,))
        return Node("^", (found, power)) if power else found

    def _implied(self) -> Node:
        """What a function without brackets is of: factors side by side, up to an operator or another function."""
        result = self._signed(self._power)
        for _ in range(_MOST_FACTORS):
            token = self._peek()
            if not self._begins_factor(token) or token[1:] in FUNCTIONS or token in ("(", r"\frac"):
                return result
            result = Node("*", (result, self._power()))
        raise Unreadable("a long product")

    def _name(self, token: str, start: int, single: bool) -> Node:
        applied = self._applied(token, start)
        if applied:
            return applied
        if token in CONSTANTS and self._peek() not in ("_", "'"):
            return Node(CONSTANTS[token])
        if token in ACCENTS:
            self._place = self._group(self._place)
        elif token in FIGURES:
            letters = re.compile(r"\s*(?:\{\s*)?[A-Z]{1,3}(?:\s*\})?").match(self._text, self._place)
            if not letters:
                raise Unreadable(f"{token} without letters")
            self._place = letters.end()
        elif token not in GREEK and not re.fullmatch("[A-Za-z]", token):
            raise Unreadable(f"{token!r} is not known")
        else:
            self._refuse_words(start)
            if token.isupper():
                self._place = _CAPITALS.match(self._text, self._place).end()
        self._index()
        if not single and self._peek() == "(" and (token in APPLIED or _APPLICATION.match(self._text, self._place)):
            self._place = self._group(self._place)
        return Node("symbol", name=_squeezed(self._text[start : self._place]))

    def _applied(self, token: str, start: int) -> Node | None:
        """A function by a name of several letters, with its bracket."""
        if token in (r"\operatorname", r"\text", r"\mathrm", r"\textrm"):
            self._place = self._group(self._place)
        if not _NAMED_FUNCTIONS.match(self._text[start : self._place].strip()):
            return None
        self._index()
        if self._peek() not in ("(", "[", "{"):
            raise Unreadable("words")
        self._place = self._group(self._place)
        return Node("symbol", name=_squeezed(self._text[start : self._place]))

    def _index(self) -> None:
        """Primes and an index."""
        while self._peek() == "'":
            self._next()
        if self._take("_"):
            self._place = self._group(self._place)
            while self._peek() == "'":
                self._next()

    def _group(self, place: int) -> int:
        """Place after the bracket, or the one token, that begins here."""
        opening = _TOKEN.match(self._text, place)
        if not opening:
            raise Unreadable("it ends too early")
        first = opening.end() - len(opening[1])
        if opening[1] == "{":
            end = argument(self._text, first)
            if end == first:
                raise Unreadable("a brace that does not close")
            return end
        if opening[1] not in ("(", "["):
            return opening.end()
        depth = 0
        for end in range(first, len(self._text)):
            depth += (self._text[end] in "([") - (self._text[end] in ")]")
            if depth == 0:
                return end + 1
        raise Unreadable("a bracket that does not close")

    def _refuse_words(self, start: int) -> None:
        """Four letters in a row are a word and no product."""
        first = start + len(self._text[start:]) - len(self._text[start:].lstrip())
        if re.compile(r"[A-Za-z]{4}").match(self._text, first) and not self._text[first - 1 : first].isalpha():
            raise Unreadable("a word")


def _squeezed(text: str) -> str:
    return re.sub(r"\s|(?<=[_^])\{(?=\w\})|(?<=[_^]\{\w)\}", "", text)
