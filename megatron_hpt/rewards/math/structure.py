"""What an answer is made of: lists, tuples, sets, unions, matrices, relations, names, and what is none of these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from megatron_hpt.rewards.math.units import SENTENCE


class PartKind(StrEnum):
    """What a part of an answer is."""

    LEAF = "leaf"
    """An expression with its unit, or a text."""
    LIST = "list"
    """Several answers, in any order."""
    SEQUENCE = "sequence"
    """A list with dots in it: its order counts."""
    SET = "set"
    TUPLE = "tuple"
    """In round or square brackets: a point, a vector, an interval."""
    UNION = "union"
    MATRIX = "matrix"
    ROW = "row"
    CASES = "cases"
    RATIO = "ratio"
    RELATION = "relation"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer."""

    kind: PartKind
    text: str
    parts: tuple[Part, ...] = ()
    mark: str = ""
    """Brackets of a tuple; signs of a relation, separated by spaces; the name of what is named."""


_OPENING = {"(": ")", "[": "]", "{": "}"}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_ENVIRONMENT = re.compile(r"^\s*\\begin\s*\{(pmatrix|cases|aligned|array)\}(.*)\\end\s*\{\1\}\s*$", re.DOTALL)
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\equiv": "=="}
_NAME = re.compile(
    r"""\s*(?:
      (?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|ell)(?![A-Za-z])
        |\\(?:operatorname|text|mathrm|mathbb|mathcal|overline|vec|hat|bar|widehat)\s*\{[^{}]*\})
      '*(?:_\s*(?:\{[^{}]*\}|\w))?'*
      (?:\s*\([^()=]*\)|\s*\[[^\[\]=]*\])?
    | \\(?:angle|triangle)\s*[A-Z]{1,3} | \|\s*[A-Z]{1,2}\s*\| | [A-Z]{2,3}
    | \(\s*[A-Za-z]\s*(?:,\s*[A-Za-z]\s*)+\)
    | \\frac\s*\{\s*d\s*[a-z]?\s*\}\s*\{\s*d\s*[a-z]\s*\} | [A-Za-z]\s*\^\s*\{?\s*-1\s*\}?\s*\([^()=]*\)
    )\s*""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d)?")
_DOTS = (r"\ldots", "...")


@lru_cache(maxsize=2048)
def parse(text: str) -> Part:
    """The parts of a plain text. It never fails: what has no structure is a leaf."""
    text = text.strip()
    environment = _ENVIRONMENT.match(text)
    if environment:
        return _rows(text, *environment.groups())
    text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text) if not re.search(r"[(\[{]", text) else text
    items = _split(text, (",", ";"))
    if len(items) > 1:
        return _list(text, items)
    relation = _relation(text)
    if relation:
        return relation
    for separators, kind in (((r"\cup",), PartKind.UNION), ((":",), PartKind.RATIO)):
        pieces = _split(text, separators)
        if len(pieces) > 1 and all(piece.strip() for piece in pieces) and not _CLOCK.fullmatch(text):
            return Part(kind, text, tuple(map(parse, pieces)))
    return _bracketed(text) or _alternatives(text) or Part(PartKind.LEAF, text)


def _rows(text: str, name: str, body: str) -> Part:
    rows = [row for row in _split(body, (r"\\",)) if row.strip()]
    if name == "pmatrix":
        cells = [_row(row) for row in rows]
        return Part(PartKind.MATRIX, text, tuple(cells))
    if rows and any("&" in re.sub(r"&\s*(?==|<|>|\\[lg]e)", "", row) for row in rows):
        return Part(
            PartKind.CASES,
            text,
            tuple(_row(row) for row in rows),
        )
    return _list(text, [row.replace("&", "") for row in rows])


def _row(row: str) -> Part:
    """The cells of a row; what ends one as a sentence is left out."""
    return Part(PartKind.ROW, row, tuple(parse(cell.strip().rstrip(",.")) for cell in _split(row, ("&",))))


def _list(text: str, items: list[str]) -> Part:
    if not items or any(not item.strip() for item in items):
        return Part(PartKind.LEAF, text)
    parts = [parse(item) for item in items]
    if any(item.strip() in _DOTS for item in items):
        return Part(PartKind.SEQUENCE, text, tuple(parts))
    first, *others = parts
    if first.kind is PartKind.NAMED and not any(part.kind in (PartKind.NAMED, PartKind.RELATION) for part in others):
        return Part(PartKind.NAMED, text, (Part(PartKind.LIST, text, (first.parts[0], *others)),), first.mark)  # m = 3, 5, 7
    return Part(PartKind.LIST, text, tuple(parts))


def _relation(text: str) -> Part | None:
    """A name and what it is, or sides and signs between them."""
    sides, signs = _cut(text)
    if not signs:
        return None
    if any(not side.strip() for side in sides):
        return Part(PartKind.LEAF, text)
    if signs[0] in ("=", "in", "==") and set(signs) <= {"=", signs[0]} and _is_name(sides[0]):
        values = tuple(parse(side) for side in sides[1:])
        name = re.sub(r"\s", "", sides[0]) + ("" if signs[0] == "=" else f" {signs[0]}")
        return Part(PartKind.NAMED, text, (values[-1], *values[:-1]), name)
    return Part(PartKind.RELATION, text, tuple(Part(PartKind.LEAF, side.strip()) for side in sides), " ".join(signs))


def _is_name(text: str) -> bool:
    """A name, and no words that deny what follows."""
    return bool(_NAME.fullmatch(text)) and not set(re.findall("[a-z]+", text.lower())) & SENTENCE


def _bracketed(text: str) -> Part | None:
    """A set or tuple: brackets around everything, with a comma or nothing inside."""
    for opening, closing, kind, mark in (
        (r"\{", (r"\}",), PartKind.SET, ""),
        (r"\langle", (r"\rangle",), PartKind.TUPLE, "()"),
        ("(", (")", "]"), PartKind.TUPLE, "("),
        ("[", ("]", ")"), PartKind.TUPLE, "["),
    ):
        end = next((one for one in closing if text.startswith(opening) and text.endswith(one)), None)
        if end is None or not _encloses(text, opening, end):
            continue
        inner = text[len(opening) : -len(end)]
        items = _split(inner, (",", ";"))
        if kind is PartKind.SET and not inner.strip():
            return Part(PartKind.SET, text)
        if kind is PartKind.TUPLE and len(items) == 1:
            return parse(inner) if (opening, end) == ("(", ")") and _cut(inner)[1] else None
        if any(not item.strip() for item in items) or (kind is PartKind.SET and re.search(r"\\mid|\||:", inner)):
            return None
        mark = mark if len(mark) != 1 else opening + end
        return Part(kind, text, tuple(map(parse, items)), mark)
    return Part(PartKind.SET, text) if re.fullmatch(r"\\emptyset", text) else None


def _alternatives(text: str) -> Part | None:
    """Both values of what has a plus-minus sign in it; all such signs are taken alike."""
    if not re.search(r"\\[pm][mp](?![A-Za-z])", text):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return Part(PartKind.LIST, text, (Part(PartKind.LEAF, upper.strip()), Part(PartKind.LEAF, lower.strip())))


# Text at the top level: outside of all brackets.


def _tokens(text: str) -> list[tuple[str, int, int]]:
    """Every token with its place and the depth of brackets before it; an interval's brackets need not be alike."""
    found, depth, place = [], 0, 0
    while place < len(text):
        command = _COMMAND.match(text, place)
        token = command[0] if command else text[place]
        if token in ")]}" or token in (r"\}", r"\rangle"):
            depth -= 1
        found.append((token, place, depth))
        if token in _OPENING or token in (r"\{", r"\langle") or token == r"\begin":
            depth += 1
        if token == r"\end":
            depth -= 1
        place += len(token)
    return found


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    pieces, start = [], 0
    for token, place, depth in _tokens(text):
        if depth == 0 and token in separators:
            pieces.append(text[start:place])
            start = place + len(token)
    return [*pieces, text[start:]]


def _cut(text: str) -> tuple[list[str], list[str]]:
    """Sides of a relation, and the signs between them."""
    sides, signs, start = [], [], 0
    for token, place, depth in _tokens(text):
        if depth == 0 and token in _RELATIONS:
            sides.append(text[start:place])
            signs.append(_RELATIONS[token])
            start = place + len(token)
    return [*sides, text[start:]], signs


def _encloses(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket closes with the last."""
    inner = _tokens(text)[1:-1]
    return all(depth >= 1 for _, _, depth in inner)
