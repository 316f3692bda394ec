"""Equations and inequalities."""

from __future__ import annotations

from collections.abc import Callable

from megatron_hpt.rewards.math.expressions import read
from megatron_hpt.rewards.math.nodes import Node, Unreadable
from megatron_hpt.rewards.math.structure import Part, PartKind
from megatron_hpt.rewards.math.values import proportional

Same = Callable[[Part, Part], bool]
"""Whether two parts of an answer say the same."""
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def equal(given: Part, truth: Part, same: Same) -> bool:
    """Whether each link of one is one of the other: side by side, mirrored, or, where names occur in it, by a factor."""
    ours, theirs = _links(given), _links(truth)
    return (
        len(ours) == len(theirs)
        and all(any(_equal_links(a, b, same) for b in theirs) for a in ours)
        and (all(any(_equal_links(a, b, same) for a in ours) for b in theirs))
    )


Link = tuple[Part, str, Part]


def _links(relation: Part) -> list[Link]:
    """a < b < c is a < b and b < c."""
    return list(zip(relation.parts[:-1], relation.mark.split(), relation.parts[1:], strict=True))


def _equal_links(given: Link, truth: Link, same: Same) -> bool:
    if _side_by_side(given, truth, same) or _side_by_side(_mirrored(given), truth, same):
        return True
    sign = _mirrored(given)[1] if given[1] != truth[1] else given[1]
    if sign != truth[1] or sign in ("in", "=="):
        return False
    try:
        one, other = _difference(given if given[1] == sign else _mirrored(given)), _difference(truth)
    except Unreadable:
        return False
    return proportional(one, other, positive=sign not in ("=", "!="))


def _side_by_side(given: Link, truth: Link, same: Same) -> bool:
    return given[1] == truth[1] and same(given[0], truth[0]) and same(given[2], truth[2])


def _mirrored(link: Link) -> Link:
    left, sign, right = link
    return right, _MIRRORED.get(sign, sign), left


def _difference(link: Link) -> Node:
    return Node("+", (read(link[0].text), Node("neg", (read(link[2].text),))))


def interval(relation: Part) -> Part | None:
    """x < 4 as (-oo, 4), 1 < x <= 4 as (1, 4]."""
    signs = relation.mark.split()
    sides = relation.parts
    if len(signs) == 1 and not _is_name(sides[0]):
        (sides, signs) = (sides[::-1], [_MIRRORED.get(signs[0], signs[0])])
    if any(sign not in _MIRRORED for sign in signs) or len(signs) > 2:
        return None
    if len(signs) == 1:
        if not _is_name(sides[0]):
            return None
        infinite = Part(PartKind.LEAF, r"\infty"), Part(PartKind.LEAF, r"-\infty")
        low, high = (infinite[1], sides[1]) if "<" in signs[0] else (sides[1], infinite[0])
        closed = "=" in signs[0]
        mark = ("[" if closed and ">" in signs[0] else "(") + ("]" if closed and "<" in signs[0] else ")")
        return Part(PartKind.TUPLE, relation.text, (low, high), mark)
    if signs[0][0] != signs[1][0] or not _is_name(sides[1]):
        return None
    low, high = (0, 1) if signs[0][0] == "<" else (1, 0)
    mark = ("[" if "=" in signs[low] else "(") + ("]" if "=" in signs[high] else ")")
    return Part(PartKind.TUPLE, relation.text, (sides[2 * low], sides[2 * high]), mark)


def _is_name(part: Part) -> bool:
    try:
        return read(part.text).kind == "symbol"
    except Unreadable:
        return False
