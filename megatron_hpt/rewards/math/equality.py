"""Whether two answers say the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from megatron_hpt.rewards.math import relations
from megatron_hpt.rewards.math.expressions import DEEPEST, LONGEST, read
from megatron_hpt.rewards.math.nodes import Node, Unreadable
from megatron_hpt.rewards.math.quantities import Quantity, quantity
from megatron_hpt.rewards.math.structure import Part, PartKind, parse
from megatron_hpt.rewards.math.values import real, same
from megatron_hpt.rewards.math.writing import normal, plain

_TEXT = re.compile(r"\s*\$?\s*\\text(?:bf|rm|it)?\s*\{[A-Za-z .,'-]*[A-Za-z]{2}[A-Za-z .,'-]*\}\s*\$?\s*")
"""A ground truth in words."""
_JOINED = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z]{4,}")
_ANSWERS = frozenset(("yes", "no", "odd", "mon", "tue", "wed", "thu", "fri", "sat", "sun", "all", "one", "two", "six", "ten"))
"""Short words; other letters are names, and their case counts."""
_LONGEST = 4 * LONGEST
"""Characters, layout included, of an answer that is looked into."""


def equal(given: str, truth: str) -> bool:
    """Whether two answers in LaTeX say the same."""
    if max(len(given), len(truth)) > _LONGEST:
        return given.split() == truth.split()
    is_text = bool(_TEXT.fullmatch(truth))
    ours, theirs = _joined(given), _joined(truth)
    given, truth = plain(given), plain(truth)
    if not given or not truth or (ours and theirs and ours != theirs):
        return False
    if is_text or _same_text(given, truth):
        return _same_text(given, truth)
    return _is_flat(given) and _is_flat(truth) and _equal(parse(given), parse(truth))


def _joined(latex: str) -> set[str]:
    """How inequalities are joined: by "and", or by "or"."""
    return set(_JOINED.findall(latex)) if re.search(r"[<>]|\\[lg](?:e|eq|t)(?![A-Za-z])|[≤≥]", latex) else set()


def _is_flat(text: str) -> bool:
    """It is short, and its brackets are few within each other."""
    depth = deepest = 0
    for bracket in re.findall(r"[{}()\[\]]", text):
        depth += 1 if bracket in "{([" else -1
        deepest = max(deepest, depth)
    return len(text) <= LONGEST and deepest <= DEEPEST


def number(latex: str) -> float | None:
    """The value of an answer that is one number as a whole, in the unit that it is given in; None if it is none."""
    if len(latex) > LONGEST or not _is_flat(latex):
        return None
    part = _value(parse(plain(latex)))
    try:
        found = quantity(part.text)
        return real(_times(read(found.body), found.scale)) if part.kind is PartKind.LEAF else None
    except Unreadable:
        return None


def _same_text(given: str, truth: str) -> bool:
    one, other = normal(given), normal(truth)
    return one == other or (one.casefold() == other.casefold() and (one.casefold() in _ANSWERS or bool(_WORD.fullmatch(one))))


def _equal(given: Part, truth: Part) -> bool:
    if _same_text(given.text, truth.text):
        return True
    if given.kind is PartKind.NAMED or truth.kind is PartKind.NAMED:
        return _equal_named(given, truth)
    if given.kind is truth.kind:
        return _SAME_KIND[given.kind](given, truth)
    return _other_kinds(given, truth) or _other_kinds(truth, given)


# Names: "x = 5" is 5, but not "y = 5"; "f(2) = 3" is 3.


def _equal_named(given: Part, truth: Part) -> bool:
    """At least one of them has a name."""
    if given.kind is truth.kind:
        if normal(given.mark) != normal(truth.mark):
            return relations.equal(_as_relation(given), _as_relation(truth), _equal)
    else:
        named, other = (given, truth) if given.kind is PartKind.NAMED else (truth, given)
        if _is_member(named) and other.kind in (PartKind.LIST, PartKind.LEAF):
            return False  # x lies in (3, 4); 3 and 4 are something else
        if other.kind is PartKind.RELATION:
            return _is_interval(named, other) or relations.equal(_as_relation(given), _as_relation(truth), _equal)
    return _is_consistent(given) and _equal(_value(given), _value(truth))


def _is_member(named: Part) -> bool:
    """The name lies in what stands behind it."""
    return named.mark.endswith(" in")


def _is_interval(named: Part, relation: Part) -> bool:
    """x in [1, 2] is 1 <= x <= 2."""
    interval = relations.interval(relation)
    return _is_member(named) and interval is not None and _equal(interval, _value(named))


def _value(part: Part) -> Part:
    return part.parts[0] if part.kind is PartKind.NAMED else part


def _is_consistent(part: Part) -> bool:
    """x = 2 + 3 = 5 is, x = 2 + 3 = 6 is not."""
    return part.kind is not PartKind.NAMED or all(_equal(step, part.parts[0]) for step in part.parts[1:])


def _as_relation(part: Part) -> Part:
    if part.kind is not PartKind.NAMED:
        return part
    name, value = Part(PartKind.LEAF, part.mark), part.parts[0]
    return Part(PartKind.RELATION, part.text, (name, value), "=")


# Several answers.


def _equal_lists(given: Part, truth: Part) -> bool:
    """In any order: each has its equal on the other side; as often as the truth says, if it says one more than once.

    Values of different names keep the order of the names: x = 1, y = 2 is not 2, 1.
    """
    one, other = _flattened(given), _flattened(truth)
    names = {part.mark for part in (*one, *other) if part.kind is PartKind.NAMED}
    if len(names) > 1 and {part.kind is PartKind.NAMED for part in one} != {part.kind is PartKind.NAMED for part in other}:
        return len(one) == len(other) and all(map(_equal, one, other))
    if any(_equal(a, b) for place, a in enumerate(other) for b in other[:place]):
        return len(one) == len(other) and _matched(one, other)
    return _each_has_one(one, other) and _each_has_one(other, one)


def _flattened(several: Part) -> tuple[Part, ...]:
    """Both values of a plus-minus sign are two of the list."""
    parts = several.parts
    return tuple(part for one in parts for part in (one.parts if one.kind is PartKind.LIST else (one,)))


def _matched(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Each has one of its own."""
    left = list(others)
    for part in parts:
        place = next((place for place, other in enumerate(left) if _equal(part, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _each_has_one(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    return all(any(_equal(part, other) for other in others) for part in parts)


def _equal_in_order(given: Part, truth: Part) -> bool:
    return len(given.parts) == len(truth.parts) and all(map(_equal, given.parts, truth.parts))


def _equal_tuples(given: Part, truth: Part) -> bool:
    return given.mark == truth.mark and _equal_in_order(given, truth)


def _equal_unions(given: Part, truth: Part) -> bool:
    one, other = _flat(given), _flat(truth)
    return _equal_lists(one, other)


def _flat(union: Part) -> Part:
    """Elements of finite sets are parts like intervals."""
    parts = [element for part in union.parts for element in (part.parts if part.kind is PartKind.SET else (part,))]
    return Part(PartKind.SET, union.text, tuple(parts))


def _equal_ratios(given: Part, truth: Part) -> bool:
    """1:2 is 2:4."""
    one, other = _expressions(given.parts), _expressions(truth.parts)
    if one is None or other is None or len(one) != len(other) or any(same(node, read("0")) for node in (*one, *other)):
        return _equal_in_order(given, truth)
    cross = [(Node("*", (a, other[0])), Node("*", (b, one[0]))) for a, b in zip(one, other, strict=True)]
    return all(same(a, b) for a, b in cross)


def _expressions(parts: Sequence[Part]) -> list[Node] | None:
    try:
        return [read(part.text) for part in parts]
    except Unreadable:
        return None


def _other_kinds(one: Part, other: Part) -> bool:
    """Different kinds that may say the same; asked both ways."""
    pair = (one.kind, other.kind)
    if one.kind in (PartKind.LIST, PartKind.SET) and one.parts and all(_equal(part, other) for part in one.parts):
        return True
    if pair in ((PartKind.LIST, PartKind.SET), (PartKind.SET, PartKind.LIST)):
        return _equal_lists(one, other)
    if one.kind is PartKind.UNION and all(part.kind is PartKind.SET for part in one.parts):
        return _equal(_flat(one), other)
    if pair == (PartKind.LIST, PartKind.TUPLE):
        named = all(part.kind is PartKind.NAMED for part in one.parts)
        ordered = sorted(one.parts, key=lambda part: part.mark) if named else one.parts
        return other.mark == "()" and _equal_in_order(replace(one, parts=tuple(ordered)), other)
    if pair == (PartKind.LIST, PartKind.UNION):
        intervals = [relations.interval(part) if part.kind is PartKind.RELATION else None for part in one.parts]
        return None not in intervals and _equal_unions(replace(one, parts=tuple(intervals)), other)
    if pair == (PartKind.MATRIX, PartKind.TUPLE):
        cells = [cell for row in one.parts for cell in row.parts]
        is_vector = len(one.parts) == 1 or all(len(row.parts) == 1 for row in one.parts)
        return is_vector and other.mark == "()" and _equal_in_order(Part(PartKind.ROW, one.text, tuple(cells)), other)
    if pair == (PartKind.RATIO, PartKind.LEAF) and len(one.parts) == 2:
        nodes = _expressions([*one.parts, other])
        return nodes is not None and same(Node("/", (nodes[0], nodes[1])), nodes[2])
    if pair == (PartKind.RELATION, PartKind.TUPLE):
        interval = relations.interval(one)
        return interval is not None and _equal(interval, other)
    return False


# Expressions.


def _equal_leaves(given: Part, truth: Part) -> bool:
    try:
        return _equal_quantities(quantity(given.text), quantity(truth.text))
    except Unreadable:
        return False


def _equal_quantities(given: Quantity, truth: Quantity) -> bool:
    """Units count, unless one side has none; words that tell answers apart always do (docs/rewards.md)."""
    one, other = _infinite(given.body), _infinite(truth.body)
    if one or other:
        return one == other and given.unit == truth.unit
    if "mod" in (given.unit[:3], truth.unit[:3]) and given.unit != truth.unit:
        return False
    if "based" in (read(given.body).kind, read(truth.body).kind):
        return _equal_based(given, truth)
    if given.dimension and given.dimension == truth.dimension:
        return same(_times(read(given.body), given.scale * given.factor), _times(read(truth.body), truth.scale * truth.factor))
    if given.unit and truth.unit:
        return given.unit == truth.unit and same(_times(read(given.body), given.scale), _times(read(truth.body), truth.scale))
    if given.is_compound or truth.is_compound or truth.is_telling:
        return False
    return any(same(a, b) for a in _readings(given, truth) for b in _readings(truth, given))


def _equal_based(given: Quantity, truth: Quantity) -> bool:
    """The same digits and base, or the digits alone where the truth says the base; never the value in another base."""
    one, other = read(given.body), read(truth.body)
    digits = other.name.partition("_")[0]
    return other.kind == "based" and len(digits) > 1 and (one.name == other.name or given.body.strip() == digits)


def _readings(one: Quantity, other: Quantity) -> list[Node]:
    """Itself; beside a number without a unit also a share of a hundred, and an angle in radians."""
    node = _times(read(one.body), one.scale)
    if one.unit == "percent":
        share, beside = Node("/", (node, read("100"))), real(read(other.body))
        return [share] if beside is None or abs(beside) < 1 else [node, share]
    if one.unit == "degree":
        return [node, Node("degrees", (node,))]
    return [node]


def _times(node: Node, factor: Fraction) -> Node:
    return node if factor == 1 else Node("*", (node, Node("number", value=factor)))


def _infinite(body: str) -> str:
    """An infinity has a sign and no value."""
    text = normal(body).lstrip("+")
    return text if text.lstrip("-") == r"\infty" else ""


_SAME_KIND: dict[PartKind, Callable[[Part, Part], bool]] = {
    PartKind.LEAF: _equal_leaves,
    PartKind.LIST: _equal_lists,
    PartKind.SEQUENCE: _equal_in_order,
    PartKind.SET: _equal_lists,
    PartKind.TUPLE: _equal_tuples,
    PartKind.UNION: _equal_unions,
    PartKind.MATRIX: _equal_in_order,
    PartKind.ROW: _equal_in_order,
    PartKind.CASES: _equal_lists,
    PartKind.RATIO: _equal_ratios,
    PartKind.RELATION: lambda given, truth: relations.equal(given, truth, _equal),
}
