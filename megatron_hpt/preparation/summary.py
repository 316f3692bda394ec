"""What a preparation found, in numbers and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_hpt.preparation.findings import UNUSABLE, FindingKind, Item

PERCENTILES = (50, 90, 99, 100)


@dataclass
class Summary:
    """Counts over all rows."""

    read: int = 0
    written: int = 0
    with_demonstration: int = 0
    found: Counter[FindingKind] = field(default_factory=Counter)
    dropped: Counter[FindingKind] = field(default_factory=Counter)
    """How many rows were left out, by the first reason."""
    mended: Counter[FindingKind] = field(default_factory=Counter)
    """How many rows were kept without what was wrong with them."""
    unboxed: int = 0
    """How many demonstrations of written rows end without a box."""
    boxed: int = 0
    """How many demonstrations of written rows were given one."""
    examples: dict[FindingKind, str] = field(default_factory=dict)
    """The first finding of each kind, with file and row."""
    contaminated: Counter[str] = field(default_factory=Counter)
    """Test set → how many rows share words with it."""
    phrases: list[str] = field(default_factory=list)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    demonstration_lengths: Counter[int] = field(default_factory=Counter)

    def take(self, item: Item, drop: frozenset[FindingKind]) -> bool:
        """Count an item, and return whether it becomes a row."""
        self.read += 1
        if item.findings and self._costs_its_place(item, drop):
            return False
        self.written += 1
        self.unboxed += item.unboxed
        self.boxed += item.boxed
        self.prompt_lengths[item.prompt_length] += 1
        self.with_demonstration += bool(item.demonstration_lengths)
        for length in item.demonstration_lengths:
            self.demonstration_lengths[length] += 1
        return True

    def _costs_its_place(self, item: Item, drop: frozenset[FindingKind]) -> bool:
        for finding in item.findings:
            self.examples.setdefault(finding.kind, f"{item.record.where}: {finding.detail}")
        kinds = dict.fromkeys(finding.kind for finding in item.findings)
        self.found.update(kinds.keys())
        self.mended.update({one.kind for one in item.findings if one.is_mended})
        reason = item.costs(drop)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is not None


def percentiles(lengths: Mapping[int, int]) -> list[int]:
    """Return the lengths at PERCENTILES of a histogram (length → rows): the smallest that so many rows do not exceed."""
    values = np.array(sorted(lengths))
    within = np.cumsum([lengths[value] for value in values.tolist()])
    return [int(values[np.searchsorted(within, share / 100 * within[-1])]) for share in PERCENTILES]


def told(summary: Summary, out: Path, rejects: Path, unit: str, seconds: float) -> list[str]:
    """Return the lines that are printed when a file is written.

    Args:
        unit: of the lengths, in words.
    """
    rate = f"{summary.read / seconds:,.0f} rows/s"
    lines = [
        f"wrote {out}: {summary.written:,} of {summary.read:,} rows, {summary.with_demonstration:,} with demonstrations, in "
        f"{seconds:.1f} s ({rate})"
    ]
    lines += [_found(kind, summary) for kind in FindingKind if summary.found[kind]]
    if summary.contaminated:
        lines.append("  in common with " + ", ".join(f"{name} {rows:,}" for name, rows in summary.contaminated.most_common()))
    if summary.phrases:
        number = len(summary.phrases)
        what = "1 phrase says" if number == 1 else f"{number:,} phrases say"
        lines.append(f"  {what} nothing, being in more than 10 problems, e.g. '{summary.phrases[0]}'")
    lines.append(f"  prompt, {unit}: {_lengths(summary.prompt_lengths)}")
    if summary.demonstration_lengths:
        lines.append(f"  demonstration, {unit}: {_lengths(summary.demonstration_lengths)}")
    lines += [f"  {one}" for one in _boxes(summary)]
    if summary.found:
        lines.append(f"  row by row: {rejects}")
    return lines


def _found(kind: FindingKind, summary: Summary) -> str:
    found, dropped, mended = summary.found[kind], summary.dropped[kind], summary.mended[kind]
    fate = "left out" if dropped == found else f"{dropped:,} left out" if dropped else "kept"
    if mended:
        fate = f"{dropped:,} left out, {mended:,} kept with the demonstrations that are right"
    hint = f"; --drop {kind.value} leaves them out" if not dropped and not mended and kind not in UNUSABLE else ""
    rows = "1 row" if found == 1 else f"{found:,} rows"
    return f"  {kind.value}: {rows}, {fate}{hint}; the first: {summary.examples[kind]}"


def _boxes(summary: Summary) -> Iterator[str]:
    if summary.boxed:
        yield f"{summary.boxed:,} demonstrations without \\boxed{{…}} were given one with their answer"
    if summary.unboxed:
        yield (
            f"note: {summary.unboxed:,} demonstrations end without \\boxed{{…}}, which the rewards math and choice read: what "
            "is learnt from them earns nothing; --box puts the answer in a box behind each whose thought ends"
        )


def _lengths(lengths: Counter[int]) -> str:
    *shares, longest = zip(PERCENTILES, percentiles(lengths), strict=True)
    return ", ".join(f"{share} % within {length:,}" for share, length in shares) + f", longest {longest[1]:,}"
