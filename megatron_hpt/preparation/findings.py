"""Findings about rows, and the items that have them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum

from megatron_hpt.data.parquet import Problem
from megatron_hpt.preparation.overlap import Hits
from megatron_hpt.preparation.reading import Record


class FindingKind(Enum):
    """What is wrong, by the word that stands in the list of findings."""

    MALFORMED = "malformed"
    NO_ANSWER = "no-answer"
    DUPLICATE_ID = "duplicate-id"
    LONG_PROMPT = "long-prompt"
    LONG_DEMONSTRATION = "long-demonstration"
    DUPLICATE = "duplicate"
    CONTAMINATED = "contaminated"
    WRONG = "wrong-demonstration"


UNUSABLE = frozenset({FindingKind.MALFORMED, FindingKind.NO_ANSWER, FindingKind.DUPLICATE_ID})
"""Findings that leave an item without a row, whatever is dropped."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row."""

    kind: FindingKind
    detail: str
    is_mended: bool = False
    """The row is kept, without what is wrong with it."""


@dataclass
class Item:
    """A record on its way to a row."""

    record: Record
    number: int
    """Its number among all records of the sources."""
    problem: Problem | None = None
    source: str = ""
    identity: str = ""
    findings: list[Finding] = field(default_factory=list)
    hits: Hits | None = None
    prompt_length: int = 0
    """In tokens, or in characters without a tokenizer."""
    demonstration_lengths: list[int] = field(default_factory=list)
    """Likewise; tokens are counted with end-of-sequence."""
    unboxed: int = 0
    """How many demonstrations have no box that a verifier reads."""
    boxed: int = 0
    """How many demonstrations were given one."""

    def find(self, kind: FindingKind, detail: str, is_mended: bool = False) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, detail, is_mended))

    def costs(self, drop: frozenset[FindingKind]) -> FindingKind | None:
        """Return why the row is left out: the first kind that is to be dropped and was not mended; None if it is kept."""
        return next((one.kind for one in self.findings if one.kind in drop and not one.is_mended), None)

    def unusable(self) -> bool:
        """Whether no row can be made of the item."""
        return any(finding.kind in UNUSABLE for finding in self.findings)

    def lines(self, drop: frozenset[FindingKind]) -> str:
        """Return the findings as JSON Lines."""
        about = {"file": self.record.file, "row": self.record.row, "dropped": self.costs(drop) is not None}
        found = ({**about, "reason": one.kind.value, "detail": one.detail} for one in self.findings)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
