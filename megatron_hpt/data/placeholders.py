"""Words that stand in place of a ground truth: what collectors of problems write where they have no answer."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

_ANY_CASE = frozenset(
    (
        *("proof", "proofs", "proved", "qed", "see_proof", "see_solution", "see_explanation", "see_above", "see_below"),
        *("notfound", "not_found", "not_available", "not_applicable", "not_given", "not_provided", "n/a", "nan", "null"),
        *("noanswer", "no_answer", "no_final_answer", "answer", "final_answer", "your_answer", "placeholder"),
        *("tbd", "todo", "missing", "removed", "deleted", "redacted", "?", "??", "???", "…", "..."),
    )
)
_AS_WRITTEN = frozenset(("None", "NONE", "NA", "unknown", "error"))
"""Words that may be answers in another case ("Unknown" of three-valued logic)."""
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|boxed)\{(.*)\}|[\[(<{$](.*)[\])>}$]")
_MAY_BE = r"(?i)^[^0-9]{1,32}$"


def is_placeholder(truth: str) -> bool:
    """Whether a ground truth only says that there is none: `proof`, `notfound`, `N/A`, `[deleted]`, `\\text{None}`."""
    inner = truth.strip()
    while found := _WRAPPED.fullmatch(inner):
        inner = (found[1] if found[1] is not None else found[2]).strip()
    inner = inner.rstrip(".!") or inner
    return inner in _AS_WRITTEN or re.sub(r"[\s_-]+(?=\w)", "_", inner.lower()) in _ANY_CASE


def placeholders(truths: pa.Array) -> list[str]:
    """Return the placeholders in a column of texts. Arrow passes over what is no word, so that few texts are looked at here."""
    if pa.types.is_null(truths.type):
        return []
    candidates = truths.filter(pc.fill_null(pc.match_substring_regex(truths, _MAY_BE), False))
    return [truth for truth in candidates.to_pylist() if is_placeholder(truth)]
