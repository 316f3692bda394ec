"""The answer of a response: what stands in its last \\boxed{…}."""

from __future__ import annotations

import re

_BRACE = re.compile(r"[{}]")
_BOX = "\\boxed"


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…}; None without one, if its braces do not balance, or if no brace follows it."""
    start = text.rfind(_BOX)
    first = start + len(_BOX)
    if start < 0 or not text.startswith("{", first):
        return None
    depth = 0
    for brace in _BRACE.finditer(text, first):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[first + 1 : brace.start()]
    return None


def unboxed(truth: str) -> str:
    """A ground truth that is given in a box, without it; any other as it is."""
    return truth if _BOX not in truth else (last_boxed(truth) or truth)


def argument(text: str, start: int) -> int:
    """Place after the braced group that begins at `start`; `start` itself if none does, or it does not end."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end() if text.startswith("{", start) else start
    return start
