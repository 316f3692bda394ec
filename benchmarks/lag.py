"""What a lag costs in accuracy and mismatch: whole runs of the quickstart with `rollout.max_lag` 0, 1 and 2.

    .venv/bin/python benchmarks/lag.py [--engine sglang] [--lags 1,2] [--seeds 0,1,2] [--out runs/lag] [trainer.steps=140 …]

Lags 1 and 2 train once by the engine's log-probabilities (`algorithm.old_policy=engine`) and once by the trainer's own, with
truncated importance weights between both. The same command continues after an interruption, and with more seeds. Writes a table
and a picture of held-out accuracy and k3 by step into --out, named after the engine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hpt.comparison.runs import Lines, aligned, evaluations, reached, spread
from megatron_hpt.comparison.text_table import Cell, TextTable, markdown
from megatron_hpt.files import whole, write_whole
from megatron_hpt.launch.train import finish_run
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.progress import duration

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.py"
TRUNCATED = "truncated"
SETTINGS = {TRUNCATED: ("algorithm.old_policy=trainer", "algorithm.mismatch.correction=tis")}
"""What an arm has beside its lag."""
COLUMNS = ("max_lag", "seeds", "held-out accuracy", "lowest", "mean lag", "median k3", "largest k3", "not taken", "seconds")


def arms_of(lags: Sequence[int]) -> list[str]:
    """Return names of arms: every lag, and then all but 0 with truncated weights."""
    return [*map(str, lags), *(f"{lag} {TRUNCATED}" for lag in lags if lag)]


def lines_of(arm: str, seed: int, engine: str, overrides: Sequence[str], out: Path) -> Lines:
    """Return the metrics of a run, which is trained or continued if it is not finished."""
    lag, *beside = arm.split()
    own = (f"rollout.max_lag={lag}", *(setting for each in beside for setting in SETTINGS[each]))
    settings = [*own, f"rollout.engine={engine}", f"trainer.seed={seed}", "trainer.export=false", *overrides]
    name = "_".join((engine, f"lag{lag}", *beside, f"seed{seed}"))
    return metrics.read(finish_run(str(RECIPE), name, settings, out).metrics)


def row(arm: str, runs: Sequence[Lines]) -> list[Cell]:
    """Of the table."""
    accuracy = [reached(lines).accuracy for lines in runs]
    k3 = [value for lines in runs for value in column(lines, "mismatch/k3_kl").values()]
    skipped = sum(bool(line["train/skipped"]) for lines in runs for line in lines)
    texts = [
        *(arm, str(len(runs)), spread(accuracy), f"{min(accuracy):.3f}"),
        f"{statistics.fmean(value for lines in runs for value in column(lines, 'rollout/lag').values()):.2f}",
        *(f"{statistics.median(k3):.1e}", f"{max(k3):.1e}", str(skipped)),
        f"{statistics.fmean(sum(column(lines, 'time/step_s').values()) for lines in runs):.0f}",
    ]
    return [Cell(text) for text in texts]


def column(lines: Lines, key: str) -> dict[int, float]:
    """Step → value, of the steps that have one."""
    return {line["step"]: line[key] for line in lines if line.get(key) is not None}


def draw(runs: Mapping[str, Sequence[Lines]], path: Path) -> None:
    """Held-out accuracy and k3 by step: means over seeds, the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (accuracy, mismatch) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    for index, (arm, seeds) in enumerate(runs.items()):
        style = {"color": f"C{index}", "linestyle": "--" if TRUNCATED in arm else "-"}
        for axis, curves in (
            (accuracy, [evaluations(lines) for lines in seeds]),
            (mismatch, [column(lines, "mismatch/k3_kl") for lines in seeds]),
        ):
            steps, values = aligned(curves)
            axis.plot(steps, [statistics.fmean(v) for v in values], label=arm, linewidth=1.4, **style)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{index}", alpha=0.1)
    accuracy.set_title("held-out accuracy (mean and range over seeds)", fontsize=10, loc="left")
    mismatch.set_title("mismatch/k3_kl", fontsize=10, loc="left")
    mismatch.set_yscale("log")
    for axis in (accuracy, mismatch):
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    accuracy.legend(title="rollout.max_lag", fontsize=8, frameon=False)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def numbers(text: str) -> list[int]:
    """Read ``0,1,2``."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Train what is missing; after each run write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang"])
    parser.add_argument("--lags", default="0,1,2", type=numbers)
    parser.add_argument("--seeds", default="0,1,2", type=numbers)
    parser.add_argument("--out", default="runs/lag", type=lambda text: Path(text).absolute())
    parser.add_argument("overrides", nargs="*", help="settings of every run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arms = arms_of(arguments.lags)
    jobs = sorted(((seed, arm) for seed in arguments.seeds for arm in arms), key=lambda job: TRUNCATED in job[1])
    began, runs = time.monotonic(), {}
    for done, (seed, arm) in enumerate(jobs):
        left = duration((time.monotonic() - began) / done * (len(jobs) - done)) if done else "unknown"
        print(f"run {done + 1} of {len(jobs)}: {arguments.engine}, max_lag {arm}, seed {seed}; time left {left}", flush=True)
        runs.setdefault(arm, []).append(lines_of(arm, seed, arguments.engine, arguments.overrides, arguments.out))
        table = TextTable("", COLUMNS, [row(arm, seeds) for arm, seeds in runs.items()])
        write_whole(arguments.out / f"lag_{arguments.engine}.md", markdown(table))
        draw(runs, arguments.out / f"lag_{arguments.engine}.png")
    print((arguments.out / f"lag_{arguments.engine}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
