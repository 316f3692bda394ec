"""The report of a run: its curves as a PNG and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from megatron_hpt.config import load_yaml
from megatron_hpt.data.files import whole, write_whole
from megatron_hpt.errors import DataError
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry import metrics

Lines = Sequence[dict[str, Any]]
_PHASES = ("rollout", "reward", "train", "transfer", "eval")


def write_report(run: RunDir):
    """Write ``report.html`` and ``report.png``.

    Returns:
        Path of the page.

    Raises:
        DataError: the run has no finished step yet.
    """
    lines = metrics.read(run.metrics)
    if not lines:
        raise DataError(f"{run.metrics}: no finished step to draw")
    picture = draw(lines)
    with whole(run.report.with_suffix(".png")) as temporary:
        temporary.write_bytes(picture)
    write_whole(run.report, page(run, lines, picture))
    return run.report


def draw(lines: Lines) -> bytes:
    """The six curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: tuple[tuple[str, Callable[[Any, Lines], None]], ...] = (
        ("accuracy", _accuracy),
        ("SFT share", lambda axis, rows: _fill(axis, rows, "gate/sft_share")),
        ("response length, tokens", lambda axis, rows: _curve(axis, rows, "rollout/response_tokens")),
        ("entropy, nats", lambda axis, rows: _curve(axis, rows, "train/entropy")),
        ("mismatch engine/trainer, k3 KL", _mismatch),
        ("seconds per step", _phases),
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, panel) in zip(axes.flat, panels, strict=True):
        panel(axis, lines)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _curve(axis: Any, lines: Lines, key: str, label: str | None = None, **style: Any) -> None:
    axis.plot(*_points(lines, key), label=label, **{"linewidth": 1.4, **style})


def _fill(axis: Any, lines: Lines, key: str) -> None:
    steps, values = _points(lines, key)
    axis.fill_between(steps, values, alpha=0.35, color="tab:orange")
    axis.plot(steps, values, color="tab:orange", linewidth=1.4)
    axis.set_ylim(0, 1.02)


def _accuracy(axis: Any, lines: Lines) -> None:
    _curve(axis, lines, "rollout/accuracy", "rollouts", alpha=0.6)
    for key in sorted({key for line in lines for key in line if key.startswith("eval/") and "/avg@" in key}):
        evaluated = [(line["eval/version"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot(*zip(*evaluated, strict=True), marker="o", markersize=4, label=key.removeprefix("eval/").replace("/", " "))
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=8, frameon=False)


def _mismatch(axis: Any, lines: Lines) -> None:
    _curve(axis, lines, "mismatch/k3_kl", color="tab:red")
    if any(value > 0 for value in _points(lines, "mismatch/k3_kl")[1]):
        axis.set_yscale("log")


def _phases(axis: Any, lines: Lines) -> None:
    steps = [line["step"] for line in lines]
    seconds = [[line.get(f"time/{phase}_s") or 0.0 for line in lines] for phase in _PHASES]
    axis.stackplot(steps, seconds, labels=_PHASES, alpha=0.75)
    axis.legend(fontsize=8, frameon=False, loc="upper right")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222; padding: 0 1em }}
img {{ width: 100% }} table {{ border-collapse: collapse }} td {{ padding: .15em 1.2em .15em 0; vertical-align: top }}
td:first-child {{ color: #666 }} details {{ margin-top: 1.5em }} pre {{ background: #f6f6f6; padding: 1em; overflow: auto }}
</style>
<h1>{name}</h1>
<table>{rows}</table>
<img alt="curves of the run" src="data:image/png;base64,{picture}">
<details><summary>configuration</summary><pre>{config}</pre></details>
</html>
"""


def page(run: RunDir, lines: Lines, picture: bytes) -> str:
    """The HTML page; it refers to nothing outside itself."""
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in summary(run, lines).items())
    return _PAGE.format(
        name=html.escape(run.path.name),
        rows=rows,
        picture=base64.b64encode(picture).decode(),
        config=html.escape(run.config.read_text()),
    )


def summary(run: RunDir, lines: Lines) -> dict[str, str]:
    """What one wants to know first."""
    config, last = load_yaml(run.config), lines[-1]
    facts = {
        "algorithm": config.algorithm.name,
        "gate": of_run(config).gate.formula,
        "steps": f"{len(lines)} of {config.trainer.steps}",
        "SFT share": f"{lines[0]['gate/sft_share']:.2f} → {last['gate/sft_share']:.2f}",
    }
    for key in sorted({key for line in lines for key in line if "/avg@" in key}):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            facts[key] = f"{values[0]:.3f} → {values[-1]:.3f}"
    if skipped := sum(line.get("train/skipped", 0) for line in lines):
        facts["steps not taken"] = str(skipped)
    mismatch = _points(lines, "mismatch/k3_kl")[1]
    facts["largest k3 mismatch"] = f"{max(mismatch):.2g}" if mismatch else "not measured"
    facts["time"] = f"{sum(line['time/step_s'] + line.get('time/eval_s', 0.0) for line in lines):.0f} s"
    return facts
