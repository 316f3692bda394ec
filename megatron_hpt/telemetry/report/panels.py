"""What is drawn: the table of overlaid curves, and the charts of one run in depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hpt.telemetry.report import charts, timelines, visits
from megatron_hpt.telemetry.report.record import Grid, RunRecord, evaluation_title
from megatron_hpt.telemetry.report.visits import State, Visit

PHASES = ("rollout", "reward", "train", "transfer", "eval")
STATE_COLORS = {
    State.SFT: "#e69f00",
    State.OFF_POLICY: "#cc79a7",
    State.BOTH: "#56b4e9",
    State.RL: "#0072b2",
    State.SOLVED: "#009e73",
    State.SKIPPED: "#8c8c8c",
}


@dataclass(frozen=True)
class Panel:
    """One chart of overlaid curves: a metric, what it is called, its unit and the d3 format of its values."""

    key: str
    title: str
    unit: str
    form: str = ".3~g"
    log: bool = False
    """The axis is logarithmic, if there is a positive value."""
    share: bool = False
    """The axis goes from 0 to 1, if no value lies beyond."""
    optional: bool = False
    """It is left out where no run has it, instead of being shown as empty."""
    about: str = ""


TRAINING = (
    Panel("rollout/accuracy", "Accuracy of rollouts", "mean reward", ".3f", share=True, about="of the prompts trained on"),
    Panel("gate/sft_share", "SFT share", "share of prompts", ".2f", share=True, about="prompts taught by their demonstration"),
    Panel("rollout/response_tokens", "Response length", "tokens"),
    Panel("rollout/truncated", "Cut at the length limit", "share of rollouts", ".2f", share=True),
    Panel("train/entropy", "Entropy", "nats", about="mean over trained response tokens"),
    Panel(
        "mismatch/k3_kl", "Mismatch engine / trainer", "k3 KL", ".2g", log=True, about="rounding only, if the weights arrived"
    ),
    Panel("train/loss", "Loss", "loss"),
    Panel("train/grad_norm", "Gradient norm", "before clipping", log=True),
    Panel("train/kl", "KL to the reference", "nats", optional=True),
    Panel("time/step_s", "Time per step", "seconds", about="without evaluation"),
    Panel("throughput/tokens_per_s", "Throughput", "trained tokens / s"),
)
PICTURE = ("rollout/accuracy", "gate/sft_share", "rollout/response_tokens", "train/entropy", "mismatch/k3_kl", "time/step_s")
"""The keys of `TRAINING` that the picture shows."""


def training(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the charts of the steps, ``{key, title, about, smooth, spec, curves}``; spec is None where nothing is recorded.

    There is a curve ``{grid, y}`` for each run; its grid is None if it is that of the run.
    """
    drawn = [_drawn(panel, [(None, record.curve(panel.key)) for record in records], records) for panel in TRAINING]
    return [panel for panel, declared in zip(drawn, TRAINING, strict=True) if panel["spec"] or not declared.optional]


