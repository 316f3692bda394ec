"""Seconds a step with `rollout.max_lag` 0, 1 and 2: engines and trainer in turns, and beside each other.

    .venv/bin/python benchmarks/overlap.py [--engine vllm] [--steps 12] [--rounds 2]

Runs of the quickstart's model under GRPO, in turns. `--engine sleeping` takes as long for a batch as the trainer does, and uses
no core (`benchmarks/sleeping_engine.py`): that is what engines on machines of their own look like. A real engine shares this
machine's cores with the trainer. The first three steps and the last, whose engines have nothing more to do, are left out.
Beside the sleeping engine's stands what `megatron-hpt plan` would expect of the lags, from the seconds of both sides in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sleeping_engine import SECONDS

from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.rollouts.rollout_timing import Decoding
from megatron_hpt.plan.rollouts.timeline import BatchWork, Timeline, timeline

ROOT = Path(__file__).parents[1]
WARM_UP = 3
LAGS = (0, 1, 2)
PROMPTS, SAMPLES = 32, 8
COLUMNS = ("max_lag", "s a step", "ratio", "rollout", "train", "idle: trainer", "engines", "mean lag", "k3", "plan: s", "idle")
SETTINGS = (
    *("algorithm.name=grpo", "evaluation.sets={}", "trainer.save_every=0", "trainer.export=false", "optimizer.warmup_steps=0"),
    *("parallel.tensor=1", f"trainer.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}"),
    "algorithm.mismatch.stop_above=100",  # the sleeping engine's log-probabilities are made up
)


def lines_of(folder: Path, engine: str, lag: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Train, and return the metrics of the steps that count."""
    name = f"{ROOT}/benchmarks/sleeping_engine.py:SLEEPING" if engine == "sleeping" else engine
    settings = (*SETTINGS, f"rollout.engine={name}", f"rollout.max_lag={lag}", f"trainer.steps={steps}", f"name=lag{lag}")
    command = [sys.executable, "-m", "megatron_hpt.cli", "train", str(ROOT / "recipes" / "quickstart.py"), *settings]
    before = runs_in(folder)
    environment = {**os.environ, SECONDS: str(seconds)}
    subprocess.run(command, cwd=folder, check=True, env=environment, stdout=subprocess.DEVNULL)
    (run,) = runs_in(folder) - before
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines[WARM_UP:-1]


def runs_in(folder: Path) -> set[Path]:
    return {path for path in folder.glob("runs/*") if path.is_dir() and not path.is_symlink()}


def predicted(lines: list[dict[str, Any]], lag: int) -> Timeline:
    """Return what the plan's formulae make of runs in turns, whose metrics are given, with a lag."""
    step, waited, transfer = (mean(lines, f"time/{name}_s") for name in ("step", "trainer_idle", "transfer"))
    tokens = mean(lines, "rollout/response_tokens")
    # It takes the same time for any number of sequences, none for prompts, and knows no cache.
    decoding = Decoding(0.0, 0.0, 0.0, fixed_s=waited / tokens, unused=0.0, prefill_s=0.0, slots=2**20)
    lengths = Lengths(0.0, ((tokens, 1.0),), 0.0, "measured")
    work = BatchWork(decoding, lengths, PROMPTS, SAMPLES, step - waited - transfer, transfer, "keep")
    return timeline(work, lag)


def mean(lines: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(line[key] for line in lines)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang", "sleeping"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    measured: dict[int, list[dict[str, Any]]] = {lag: [] for lag in LAGS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = 0.0
        if arguments.engine == "sleeping":
            alone = lines_of(folder, "sleeping", 0, WARM_UP + 4, 0.0)
            seconds = mean(alone, "time/train_s")
        for _ in range(arguments.rounds):
            for lag in LAGS:
                measured[lag] += lines_of(folder, arguments.engine, lag, arguments.steps, seconds)
    table = Table(box=None, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    alone = mean(measured[0], "time/step_s")
    for lag, lines in measured.items():
        step = mean(lines, "time/step_s")
        idle = [f"{mean(lines, f'time/{side}_idle_s') / step:.0%}" for side in ("trainer", "engines")]
        phases = [f"{mean(lines, f'time/{phase}_s'):.2f}" for phase in ("rollout", "train")]
        mismatch = f"{mean(lines, 'mismatch/k3_kl'):.2g}"
        cells = [str(lag), f"{step:.2f}", f"{step / alone:.2f}", *phases, *idle, f"{mean(lines, 'rollout/lag'):.2f}", mismatch]
        if arguments.engine == "sleeping":
            expected = predicted(measured[0], lag)
            cells += [f"{expected.seconds:.2f}", f"{expected.trainer_idle:.0%}, {expected.engines_idle:.0%}"]
        table.add_row(*cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
