"""The answer of a response: what stands in its last box, outside of the reasoning.

One reader for rewards, evaluation and preparation. A box that is only mentioned (`\\boxed` in prose), an empty one, and a
command that merely begins alike (`\\boxedeqn`) are none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[+-]?(?:\d[\d.,]*\d|\d)")
"""A number without braces: `\\boxed 12`."""
_LAST = 50
"""How many commands at the end of a text are looked at."""
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*([{}])")
_LONGEST = 100_000
"""The most characters of a braced group that are looked through; a longer group is no answer."""
_WHOLE = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_OPEN, _CLOSE = "<think>", "</think>"


class AnswerBox(NamedTuple):
    """What is in a box, and where the box is."""

    content: str
    start: int
    end: int


def visible(response: str) -> str:
    """Return what follows the reasoning, up to reasoning that begins again; nothing if a <think> never closes."""
    return response.rpartition(_CLOSE)[2].partition(_OPEN)[0]


def last_box(text: str) -> AnswerBox | None:
    """Return the last box with content, the outer one of boxes within each other; None without one.

    None too if the last box does not close: the text was cut in the middle of its answer.
    """
    found, place = None, 0
    for command in list(_COMMAND.finditer(text))[-_LAST:]:
        if command.start() < place:  # within another box
            continue
        if text.startswith("{", command.end()):
            end = argument(text, command.end())
            content = text[command.end() + 1 : end - 1].strip()
            if end == command.end():
                found = None
            elif content:
                found = AnswerBox(content, command.start(), end)
            place = end
        elif (bare := _BARE.match(text, command.end())) and command[0][-1:].isspace():
            found = AnswerBox(bare[0], command.start(), bare.end())
    return found


def last_boxed(text: str) -> str | None:
    """Return the content of the last box, and of the inner one where boxes hold only each other; None without a box."""
    box = last_box(text)
    content = box and box.content
    while content and (whole := _WHOLE.match(content)) and argument(content, whole.end()) == len(content):
        content = content[whole.end() + 1 : -1].strip()
    return content or None


def boxed_answer(response: str) -> str | None:
    """Return the content of the last box behind the reasoning; None without one."""
    return last_boxed(visible(response))


def unboxed(truth: str) -> str:
    """Take a ground truth out of its box, if it is in one."""
    return last_boxed(truth) or truth


def argument(text: str, start: int) -> int:
    """Return the place after the braced group that begins at `start`; `start` itself if none does, or it does not end.

    Escaped braces, as of `\\{1,2\\}`, are no braces.
    """
    if not text.startswith("{", start):
        return start
    depth = 0
    for brace in _BRACE.finditer(text, start, start + _LONGEST):
        depth += 1 if brace[1] == "{" else -1
        if depth == 0:
            return brace.end()
    return start
