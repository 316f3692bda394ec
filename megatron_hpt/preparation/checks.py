"""Checks. Each looks at a batch of items and adds its findings to them; `pipeline` calls them one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from megatron_hpt.data.rendering import rendered
from megatron_hpt.errors import DataError
from megatron_hpt.preparation.findings import FindingKind, Item
from megatron_hpt.preparation.overlap import HeldOut, canonical
from megatron_hpt.preparation.reading import Record
from megatron_hpt.rewards.boxes import last_box, visible

Check = Callable[[Sequence[Item]], None]
"""It is called with items that have a problem and no finding that makes them unusable."""
Grade = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]
"""(response, ground truth) pairs → grades; None where an answer cannot be graded."""


class Places:
    """Number of an item → where it comes from. Only items whose row does not follow from the one before are kept in memory."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._records: list[Record] = []

    def note(self, item: Item) -> None:
        """Note an item. Items must come in the order of their numbers."""
        if not self._firsts or self._follows(item) != item.record.row or item.record.file != self._records[-1].file:
            self._firsts.append(item.number)
            self._records.append(Record(item.record.file, item.record.row, {}))

    def _follows(self, item: Item) -> int:
        return self._records[-1].row + item.number - self._firsts[-1]

    def say(self, number: int) -> str:
        """Say where an item comes from, as every message calls a record."""
        last = bisect_right(self._firsts, number) - 1
        record = self._records[last]
        return replace(record, row=record.row + number - self._firsts[last]).where


