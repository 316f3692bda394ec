"""A summary as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_hpt.data.preparation.findings import UNUSABLE, Kind
from megatron_hpt.data.preparation.summary import PERCENTILES, Summary, percentiles


def told(summary: Summary, out: Path, rejects: Path, unit: str, seconds: float) -> list[str]:
    """What is printed when a file is written.

    Args:
        unit: of lengths.
    """
    rate = f"{summary.read / seconds:,.0f} rows/s"
    lines = [
        f"wrote {out}: {summary.written:,} of {summary.read:,} rows, {summary.with_demonstration:,} with demonstrations, in "
        f"{seconds:.1f} s ({rate})"
    ]
    lines += [_found(kind, summary) for kind in Kind if summary.found[kind]]
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


def _found(kind: Kind, summary: Summary) -> str:
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
