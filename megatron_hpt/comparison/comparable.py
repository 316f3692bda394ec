"""What may be compared: the same problems, sampled and graded the same way. Differences are refused, or named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_hpt.comparison.outcomes import Entry, ModelOutcome
from megatron_hpt.errors import DataError

SAMPLING = ("temperature", "top_p", "max_tokens")
PROMPTING = ("system_prompt", "chat_template")
"""These may differ with good reason: a base model has no chat template."""
COMPUTING = ("engine", "dtype")
"""These change last bits, and a token now and then."""


def comparable(entries: Sequence[Entry], intersect: bool, across_protocols: bool) -> tuple[list[Entry], list[str]]:
    """Return the entries as they can be compared, and notes that a reader has to know.

    Args:
        intersect: keep the problems that all entries have, instead of refusing.
        across_protocols: name differences of sampling and grading, instead of refusing.

    Raises:
        DataError: different problems or protocols, each difference named; no problem in common.
    """
    notes = [note for entry in entries for note in entry.notes]
    differences = _protocol_differences(entries)
    if differences and not across_protocols:
        raise DataError(
            "these were not sampled and graded the same way:\n"
            + "".join(f"  {difference}\n" for difference in differences)
            + "--across-protocols compares them all the same, and says so"
        )
    notes += [f"not the same protocol: {difference}" for difference in differences]
    notes += [f"not the same prompts: {difference}" for difference in _differing(entries, PROMPTING)]
    notes += [f"not computed the same way: {difference}" for difference in _differing(entries, COMPUTING)]
    restricted = {entry.label: dict(entry.outcomes) for entry in entries}
    for column in dict.fromkeys(column for entry in entries for column in entry.outcomes):
        having = {entry.label: entry.outcomes[column] for entry in entries if column in entry.outcomes}
        notes += _sample_counts(column, having)
        if missed := _problem_differences(having):
            if not intersect:
                raise DataError(
                    f"{column}: these are not the same problems:\n"
                    + "".join(f"  {difference}\n" for difference in missed)
                    + "--intersect compares on the problems that all of them have (by id and true answer)"
                )
            common = _common(column, having)
            notes.append(f"{column}: only the {len(common)} problems that all have; {'; '.join(missed)}")
            for label, outcome in having.items():
                restricted[label][column] = outcome.restricted(common)
    return [replace(entry, outcomes=restricted[entry.label]) for entry in entries], notes


def _protocol_differences(entries: Sequence[Entry]) -> list[str]:
    """List the differences of sampling, and of the graders of benchmarks that several entries have."""
    found = _differing(entries, SAMPLING)
    for column in dict.fromkeys(column for entry in entries for column in entry.outcomes):
        graders = {entry.label: entry.outcomes[column].record.grader for entry in entries if column in entry.outcomes}
        if len(set(graders.values())) > 1:
            found.append(f"grader of {column}: {_listed(graders)}")
    return found


def _differing(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    """List the fields of the records, or of their protocols, that are not the same for all."""
    records = {entry.label: entry.record for entry in entries if entry.record is not None}
    found = []
    for name in names:
        values = {
            label: getattr(record if hasattr(record, name) else record.protocol, name) for label, record in records.items()
        }
        if len(set(values.values())) > 1:
            found.append(f"{name}: {_listed(values)}")
    return found


def _listed(values: dict[str, object]) -> str:
    def short(value: object) -> str:
        text = "none" if value is None else repr(value) if isinstance(value, str) else f"{value:g}"
        return text if len(text) <= 60 else text[:57] + "…'"

    return ", ".join(f"{short(value)} in {label}" for label, value in values.items())


def _sample_counts(column: str, having: dict[str, ModelOutcome]) -> list[str]:
    counts = {label: outcome.record.samples for label, outcome in having.items()}
    if len(set(counts.values())) <= 1:
        return []
    listed = ", ".join(f"{count} in {label}" for label, count in counts.items())
    return [f"{column}: samples a problem: {listed}. avg@k estimates the same accuracy, with another certainty"]


def _problem_differences(having: dict[str, ModelOutcome]) -> list[str]:
    """Say how the others' problems differ from those of the first."""
    (name, first), *others = having.items()
    known = {problem.id: problem for problem in first.problems}
    found = []
    for label, other in others:
        theirs = {problem.id: problem for problem in other.problems}
        more, fewer = len(theirs.keys() - known.keys()), len(known.keys() - theirs.keys())
        both = known.keys() & theirs.keys()
        truths = sum(known[one].ground_truth != theirs[one].ground_truth for one in both)
        facts = [
            f"{fewer} only in {name}" if fewer else "",
            f"{more} only in {label}" if more else "",
            f"{truths} with the same id and another true answer" if truths else "",
        ]
        described = ", ".join(filter(None, facts))
        if described or first.record.sha256 != other.record.sha256:
            files = f"{first.record.file} ({first.record.sha256[:8]}) and {other.record.file} ({other.record.sha256[:8]})"
            found.append(f"{name} and {label}: {described or 'the same ids and answers from different files'}: {files}")
    return found


def _common(column: str, having: dict[str, ModelOutcome]) -> list[str]:
    """Return the ids that all have with the same true answer, in the order of the first."""
    first, *others = having.values()
    shared = set.intersection(*({(p.id, p.ground_truth) for p in outcome.problems} for outcome in (first, *others)))
    common = [problem.id for problem in first.problems if (problem.id, problem.ground_truth) in shared]
    if not common:
        raise DataError(f"{column}: {', '.join(having)} have no problem in common")
    return common
