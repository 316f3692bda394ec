"""The last box of a solution as people write it."""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s${}\\]*[^\s${}\\.,]")
_BRACE = re.compile(r"(?<!\\)[{}]")


class Box(NamedTuple):
    """What is in a box, and where the box is."""

    content: str
    start: int
    end: int


def last_box(text: str) -> Box | None:
    """The last \\boxed{…}, \\fbox{…} or `\\boxed 5`; None if there is none, or its braces do not balance."""
    boxes = list(_COMMAND.finditer(text))
    if not boxes:
        return None
    box = boxes[-1]
    if text.startswith("{", box.end()):
        end = _closing(text, box.end())
        return None if end is None else Box(text[box.end() + 1 : end].strip(), box.start(), end + 1)
    bare = _BARE.match(text, box.end())
    return bare and Box(bare[0], box.start(), bare.end())


def _closing(text: str, opening: int) -> int | None:
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None
