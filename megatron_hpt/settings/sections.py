"""Typed sections that settings are checked by, and messages that name their keys. Imports no torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_hpt.errors import ConfigError, did_you_mean
from megatron_hpt.settings.values import LONGEST


class Section(BaseModel):
    """A part of a tree of settings: unknown keys are refused, assignments validated, numbers finite, each field has a line of
    help."""

    called: ClassVar[str] = "the configuration"
    """In messages about the whole of it."""
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _no_bool(given: Any) -> Any:
    """True is 1 to Python, and to pydantic."""
    if isinstance(given, bool):
        raise ValueError("input should be a number")
    return given


Int = typing.Annotated[int, BeforeValidator(_no_bool)]
Float = typing.Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PositiveInt = typing.Annotated[Int, Field(gt=0, le=10**9)]
NonNegativeInt = typing.Annotated[Int, Field(ge=0, le=10**9)]
PositiveFloat = typing.Annotated[Float, Field(gt=0, le=1e30)]
NonNegativeFloat = typing.Annotated[Float, Field(ge=0, le=1e30)]
Share = typing.Annotated[Float, Field(ge=0, le=1)]
PositiveShare = typing.Annotated[Float, Field(gt=0, le=1)]
DeadlineSeconds = typing.Annotated[Float, Field(ge=0.01, le=366 * 86_400)]
"""Of what takes some time: a hundredth of a second at least."""
Seconds = typing.Annotated[Float, Field(gt=0, le=366 * 86_400)]
"""At most a year: what waits for longer overflows somewhere."""
MOST_PROCESSES = 2**17
Processes = typing.Annotated[Int, Field(gt=0, le=MOST_PROCESSES)]
"""Ranks, servers, nodes, workers: at most what the largest machine has."""
Tokens = typing.Annotated[Int, Field(gt=0, le=2**27)]
"""Of one row or one micro-batch."""
MOST_SAMPLES = 2**16
Samples = typing.Annotated[Int, Field(gt=0, le=MOST_SAMPLES)]
"""Of one prompt."""
Name = typing.Annotated[str, Field(min_length=1)]

S = typing.TypeVar("S", bound=Section)


def validated_section(kind: type[S], tree: Any, origin: str, what: str = "the configuration is not valid") -> S:
    """Build a section from plain data; every problem is one line with key, given value and what is allowed.

    Args:
        what: how the message goes on after `origin`.

    Raises:
        ConfigError: naming `origin` (a file or "overrides") and each key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(kind, problem) for problem in error.errors())
        raise ConfigError("\n  ".join([f"{origin}: {what}", *lines])) from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deep, or a value that holds itself") from None


def _explain(kind: type[Section], problem: Any) -> str:
    path = _key_of(kind, [str(part) for part in problem["loc"]])
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return unknown_key(kind, path)
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    if problem["type"] == "value_error" and is_section(annotation_of(kind, path)):
        message = problem["msg"].removeprefix("Value error, ")
        return message if not key or message.startswith(f"{key}.") else f"{key}: {message}"  # it names the section's keys
    return line_of(key or kind.called, problem)


def line_of(key: str, problem: Any) -> str:
    """Return one of pydantic's problems as a line of a message: key, given value if it is short, and what is allowed.

    Args:
        key: of the setting or argument; empty: of several, which the message names.
    """
    given, message = repr(problem["input"]), problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message[:1].lower() + message[1:]
    return f"{key}: " + (f"given {given}; {message}" if len(given) <= LONGEST else message)


def _key_of(kind: type[Section], place: list[str]) -> list[str]:
    """A setting's key from pydantic's place of a problem, in which members of unions have names that are no keys."""
    here: Any = kind
    key, is_member = [], False
    for part in place:
        if not is_member and len([each for each in alternatives(here) if each is not types.NoneType]) > 1:
            is_member = True  # the part says which of them was tried
            continue
        is_member = False
        key.append(part)
        here = _below(here, part)
    return key


def unknown_key(kind: type[Section], path: list[str]) -> str:
    """One line for a key that does not exist: where it stops being known, the neighbours, the nearest name."""
    here: Any = kind
    for depth, part in enumerate(path):
        below = _below(here, part)
        if below is None:
            fields = [name for each in alternatives(here) for name in getattr(each, "model_fields", {})]
            where = ".".join(path[:depth]) or kind.called
            hint = did_you_mean(part, fields, lambda known, section=path[:depth]: ".".join([*section, known]))
            allowed = ", ".join(fields) if fields else "nothing (it is a plain value)"
            return f"{'.'.join(path)}: unknown key; {where} has: {allowed}{hint}"
        here = below
    return f"{'.'.join(path)}: unknown key"


def annotation_of(kind: type[Section], path: list[str]) -> Any:
    """The type of the setting at a path below a section; None: there is no such setting."""
    here: Any = kind
    for part in path:
        here = _below(here, part)
    return here


def is_section(annotation: Any) -> bool:
    """Settings have keys of their own below it."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def alternatives(annotation: Any) -> Iterator[Any]:
    """What a union is of, without what they are annotated with; of any other type itself."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from alternatives(typing.get_args(annotation)[0])
    elif origin in (types.UnionType, typing.Union):
        for each in typing.get_args(annotation):
            yield from alternatives(each)
    elif origin is Literal:
        yield from {type(each) for each in typing.get_args(annotation)}
    else:
        yield annotation


def _below(annotation: Any, part: str) -> Any:
    """The type of a section's field, of a mapping's value or of a list's element; None: it has none of that name."""
    for each in alternatives(annotation):
        if is_section(each) and part in each.model_fields:
            return each.model_fields[part].annotation
        if typing.get_origin(each) is dict:
            return typing.get_args(each)[1]
        if typing.get_origin(each) in (list, tuple) and part.isdigit() and not _is_text(typing.get_args(each)[0]):
            return typing.get_args(each)[0]
    return None


def _is_text(annotation: Any) -> bool:
    return set(alternatives(annotation)) == {str}
