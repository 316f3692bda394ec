"""An expression as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


class Unreadable(Exception):
    """Not an expression that can be understood as a whole."""


@dataclass(frozen=True, slots=True)
class Node:
    """A number, a name, or an operation on others."""

    kind: str
    """``number``, ``symbol``, an operator (``+ * / ^ neg``), or the name of a function or constant."""
    parts: tuple[Node, ...] = ()
    value: Fraction | None = None
    """Of a number."""
    name: str = ""
    """Of a symbol, or of what is not looked into: two are the same if their names are."""
    digits: int = 0
    """Significant digits of a number with a decimal point; 0: it is exact."""

    @property
    def names(self) -> frozenset[str]:
        """Symbols in it."""
        own = frozenset({self.name}) if self.kind == "symbol" else frozenset()
        return own.union(*(part.names for part in self.parts))

    def has(self, *kinds: str) -> bool:
        """Whether it is of one of these kinds, or has a part that is."""
        return self.kind in kinds or any(part.has(*kinds) for part in self.parts)


def number_node(digits: str) -> Node:
    if len(digits) > 400 or digits == ".":
        raise Unreadable("no number, or a long one")
    return Node("number", value=Fraction(digits), digits=len(digits.replace(".", "").lstrip("0")) if "." in digits else 0)


class NoValue(Exception):
    """None here: not real, divided by zero, or too large to be computed."""
