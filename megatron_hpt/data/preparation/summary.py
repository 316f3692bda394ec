"""What a preparation found, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_hpt.data.preparation.findings import Item, Kind

PERCENTILES = (50, 90, 99, 100)


@dataclass
class Summary:
    """Counts over all rows."""

    read: int = 0
    written: int = 0
    with_demonstration: int = 0
    found: Counter[Kind] = field(default_factory=Counter)
    dropped: Counter[Kind] = field(default_factory=Counter)
    """Rows left out, by the first reason."""
    mended: Counter[Kind] = field(default_factory=Counter)
    """Rows that were kept without what was wrong with them."""
    unboxed: int = 0
    """Demonstrations of written rows that end without a box."""
    boxed: int = 0
    """Demonstrations of written rows that were given one."""
    examples: dict[Kind, str] = field(default_factory=dict)
    """The first finding of a kind, with file and row."""
    contaminated: Counter[str] = field(default_factory=Counter)
    """Test set → rows that share words with it."""
    phrases: list[str] = field(default_factory=list)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    demonstration_lengths: Counter[int] = field(default_factory=Counter)

    def take(self, item: Item, drop: frozenset[Kind]) -> bool:
        """Count an item; whether it becomes a row."""
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

    def _costs_its_place(self, item: Item, drop: frozenset[Kind]) -> bool:
        for finding in item.findings:
            self.examples.setdefault(finding.kind, f"{item.record.file}, row {item.record.row}: {finding.detail}")
        kinds = dict.fromkeys(finding.kind for finding in item.findings)
        self.found.update(kinds.keys())
        self.mended.update({one.kind for one in item.findings if one.is_mended})
        reason = item.costs(drop)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is not None


def percentiles(lengths: Mapping[int, int]) -> list[int]:
    """The lengths at PERCENTILES of a histogram length → rows: the smallest that at least so many are within."""
    values = np.array(sorted(lengths))
    within = np.cumsum([lengths[value] for value in values.tolist()])
    return [int(values[np.searchsorted(within, share / 100 * within[-1])]) for share in PERCENTILES]