class Seen:
    """Remembers texts by a hash of 64 bits, in 16 bytes a text: two of a million are taken for equal with probability 3e-8."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.int64)

    def before(self, texts: Sequence[str], numbers: Sequence[int]) -> list[int | None]:
        """Take up texts; return for each the number of the first equal one, or None if it is the first.

        Args:
            numbers: of the texts, ascending.
        """
        keys = np.array([_hash(text) for text in texts], np.uint64)
        new, first, which = np.unique(keys, return_index=True, return_inverse=True)
        place = np.searchsorted(self._keys, new)
        known = np.zeros(len(new), bool)
        inside = place < len(self._keys)
        known[inside] = self._keys[place[inside]] == new[inside]
        earliest = np.asarray(numbers, np.int64)[first]
        earliest[known] = self._numbers[place[known]]
        self._keys = np.insert(self._keys, place[~known], new[~known])
        self._numbers = np.insert(self._numbers, place[~known], earliest[~known])
        return [None if one == own else int(one) for one, own in zip(earliest[which], numbers, strict=True)]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class UniqueIds:
    """Finds ids that came before."""

    def __init__(self, places: Places) -> None:
        self._seen, self._places = Seen(), places

    def __call__(self, items: Sequence[Item]) -> None:
        found = self._seen.before([item.identity for item in items], [item.number for item in items])
        for item, first in zip(items, found, strict=True):
            if first is not None:
                item.find(FindingKind.DUPLICATE_ID, f"{item.identity!r} is also the id of {self._places.say(first)}")


class Duplicates:
    """Finds prompts that came before, without regard to white space and system prompt."""

    def __init__(self, places: Places) -> None:
        self._seen, self._places = Seen(), places

    def __call__(self, items: Sequence[Item]) -> None:
        found = self._seen.before([canonical(_spoken(item)) for item in items], [item.number for item in items])
        for item, first in zip(items, found, strict=True):
            if first is not None:
                item.find(FindingKind.DUPLICATE, f"the same prompt as {self._places.say(first)}")


def _spoken(item: Item) -> str:
    """Return all that is said before an answer, but for the system prompt."""
    return "\n".join(message["content"] for message in item.problem.prompt if message["role"] != "system")


class Overlap:
    """Finds prompts that share words with test problems. `HeldOut.matches` says what that means, when all prompts were seen."""

    def __init__(self, tests: HeldOut) -> None:
        self._tests = tests

    def __call__(self, items: Sequence[Item]) -> None:
        for item in items:
            new = all(finding.kind is not FindingKind.DUPLICATE for finding in item.findings)
            item.hits = self._tests.hits(_spoken(item), new)


class Demonstrations:
    """Finds demonstrations that do not earn the reward for their own ground truth."""

    def __init__(self, grade: Grade, drop: bool = False) -> None:
        """
        Args:
            drop: leave wrong ones out of rows that have right ones too.
        """
        self._grade, self._drop = grade, drop

    def __call__(self, items: Sequence[Item]) -> None:
        shown = _shown(items)
        grades = self._grade([(text, item.problem.answer) for item, text in shown])
        given = iter(grades)
        for item in items:
            self._judge(item, list(islice(given, len(item.problem.demonstrations))))

    def _judge(self, item: Item, grades: Sequence[float | None]) -> None:
        shown = item.problem.demonstrations
        right = [text for text, grade in zip(shown, grades, strict=True) if grade is not None and grade >= 1]
        is_mended = self._drop and bool(right)
        for number, grade in enumerate(grades, start=1):
            if grade is None or grade < 1:
                which = f"demonstration {number} of {len(grades)} " if len(grades) > 1 else ""
                what = "cannot be graded" if grade is None else f"is graded {grade:g}"
                item.find(FindingKind.WRONG, f"{which}{what} against {item.problem.answer!r}", is_mended)
        if is_mended:
            item.problem = replace(item.problem, demonstration=right[0], more=tuple(right[1:]))


def _shown(items: Sequence[Item]) -> list[tuple[Item, str]]:
    return [(item, text) for item in items for text in item.problem.demonstrations]


def boxes(add: bool) -> Check:
    """Make a check that counts demonstrations which end without a box that a verifier of mathematics would read.

    Args:
        add: append a sentence with the answer in a box. Reasoning that does not end is left as it is, since the box would
            count as reasoning too.
    """

    def check(items: Sequence[Item]) -> None:
        for item in items:
            shown = item.problem.demonstrations
            bare = {text for text in shown if not _is_boxed(text)}
            mended = {text for text in bare if add and not _is_open(text)}
            item.boxed, item.unboxed = (sum(text in some for text in shown) for some in (mended, bare - mended))
            if mended:
                box = f"\n\nThe answer is \\boxed{{{item.problem.answer}}}."
                first, *more = [text.rstrip() + box if text in mended else text for text in shown]
                item.problem = replace(item.problem, demonstration=first, more=tuple(more))

    return check


def _is_boxed(text: str) -> bool:
    return last_box(visible(text)) is not None


def _is_open(text: str) -> bool:
    return text.rfind("<think>") > text.rfind("</think>")


def instructed(instruction: str) -> Check:
    """Make a check that appends a line to every question."""

    def check(items: Sequence[Item]) -> None:
        for item in items:
            item.problem = replace(item.problem, question=f"{item.problem.question}\n{instruction}")

    return check


@dataclass(frozen=True)
class Lengths:
    """Measures lengths in tokens, as a run counts them, and finds what is too long."""

    tokenizer: Any
    """Of Hugging Face, with a chat template."""
    prompt: int | None = None
    """The most tokens of a prompt that is not long; None: any number."""
    response: int | None = None
    """The most tokens, with end-of-sequence, of a demonstration that is not long; None: any number."""

    def __call__(self, items: Sequence[Item]) -> None:
        prompts = [(item, prompt) for item in items if (prompt := self._rendered(item)) is not None]
        items = [item for item, _ in prompts]
        for item, length in zip(items, self._count([prompt for _, prompt in prompts]), strict=True):
            item.prompt_length = length
            _limit(item, FindingKind.LONG_PROMPT, length, self.prompt)
        shown = _shown(items)
        for (item, _), length in zip(shown, self._count([text for _, text in shown]), strict=True):
            item.demonstration_lengths.append(length + 1)
            _limit(item, FindingKind.LONG_DEMONSTRATION, length + 1, self.response)

    def _rendered(self, item: Item) -> str | None:
        try:
            return rendered(self.tokenizer, item.problem.prompt, item.record.where)
        except DataError as why:
            item.find(FindingKind.MALFORMED, str(why))
            return None

    def _count(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        return [len(tokens) for tokens in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def characters(items: Sequence[Item]) -> None:
    """Measure lengths in characters, where there is no tokenizer."""
    for item in items:
        item.prompt_length = sum(len(message["content"]) for message in item.problem.prompt)
        item.demonstration_lengths = [len(text) for text in item.problem.demonstrations]


def _limit(item: Item, kind: FindingKind, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        item.find(kind, f"{length} tokens, not long: {limit}")
