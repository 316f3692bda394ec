"""Turns records into a parquet file of problems and a list of findings, with one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.data.parquet import problem_file, schema_row
from megatron_hpt.errors import DataError
from megatron_hpt.files import whole
from megatron_hpt.preparation import checks
from megatron_hpt.preparation.checks import Check, Grade, Lengths, Places
from megatron_hpt.preparation.fields import NoAnswer, Unfit
from megatron_hpt.preparation.findings import UNUSABLE, FindingKind, Item
from megatron_hpt.preparation.formats import RecordFormat
from megatron_hpt.preparation.overlap import HeldOut, Match
from megatron_hpt.preparation.reading import Record, RecordBatch
from megatron_hpt.preparation.summary import Summary


@dataclass(frozen=True)
class PreparationPlan:
    """How records become rows, and which checks they go through."""

    format: RecordFormat
    split: str = "train"
    instruction: str = ""
    """Text that is appended to every question."""
    lengths: Lengths | None = None
    tests: HeldOut | None = None
    grade: Grade | None = None
    drop: frozenset[FindingKind] = frozenset()
    """The findings, besides UNUSABLE, that cost a row its place."""
    box: bool = False
    """Whether demonstrations without a box get one, with the answer in it."""


def rejects_path(out: Path) -> Path:
    """Return where the findings are written. No reader of a folder takes this name for data."""
    return out.with_name(f"_{out.stem}.rejects.jsonl")


class Preparation:
    """Makes one output file."""

    def __init__(self, plan: PreparationPlan) -> None:
        self._plan, self._drop = plan, plan.drop | UNUSABLE
        self._places, self._summary = Places(), Summary()
        self._held: list[Item] = []
        """Items that may turn out to be contaminated: at most 10 different prompts for each sequence of a test problem."""
        self._number = 0
        self._checks = _checks(plan, self._places)

    def write(self, batches: Iterable[RecordBatch], out: Path, advance: Callable[[int], None] = lambda _: None) -> Summary:
        """Write `out` and, beside it, the findings; both whole or not at all.

        Args:
            advance: is called with the bytes of every batch when it is done.

        Raises:
            DataError: of reading; no row is left.
        """
        with whole(rejects_path(out)) as rejects, rejects.open("w", encoding="utf-8") as said, problem_file(out) as append:

            def settle(items: Sequence[Item]) -> None:
                append([self._row(item) for item in items if self._summary.take(item, self._drop)])
                said.writelines(item.lines(self._drop) for item in items if item.findings)

            for batch in batches:
                items = self._examine(batch.records)
                self._held += [item for item in items if item.hits]
                settle([item for item in items if not item.hits])
                advance(batch.nbytes)
            settle(self._judge())
            if not self._summary.written:
                raise DataError(_nothing_left(self._summary))
        return self._summary

    def _examine(self, records: Sequence[Record]) -> list[Item]:
        items = [self._item(record) for record in records]
        for check in self._checks:
            if usable := [item for item in items if not item.unusable()]:
                check(usable)
        return items

    def _item(self, record: Record) -> Item:
        item = Item(record, self._number)
        self._number += 1
        self._places.note(item)
        if record.damage:
            item.find(FindingKind.MALFORMED, record.damage)
            return item
        try:
            named = self._plan.format.read(record.fields)
        except Unfit as why:
            item.find(FindingKind.NO_ANSWER if isinstance(why, NoAnswer) else FindingKind.MALFORMED, str(why))
            return item
        item.problem, item.source = named.problem, named.source or self._plan.format.name
        item.identity = named.identity or f"{self._plan.format.name}-{item.number}"
        return item

    def _judge(self) -> list[Item]:
        if self._plan.tests is None:
            return []
        for item in self._held:
            matches = self._plan.tests.matches(item.hits)
            for test_set in {match.test_set for match in matches}:
                self._summary.contaminated[test_set] += 1
            if matches:
                item.find(FindingKind.CONTAMINATED, _told(matches))
        self._summary.phrases = self._plan.tests.phrases
        return self._held

    def _row(self, item: Item) -> dict:
        return schema_row(item.problem, item.source, self._plan.split, item.identity)


def _told(matches: Sequence[Match]) -> str:
    first = matches[0]
    shared = f"{first.share:.0%} of {first.test_set}, row {first.row}" + (f": '{first.words}'" if first.words else "")
    return shared if len(matches) == 1 else f"{shared}; and of {len(matches) - 1} more"


def _checks(plan: PreparationPlan, places: Places) -> list[Check]:
    """List the checks in their order: prompts are compared before the instruction is appended to them."""
    asked: list[Check] = [checks.UniqueIds(places), checks.Duplicates(places)]
    if plan.tests is not None:
        asked.append(checks.Overlap(plan.tests))
    if plan.instruction:
        asked.append(checks.instructed(plan.instruction))
    asked.append(checks.boxes(add=plan.box))
    if plan.grade is not None:
        asked.append(checks.Demonstrations(plan.grade, FindingKind.WRONG in plan.drop))
    return [*asked, plan.lengths or checks.characters]


def _nothing_left(summary: Summary) -> str:
    reasons = (f"{number} {kind.value} (the first: {summary.examples[kind]})" for kind, number in summary.dropped.most_common())
    return f"none of {summary.read} rows is left, nothing was written: {'; '.join(reasons)}"
