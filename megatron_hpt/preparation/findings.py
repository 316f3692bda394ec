"""What can be said about a row, and the row it is said of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum

from megatron_hpt.data.parquet import Problem
from megatron_hpt.preparation.overlap import Hits
from megatron_hpt.preparation.reading import Record


class FindingKind(Enum):
    """Of a finding, as the list of them says it."""

    MALFORMED = "malformed"
    NO_ANSWER = "no-answer"
    DUPLICATE_ID = "duplicate-id"
    LONG_PROMPT = "long-prompt"
    LONG_DEMONSTRATION = "long-demonstration"
    DUPLICATE = "duplicate"
    CONTAMINATED = "contaminated"
    WRONG = "wrong-demonstration"


UNUSABLE = frozenset({FindingKind.MALFORMED, FindingKind.NO_ANSWER, FindingKind.DUPLICATE_ID})
"""No row can come of it: always left out."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row."""

    kind: FindingKind
    detail: str
    is_mended: bool = False
    """What is wrong was left out of the row; it keeps its place."""


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
    unboxed: int = 0
    """Demonstrations without a box that a verifier reads."""
    boxed: int = 0
    """Demonstrations that were given one."""

    def find(self, kind: FindingKind, detail: str, is_mended: bool = False) -> None:
        """Say what is wrong."""
        self.findings.append(Finding(kind, detail, is_mended))

    def costs(self, drop: frozenset[FindingKind]) -> FindingKind | None:
        """Why the row loses its place: the first finding that is to be dropped and was not mended."""
        return next((one.kind for one in self.findings if one.kind in drop and not one.is_mended), None)

    def unusable(self) -> bool:
        """No row can come of it."""
        return any(finding.kind in UNUSABLE for finding in self.findings)

    def lines(self, drop: frozenset[FindingKind]) -> str:
        """The findings as JSON Lines."""
        about = {"file": self.record.file, "row": self.record.row, "dropped": self.costs(drop) is not None}
        found = ({**about, "reason": one.kind.value, "detail": one.detail} for one in self.findings)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
