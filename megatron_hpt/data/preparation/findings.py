"""What can be said about a row, and the row it is said of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum

from megatron_hpt.data.parquet import Problem
from megatron_hpt.data.preparation.overlap import Hits
from megatron_hpt.data.preparation.reading import Record


class Kind(Enum):
    """Of a finding, as the list of them says it."""

    MALFORMED = "malformed"
    DUPLICATE_ID = "duplicate-id"
    LONG_PROMPT = "long-prompt"
    LONG_DEMONSTRATION = "long-demonstration"
    DUPLICATE = "duplicate"
    CONTAMINATED = "contaminated"
    WRONG = "wrong-demonstration"


UNUSABLE = frozenset({Kind.MALFORMED, Kind.DUPLICATE_ID})
"""No row can come of it: always left out."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row."""

    kind: Kind
    detail: str


@dataclass
class Item:
    """A record on its way to a row."""

    record: Record
    number: int
    """Among all records of the sources."""
    problem: Problem | None = None
    source: str = ""
    identity: str = ""
    findings: list[Finding] = field(default_factory=list)
    hits: Hits | None = None
    prompt_length: int = 0
    """In tokens, or in characters without a tokenizer."""
    demonstration_lengths: list[int] = field(default_factory=list)
    """As `prompt_length`, in tokens with end-of-sequence."""

    def find(self, kind: Kind, detail: str) -> None:
        """Say what is wrong."""
        self.findings.append(Finding(kind, detail))

    def unusable(self) -> bool:
        """No row can come of it."""
        return any(finding.kind in UNUSABLE for finding in self.findings)

    def lines(self, drop: frozenset[Kind]) -> str:
        """The findings as JSON Lines."""
        kinds = {finding.kind for finding in self.findings}
        about = {"file": self.record.file, "row": self.record.row, "dropped": bool(kinds & drop)}
        found = ({**about, "reason": one.kind.value, "detail": one.detail} for one in self.findings)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
