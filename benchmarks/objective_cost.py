"""What the objective costs: its share of the training time of a run, by the step's own timers.

megatron-hpt train recipes/smollm2_gsm.py trainer.steps=4 evaluation.sets={}
benchmarks/objective_cost.py runs/smollm2_gsm-…
"""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from megatron_hpt.run import open_run
from megatron_hpt.telemetry import metrics


def main(run: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    lines = metrics.read(open_run(run).metrics)
    shares = [line["time/objective_s"] / line["time/train_s"] for line in lines]
    print(f"{run}: the objective is {statistics.median(shares):.3%} of a training step (median), at most {max(shares):.3%}")
    for line, share in zip(lines, shares, strict=True):
        objective, train = line["time/objective_s"], line["time/train_s"]
        print(f"step {line['step']}: {objective:.4f} s of {train:.2f} s, {line['train/tokens']} trained tokens: {share:.3%}")


if __name__ == "__main__":
    typer.run(main)
