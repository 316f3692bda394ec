"""Checks: each looks at a batch of items and adds what it finds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_hpt.data.preparation.findings import Item, Kind
from megatron_hpt.data.preparation.overlap import HeldOut, canonical
from megatron_hpt.data.preparation.reading import Record
from megatron_hpt.data.preparation.seen import Seen

Check = Callable[[Sequence[Item]], None]
"""Gets items that have a problem and nothing that makes them unusable."""
Grade = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]
"""(response, ground truth) pairs → grades; None: not to be graded."""


class Places:
    """Numbers of items → where they come from. In memory are only those whose row does not follow from the one before."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._records: list[Record] = []

    def note(self, item: Item) -> None:
        """Take up an item, in the order of their numbers."""
        if not self._firsts or self._follows(item) != item.record.row or item.record.file != self._records[-1].file:
            self._firsts.append(item.number)
            self._records.append(Record(item.record.file, item.record.row, {}))

    def _follows(self, item: Item) -> int:
        return self._records[-1].row + item.number - self._firsts[-1]

    def say(self, number: int) -> str:
        """As in every message: file and row."""
        last = bisect_right(self._firsts, number) - 1
        return f"{self._records[last].file}, row {self._records[last].row + number - self._firsts[last]}"


class UniqueIds:
    """An id that came before."""

    def __init__(self, places: Places) -> None:
        self._seen, self._places = Seen(), places

    def __call__(self, items: Sequence[Item]) -> None:
        found = self._seen.before([item.identity for item in items], [item.number for item in items])
        for item, first in zip(items, found, strict=True):
            if first is not None:
                item.find(Kind.DUPLICATE_ID, f"{item.identity!r} is also the id of {self._places.say(first)}")


class Duplicates:
    """A prompt that came before, without regard to white space and system prompt."""

    def __init__(self, places: Places) -> None:
        self._seen, self._places = Seen(), places

    def __call__(self, items: Sequence[Item]) -> None:
        found = self._seen.before([canonical(_spoken(item)) for item in items], [item.number for item in items])
        for item, first in zip(items, found, strict=True):
            if first is not None:
                item.find(Kind.DUPLICATE, f"the same prompt as {self._places.say(first)}")


def _spoken(item: Item) -> str:
    """All that is said before an answer, but for the system prompt."""
    return "\n".join(message["content"] for message in item.problem.prompt if message["role"] != "system")


class Overlap:
    """Prompts that share words with test problems; what they mean is known when all were seen."""

    def __init__(self, tests: HeldOut) -> None:
        self._tests = tests

    def __call__(self, items: Sequence[Item]) -> None:
        for item in items:
            new = all(finding.kind is not Kind.DUPLICATE for finding in item.findings)
            item.hits = self._tests.hits(_spoken(item), new)


class Demonstrations:
    """Demonstrations that do not earn the reward for their own ground truth."""

    def __init__(self, grade: Grade) -> None:
        self._grade = grade

    def __call__(self, items: Sequence[Item]) -> None:
        shown = _shown(items)
        grades = self._grade([(text, item.problem.answer) for item, text in shown])
        for (item, _), grade in zip(shown, grades, strict=True):
            if grade is None:
                item.find(Kind.WRONG, f"cannot be graded against {item.problem.answer!r}")
            elif grade < 1:
                item.find(Kind.WRONG, f"is graded {grade:g} against {item.problem.answer!r}")


def _shown(items: Sequence[Item]) -> list[tuple[Item, str]]:
    return [(item, text) for item in items for text in item.problem.demonstrations]


def instructed(instruction: str) -> Check:
    """A line after every question."""

    def check(items: Sequence[Item]) -> None:
        for item in items:
            item.problem = replace(item.problem, question=f"{item.problem.question}\n{instruction}")

    return check


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, as a run counts them."""

    tokenizer: Any
    """Of Hugging Face, with a chat template."""
    prompt: int | None = None
    """The longest prompt that is not long."""
    response: int | None = None
    """The longest demonstration that is not long, with end-of-sequence."""

    def __call__(self, items: Sequence[Item]) -> None:
        prompts = self.tokenizer.apply_chat_template(
            [item.problem.prompt for item in items], add_generation_prompt=True, tokenize=False
        )
        for item, length in zip(items, self._count(prompts), strict=True):
            item.prompt_length = length
            _limit(item, Kind.LONG_PROMPT, length, self.prompt)
        shown = _shown(items)
        for (item, _), length in zip(shown, self._count([text for _, text in shown]), strict=True):
            item.demonstration_lengths.append(length + 1)
            _limit(item, Kind.LONG_DEMONSTRATION, length + 1, self.response)

    def _count(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        return [len(tokens) for tokens in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def characters(items: Sequence[Item]) -> None:
    """Lengths in characters: what can be said without a tokenizer."""
    for item in items:
        item.prompt_length = sum(len(message["content"]) for message in item.problem.prompt)
        item.demonstration_lengths = [len(text) for text in item.problem.demonstrations]


def _limit(item: Item, kind: Kind, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        item.find(kind, f"{length} tokens, not long: {limit}")
