"""Values of anybody's record as what a problem is made of, or the reason why not, which costs the record its place.

What is written from them has the project's schema, whose rows `data.fields` reads; it takes nothing but that schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_hpt.data.parquet import Message
from megatron_hpt.data.placeholders import is_placeholder
from megatron_hpt.errors import shown


class Unfit(Exception):
    """A record cannot become a problem; the message names the field."""


class NoAnswer(Unfit):
    """A record holds a placeholder where its answer should be."""


def optional(given: Any, field: str) -> str | None:
    """Return an `answer`, or None for null and empty text."""
    return None if given is None or given == "" else answer(given, field)


def beginnings(path: str) -> list[str]:
    """Return the fields that a path may begin with, the longest first: of `a.b.c` itself, `a.b` and `a`."""
    names = path.split(".")
    return [".".join(names[:number]) for number in range(len(names), 0, -1)]


def value(fields: Mapping[str, Any], path: str) -> Any:
    """Return the value of a field, or of a field of a field (`reward_model.ground_truth`); None if it or its record is null.

    A field whose own name has dots comes before a field of a field.

    Raises:
        Unfit: no such field.
    """
    found: Any = fields
    rest = path
    while rest:
        if found is None:
            return None
        name = next((name for name in beginnings(rest) if isinstance(found, dict) and name in found), None)
        if name is None:
            has = ", ".join(found) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise Unfit(f"{path}: missing; there is {has}")
        found, rest = found[name], rest[len(name) + 1 :]
    return found


def text(given: Any, field: str) -> str:
    """Return text that is not blank and can be written.

    Raises:
        Unfit: null, another type, only white space, not Unicode.
    """
    if given is None:
        raise Unfit(f"{field}: null")
    if not isinstance(given, str):
        raise Unfit(f"{field}: given {shown(given)} ({type(given).__name__}), expected text")
    if not given or given.isspace():
        raise Unfit(f"{field}: empty")
    try:
        given.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can spell it
        raise Unfit(f"{field}: not Unicode: {shown(given)}") from None
    return given


def answer(given: Any, field: str) -> str:
    """Return an answer: text, or a number as it is written.

    Raises:
        Unfit: neither, or a number that is none.
    """
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        return str(given)
    return text(given, field).strip()


def truth(given: Any, field: str) -> str:
    """Return an answer that a response can be compared with.

    Raises:
        NoAnswer: it only says that there is none.
        Unfit: as `answer`.
    """
    found = answer(given, field)
    if is_placeholder(found):
        raise NoAnswer(f"{field}: {shown(found)} stands in place of an answer")
    return found


def messages(given: Any, field: str) -> list[Message]:
    """Return the messages of a chat, which have role and content.

    Raises:
        Unfit: no messages, or one of them is empty.
    """
    if not isinstance(given, list) or not given:
        raise Unfit(f"{field}: given {shown(given)}, expected a list of messages with role and content")
    return [
        {key: text(value(_record(message, field), key), f"{field}.{key}") for key in ("role", "content")} for message in given
    ]


def chat(given: Any, field: str) -> tuple[tuple[Message, ...], str]:
    """Return what comes before a question, and the question: the last message, which is the user's. Text alone is a question.

    Raises:
        Unfit: as `messages`; the last one is not the user's.
    """
    if isinstance(given, str) or given is None:
        return (), text(given, field)
    *before, last = messages(given, field)
    if last["role"] != "user":
        raise Unfit(f"{field}: the last message is of role {last['role']!r}, expected 'user'")
    return tuple(before), last["content"]


def demonstrations(given: Any, field: str) -> list[str]:
    """Return solutions, given as a text, a message in a list, or a list of several of either; none for null and empty values.

    Raises:
        Unfit: another type, a list with something empty.
    """
    if given is None or given == [] or (isinstance(given, str) and (not given or given.isspace())):
        return []
    if not isinstance(given, list):
        return [text(given, field)]
    if all(isinstance(one, dict) for one in given):
        if len(given) > 1:
            raise Unfit(f"{field}: {len(given)} messages; a demonstration is one message")
        return [messages(given, field)[0]["content"]]
    return [one for each in given for one in (demonstrations(each, field) or [text(None, field)])]


def _record(given: Any, field: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Unfit(f"{field}: given {shown(given)}, expected messages with role and content")
    return given
