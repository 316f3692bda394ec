"""Write the report of one or several runs: the page and the picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.errors import ConfigError
from megatron_hpt.files import check_file, whole, write_whole
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.report import answers, charts, panels, record, visits
from megatron_hpt.telemetry.report.page import VEGA_LITE, page
from megatron_hpt.telemetry.report.record import RunRecord
from megatron_hpt.telemetry.report.visits import Visits

PAGE = 5_000_000
"""Bytes that a page should not exceed; answers get what the curves leave."""
_VEGA = 1_000_000
"""Bytes of the drawing library and of the page itself, rounded up."""
_FEWEST = 100_000
"""Bytes of answers that every run may show however much the curves take."""


def write_report(runs: Sequence[RunDir], target: Path | None = None) -> Path:
    """Write the page, and beside it the picture: the same name with ``.png``.

    The cost does not grow with the answers: of the ledger's rows only those that are shown are read.

    Args:
        target: file of the page; without it, ``report.html`` in the run's folder, or in the current one for several runs.

    Returns:
        Path of the page.

    Raises:
        ConfigError: the target's name does not end in ``.html``.
        DataError: a run has no finished step yet, or the target cannot be written.
    """
    target = target or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    if target.suffix != ".html":
        raise ConfigError(f"--out: given {target}; the page's name ends in .html (the picture beside it has .png)")
    check_file(target)
    records = [record.read(run, label) for run, label in zip(runs, record.labels(runs), strict=True)]
    training = panels.training(records)
    with whole(target.with_suffix(".png")) as temporary:
        temporary.write_bytes(picture(records, training))
    curves = {"training": training, "evaluation": panels.evaluations(records), "differences": record.differences(records)}
    decisions = [visits.read(Ledger(each.run.batches)) for each in records]
    described = [_described(*pair, index) for index, pair in enumerate(zip(records, decisions, strict=True))]
    budget = max(_FEWEST, (PAGE - _VEGA - len(json.dumps([curves, described]))) // len(records))
    for each, decided, description in zip(records, decisions, described, strict=True):
        description["answers"] = _answers(each, decided, budget)
    payload = {"runs": described, **curves}
    settings = [(each.label, each.run.config.read_text(encoding="utf-8")) for each in records]
    write_whole(target, page(_title(records), f"megatron_hpt, {time.strftime('%Y-%m-%d %H:%M')}", payload, settings))
    return target


def _title(records: Sequence[RunRecord]) -> str:
    return records[0].label if len(records) == 1 else f"{len(records)} runs: " + ", ".join(each.label for each in records)


def _described(run: RunRecord, decided: Visits, index: int) -> dict[str, Any]:
    """Return what the page shows of a run besides its answers."""
    color, dash = charts.style(index)
    sampled = [f"Decisions of every {decided.every}th step."] if decided.every > 1 else []
    return {
        "label": run.label,
        "style": {"color": color, "dash": dash},
        "grid": panels.columns(run.grid),
        "facts": record.facts(run),
        "notes": record.notes(run),
        "depth": {
            "charts": panels.depth(run, decided.all),
            "notes": [*_missing(run, decided), *sampled, *_short(decided.unreadable)],
        },
    }


def _answers(run: RunRecord, decided: Visits, budget: int) -> dict[str, Any]:
    reading = answers.read(run, decided.all, budget) if decided.all else answers.Reading([])
    return {"steps": reading.steps, "notes": [*_missing(run, decided), *_short(reading.problems)]}


def _missing(run: RunRecord, decided: Visits) -> list[str]:
    return [] if decided.all else [f"{run.label} has no ledger (batches/ is empty or gone): curves only."]


def _short(messages: Sequence[str], most: int = 3) -> list[str]:
    return [*messages[:most], *([f"… and {len(messages) - most} more"] if len(messages) > most else [])]


def picture(records: Sequence[RunRecord], training: Sequence[dict[str, Any]]) -> bytes:
    """Draw the curves of `panels.PICTURE` as a PNG."""
    import vl_convert

    names = [each.label for each in records]
    drawn = [panel for panel in training if panel["key"] in panels.PICTURE and panel["spec"]]
    spec = {
        "concat": [
            charts.still(panel["spec"], panels.points(panel, records), names, panel["title"], width=330) for panel in drawn
        ],
        "columns": 3,
        "config": {**charts.theme(False), "background": "white"},
        "padding": 14,
    }
    return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=1.6)
