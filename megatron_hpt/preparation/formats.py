"""Formats of published data sets. A format says which fields its records need and how they make a problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hpt.data.parquet import Problem
from megatron_hpt.errors import DataError, did_you_mean
from megatron_hpt.preparation.fields import Unfit, answer, beginnings, chat, demonstrations, optional, text, truth, value
from megatron_hpt.rewards.boxes import last_box


@dataclass(frozen=True)
class Named:
    """A problem, with the source and the id that its record names."""

    problem: Problem
    source: str | None = None
    identity: str | None = None


@dataclass(frozen=True)
class RecordFormat:
    """How records become problems."""

    name: str
    """The `data_source` of problems whose record names none."""
    needed: tuple[str, ...]
    """The columns, or fields of columns, that a record must have."""
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Named]
    """Called with the fields of every record; raises Unfit, which costs the record its place."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read of a file, where it has them."""
        return tuple(dict.fromkeys(name for path in (*self.needed, *self.optional) for name in beginnings(path)))


def openr1(system_prompt: bool) -> RecordFormat:
    """Openr1-Math-46k-8192: the schema of veRL's data sets, with R1's solutions as `target`.

    Args:
        system_prompt: whether it is kept; HPT's numbers are without it (its `prepare_train.py` removes the first message).
    """

    def read(fields: Mapping[str, Any]) -> Named:
        before, question = chat(value(fields, "prompt"), "prompt")
        kept = before if system_prompt else tuple(message for message in before if message["role"] != "system")
        right = truth(value(fields, "reward_model.ground_truth"), "reward_model.ground_truth")
        several = fields.get("target_lst")
        shown = demonstrations(several, "target_lst") if several else demonstrations(fields.get("target"), "target")
        return Named(_problem(question, right, shown, before=kept), optional(fields.get("data_source"), "data_source"))

    return RecordFormat("openr1", ("prompt", "reward_model"), ("target", "target_lst", "data_source"), read)


def _problem(question: str, right: str, shown: Sequence[str], **others: Any) -> Problem:
    return Problem(question, right, shown[0] if shown else None, tuple(shown[1:]), **others)


def benchmark(name: str) -> RecordFormat:
    """A test set: prompt and answer. Source, id and level are kept where a record has them."""

    def read(fields: Mapping[str, Any]) -> Named:
        said = {key: optional(fields.get(key), key) for key in ("source", "id", "level")}
        before, question = chat(value(fields, "prompt"), "prompt")
        problem = _problem(question, truth(value(fields, "answer"), "answer"), (), before=before, level=said["level"])
        return Named(problem, said["source"], said["id"])

    return RecordFormat(name, ("prompt", "answer"), ("source", "id", "level"), read)


_CALCULATOR = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def _gsm8k(fields: Mapping[str, Any]) -> Named:
    steps, marker, last = text(value(fields, "answer"), "answer").rpartition("####")
    if not marker:
        raise Unfit("answer: no line '#### …' with the final answer")
    right = _without_separators(truth(last, "answer, after ####"))
    solution = f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is \\boxed{{{right}}}."
    return Named(Problem(text(value(fields, "question"), "question"), right, solution))


def _without_separators(given: str) -> str:
    """`1,200` is 1200; `(1,2)`, `1, 2` and `1,2` are several numbers, and so may `(1,200)` be."""
    if re.search(r"[(\[{;]|,\s", given):
        return given
    return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), given)


GSM8K = RecordFormat("gsm8k", ("question", "answer"), (), _gsm8k)
"""Steps with a calculator's notes <<…>>, then `#### 72`: the notes are left out, the answer gets a box and loses its
thousands separators."""


def _math(fields: Mapping[str, Any]) -> Named:
    solution = text(value(fields, "solution"), "solution")
    box = last_box(solution)
    if box is None:
        raise Unfit("solution: no \\boxed{…} with the final answer")
    boxed = f"{solution[: box.start]}\\boxed{{{box.content}}}{solution[box.end :]}"
    level = optional(fields.get("level"), "level")
    return Named(
        _problem(text(value(fields, "problem"), "problem"), truth(box.content, "solution, last box"), [boxed], level=level)
    )


MATH = RecordFormat("math", ("problem", "solution"), ("level",), _math)
"""The answer is what the solution's last box holds; `\\boxed 5` and `\\fbox{5}` become `\\boxed{5}`, which a verifier reads."""

_ROLES = ("prompt", "answer", "demonstration", "system", "id", "source", "level")


def mapped(name: str, mapping: Mapping[str, str]) -> RecordFormat:
    """Any records, whose fields are given roles; `a.b` is a field of that name, or a field of a field.

    Args:
        name: `data_source` of problems without a field for it.
        mapping: role → field. Roles: prompt and answer (needed), demonstration, system, id, source, level. A prompt is text
            or messages, a demonstration text, one message, or a list of several.

    Raises:
        DataError: an unknown role, or a needed one is missing.
    """
    for role in mapping:
        if role not in _ROLES:
            raise DataError(f"{role}={mapping[role]}: allowed: {', '.join(_ROLES)}{did_you_mean(role, _ROLES)}")
    if missing := [role for role in ("prompt", "answer") if role not in mapping]:
        raise DataError(f"given {', '.join(mapping) or 'no columns'}; also needed: {', '.join(f'{m}=COLUMN' for m in missing)}")

    def read(fields: Mapping[str, Any]) -> Named:
        def get(role: str, kind: Callable[[Any, str], Any], none: Any = None) -> Any:
            return kind(value(fields, mapping[role]), mapping[role]) if role in mapping else none

        before, question = get("prompt", chat)
        if system := get("system", optional):
            before = ({"role": "system", "content": system}, *before)
        shown = get("demonstration", demonstrations, none=[])
        problem = _problem(question, get("answer", truth), shown, before=before, level=get("level", optional))
        return Named(problem, get("source", optional), get("id", answer))

    return RecordFormat(name, tuple(dict.fromkeys(mapping.values())), (), read)