def evaluations(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the charts of the evaluations that any of the runs has, in the form of `training`."""
    keys = sorted({key for record in records for key in record.evaluated})
    panels = [Panel(key, evaluation_title(key), _measured(key), ".3f", share=True) for key in keys]
    return [_drawn(panel, [record.evaluations(panel.key) for record in records], records) for panel in panels]


def _measured(key: str) -> str:
    return "mean reward" if "/avg@" in key else "share of problems"


def _drawn(panel: Panel, curves: Sequence[tuple[Grid | None, list]], records: Sequence[RunRecord]) -> dict[str, Any]:
    values = [value for _, curve in curves for value in curve if value is not None]
    log = panel.log and any(value > 0 for value in values)
    beyond = any(not 0 <= value <= 1 for value in values)  # a user's reward
    spec = charts.overlay([record.label for record in records], panel.unit, panel.form, log, panel.share and not beyond)
    return {
        "key": panel.key,
        "title": panel.title,
        "about": panel.about,
        "smooth": panel in TRAINING,
        "spec": spec if values else None,
        "curves": [
            {"grid": grid and columns(grid), "y": [short(y) if not log or (y or 0) > 0 else None for y in curve]}
            for grid, curve in curves
        ],
    }


def columns(grid: Grid) -> dict[str, list[Any]]:
    """Return a grid as the page reads it."""
    return {**asdict(grid), "hours": [short(value) for value in grid.hours]}


def points(panel: dict[str, Any], records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a chart's points as charts.js makes them of its curves by step, for the picture, which runs no script."""
    return [
        {"x": x, "y": y, "series": f"s{index}", "lone": before is None is after}
        for index, (curve, record) in enumerate(zip(panel["curves"], records, strict=True))
        for x, before, y, after in zip(record.grid.step, [None, *curve["y"]], curve["y"], [*curve["y"][1:], None], strict=False)
    ]


def short(value: float | None) -> float | None:
    """Round to five digits, which is what a chart can show."""
    return None if value is None else float(f"{value:.5g}")


def depth(record: RunRecord, decided: Sequence[Visit]) -> list[dict[str, Any]]:
    """Return the charts of one run, ``{title, about, spec, empty, wide}``; without decisions there are none of the gate."""
    of_gate = (_learnt, _sources, _difficulties, _timelines, _transitions) if decided else ()
    return [*(chart(decided) for chart in of_gate), seconds(record), *idle(record)]


def seconds(record: RunRecord) -> dict[str, Any]:
    """Return the chart of the seconds per phase, stacked."""
    names = [*PHASES, "other"]
    curves = {phase: [value or 0.0 for value in record.curve(f"time/{phase}_s")] for phase in (*PHASES, "step")}
    within = [phase for phase in PHASES if phase != "eval"]  # a step's seconds are without its evaluation
    curves["other"] = [
        max(0.0, whole - sum(curves[phase][place] for phase in within)) for place, whole in enumerate(curves["step"])
    ]
    values = [
        {"x": step, "y": short(curves[name][place]), "series": f"s{index}"}
        for place, step in enumerate(record.grid.step)
        for index, name in enumerate(names)
    ]
    colors = dict(zip(names, charts.COLORS, strict=False))
    colors["other"] = charts.COLORS[-1]
    beside = record.config.rollout.max_lag
    about = "phases run beside each other" if beside else "where the time of a step goes; an evaluation comes on top"
    return _chart("Seconds per phase", about, charts.stacked(values, colors, "seconds", ".2f"))


def idle(record: RunRecord) -> list[dict[str, Any]]:
    """Return the chart of the shares of a step in which each side waited; none for a run that did not measure them."""
    curves = {side: record.curve(f"time/{side}_idle_share") for side in ("trainer", "engines")}
    values = [
        {"x": step, "y": short(curve[place]), "series": f"s{index}"}
        for index, curve in enumerate(curves.values())
        for place, step in enumerate(record.grid.step)
        if curve[place] is not None
    ]
    if not values:
        return []
    colors = dict(zip(curves, charts.COLORS, strict=False))
    about = f"share of the step in which it had nothing to do; rollout.max_lag={record.config.rollout.max_lag}"
    return [_chart("Who waits", about, charts.lines(values, colors, "share of the step", ".2f", share=True))]


def _chart(title: str, about: str, spec: charts.Spec | None, empty: str = "", wide: bool = False) -> dict[str, Any]:
    """Return a chart; `empty` is shown where there is nothing to draw."""
    return {"title": title, "about": about, "spec": spec, "empty": empty, "wide": wide}


def _learnt(decided: Sequence[Visit]) -> dict[str, Any]:
    order = (State.SOLVED, State.RL, State.BOTH, State.OFF_POLICY, State.SFT, State.SKIPPED)
    rows = list(visits.population(decided))
    present = [state for state in order if any(shares.get(state) for _, shares in rows)]
    points = [
        {"x": step, "y": short(shares.get(state, 0.0)), "series": f"s{index}"}
        for step, shares in rows
        for index, state in enumerate(present)
    ]
    colors = {state: STATE_COLORS[state] for state in present}
    spec = charts.stacked(points, colors, "share of prompts", ".2f", share=True)
    return _chart("Where the prompts stand", "all prompts seen so far, each as it was last decided", spec)


_NOTHING = "no prompt was graded and trained"
_SHARE = "weight of the demonstration, β / (α + β), mean over the prompts that train"


def _sources(decided: Sequence[Visit]) -> dict[str, Any]:
    shares = visits.by_source(decided)
    return _chart(
        "SFT share by data source", _SHARE, _share_lines(shares, dict(zip(shares, charts.COLORS, strict=False))), _NOTHING
    )


def _difficulties(decided: Sequence[Visit]) -> dict[str, Any]:
    shares = visits.by_difficulty(decided)
    colors = dict(zip(visits.DIFFICULTIES, charts.ORDERED, strict=True))
    about = f"{_SHARE}; difficulty: share of a prompt's answers in the whole run that are right"
    return _chart("SFT share by difficulty", about, _share_lines(shares, {name: colors[name] for name in shares}), _NOTHING)


def _share_lines(shares: visits.Shares, colors: dict[str, str]) -> charts.Spec | None:
    points = [
        {"x": step, "y": short(share), "series": f"s{index}"}
        for index, name in enumerate(colors)
        for step, share in shares[name]
    ]
    return charts.lines(points, colors, "SFT share", ".2f", share=True) if points else None


def _timelines(decided: Sequence[Visit]) -> dict[str, Any]:
    chosen = timelines.timelines(decided)
    values = [
        {
            "row": row,
            "start": segment.start,
            "end": segment.end,
            "state": segment.state,
            "prompt": timeline.prompt_id,
            "visits": segment.visits,
            "last": f"{segment.solved} of {segment.graded} right" if segment.graded else "none",
        }
        for row, timeline in enumerate(chosen.shown)
        for segment in timeline.segments
    ]
    colors = {state: color for state, color in STATE_COLORS.items() if any(value["state"] == state for value in values)}
    kind = "visited more than once" if chosen.repeated else "none visited twice yet"
    about = f"{len(chosen.shown)} of {chosen.prompts:,} prompts ({kind}), those solved first on top; blank: not seen yet"
    return _chart(
        "From SFT to RL to solved, prompt by prompt", about, charts.segments(values, colors, len(chosen.shown)), wide=True
    )


def _transitions(decided: Sequence[Visit]) -> dict[str, Any]:
    counted = visits.transitions(decided)
    names = [state for state in State if any(state in pair for pair in counted)]
    totals = {name: sum(counted[name, after] for after in names) for name in names}
    values = [
        {"before": a, "after": b, "count": counted[a, b], "share": short(counted[a, b] / totals[a])}
        for a in names
        for b in names
        if counted[a, b]
    ]
    about = "how a prompt that was decided so stood when it came again; rows sum to 100 %"
    return _chart(
        "From one visit to the next", about, charts.matrix(values, names) if values else None, "no prompt was visited twice"
    )
