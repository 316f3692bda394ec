"""A comparison as files, and on the terminal."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_hpt.comparison import curves, runs
from megatron_hpt.comparison.comparison import Comparison
from megatron_hpt.comparison.tables import finished, grids
from megatron_hpt.comparison.text_table import html_table, markdown, rich_table
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.evaluation.statistics import Estimate
from megatron_hpt.files import check_file, whole


def show(comparison: Comparison, console: Console) -> None:
    """Print the notes and the tables of a comparison."""
    for note in comparison.notes:
        console.print(Text.assemble(("note: ", "yellow"), note))
    for grid in grids(comparison):
        console.print()
        console.print(rich_table(grid), highlight=False)


def check(paths: list[Path]) -> None:
    """Refuse files of unknown kinds, and those that could not be written, before anything is read.

    Raises:
        ConfigError: names those that there are.
        DataError: names what is in the way.
    """
    for path in paths:
        if path.suffix not in WRITERS:
            raise ConfigError(f"--output {path}: the ending says what is written; known: {', '.join(WRITERS)}")
        check_file(path)


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as the kind of file that the ending says, whole or not at all.

    Raises:
        DataError: the file is a picture of curves, and no benchmark has any.
    """
    content = WRITERS[path.suffix](comparison)
    with whole(path) as temporary:
        temporary.write_bytes(content)


def _markdown(comparison: Comparison) -> bytes:
    notes = "".join(f"- {note}\n" for note in comparison.notes)
    return "\n".join(filter(None, [notes, *map(markdown, grids(comparison))])).encode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>comparison</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222; padding: 0 1em }}
table {{ border-collapse: collapse }} th, td {{ padding: .25em .9em .25em 0; vertical-align: top }}
th {{ border-bottom: 1px solid #999 }} tr + tr td {{ border-bottom: 1px solid #eee }}
.name {{ text-align: left }} .number {{ text-align: right }} small, p {{ color: #666 }} img {{ width: 100% }}
h2 {{ margin: 1.6em 0 .4em; font-size: 1.15em }}
</style>
<h1>{title}</h1>
<ul>{notes}</ul>
{tables}
{pictures}
</html>
"""


def _page(comparison: Comparison) -> bytes:
    """Make one page that refers to nothing outside itself."""
    drawn = [("pass@k and maj@k", curves.draw(_panels(comparison), "svg"))] if _panels(comparison) else []
    if trained := dict(finished(comparison)):
        drawn.append(("The runs", runs.picture({label: [lines] for label, lines in trained.items()}, "svg")))
    images = [
        f'<h2>{title}</h2><img alt="{title}" src="data:image/svg+xml;base64,{base64.b64encode(one).decode()}">'
        for title, one in drawn
    ]
    names = [entry.label for entry in comparison.entries if entry.label not in comparison.published]
    page = _PAGE.format(
        title=html.escape(" · ".join(names)),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes),
        tables="\n".join(map(html_table, grids(comparison))),
        pictures="\n".join(images),
    )
    return page.encode()


def _panels(comparison: Comparison) -> curves.Panels:
    several = {
        benchmark: {label: measures for label, measures in models.items() if len(measures.passed) > 1}
        for benchmark, models in comparison.measures.items()
    }
    return {benchmark: models for benchmark, models in several.items() if models}


def _picture(form: str) -> Callable[[Comparison], bytes]:
    def drawn(comparison: Comparison) -> bytes:
        if not (panels := _panels(comparison)):
            raise DataError("no pass@k curves to draw: no benchmark has several graded samples a problem")
        return curves.draw(panels, form)

    return drawn


def _json(comparison: Comparison) -> bytes:
    tree = {
        "notes": list(comparison.notes),
        "entries": [
            {
                "label": entry.label,
                "published": entry.label in comparison.published,
                "evaluation": asdict(entry.record) if entry.record else None,
                "scores": {column: asdict(score) for column, score in comparison.scores[entry.label].items()},
            }
            for entry in comparison.entries
        ],
        "measures": {
            benchmark: {label: asdict(measures) for label, measures in models.items()}
            for benchmark, models in comparison.measures.items()
        },
        "versus": [{"first": comparison.entries[0].label, **asdict(versus)} for versus in comparison.versus],
    }
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def _csv(comparison: Comparison) -> bytes:
    """Make a file with one number a line; accuracies are in [0, 1]."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("model", "benchmark", "metric", "k", "value", "low", "high", "problems", "left_out"))
    for label, scores in comparison.scores.items():
        for column, score in scores.items():
            lines.writerow((label, column, "avg", "", score.value, *_tail(score.estimate)))
    lines.writerows(_measured(comparison))
    return text.getvalue().encode()


def _measured(comparison: Comparison) -> Iterator[tuple]:
    for benchmark, models in comparison.measures.items():
        for label, measures in models.items():
            for metric, points in (("pass", measures.passed), ("maj", measures.majority)):
                for k, point in points.items():
                    yield (label, benchmark, metric, k, point.value, *_tail(point))
            for metric in ("samples", "ungraded", "truncated", "tokens"):
                yield (label, benchmark, metric, "", getattr(measures, metric), *_tail(None))


def _tail(estimate: Estimate | None) -> tuple:
    return (estimate.low, estimate.high, estimate.problems, estimate.left_out) if estimate else ("", "", "", "")


WRITERS: dict[str, Callable[[Comparison], bytes]] = {
    ".md": _markdown,
    ".html": _page,
    ".csv": _csv,
    ".json": _json,
    ".png": _picture("png"),
    ".svg": _picture("svg"),
}
"""Ending of a file → what makes its contents."""
