"""Train several algorithms from the same start, over several seeds, and compare what they reached.

tools/compare_algorithms.py [recipes/quickstart.py] [trainer.steps=100 …]

Every run is a run directory below --out; call it again to continue after an interruption: finished runs are kept,
others go on from their ledgers. Writes comparison.md (the table), comparison.png (the curves) and comparison.json.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megatron_hpt import command
from megatron_hpt.comparison.runs import draw, reached, table
from megatron_hpt.errors import ConfigError, Interrupted
from megatron_hpt.files import check_folder, write_whole
from megatron_hpt.launch.train import finish_run
from megatron_hpt.recipe import load
from megatron_hpt.settings.options import MOST_ROWS, number
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.progress import duration

ALGORITHMS = "sft,grpo,sft_grpo,luffy,srft,hpt"
START_SEED = 1000
"""Of the SFT run that makes the common start; different from the seeds that are compared."""


def main(
    recipe: Annotated[str, typer.Argument(help="recipe whose task and model are used")] = "recipes/quickstart.py",
    overrides: Annotated[list[str] | None, typer.Argument(help="settings of every run, e.g. trainer.steps=100")] = None,
    algorithms: Annotated[str, typer.Option(help="rows of the table, separated by commas")] = ALGORITHMS,
    seeds: Annotated[str, typer.Option(help="seeds of data order and sampling, separated by commas")] = "0,1,2",
    start_steps: Annotated[
        int, number(0, MOST_ROWS, help="SFT steps that make the start from the recipe's model; 0: none")
    ] = 45,
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/comparison"),
) -> None:
    command.goes_on_without_output()
    check_folder(out)
    try:
        _compare(recipe, overrides or [], algorithms.split(","), _numbers(seeds), start_steps, out)
    except Interrupted as error:
        raise Interrupted(f"{error}; the same command continues") from None


def _numbers(seeds: str) -> list[int]:
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise ConfigError(f"--seeds: given {seeds!r}; expected whole numbers with commas between them, e.g. 0,1,2")
    return [int(seed) for seed in seeds.split(",")]


def _compare(recipe: str, overrides: list[str], algorithms: list[str], seeds: list[int], start_steps: int, out: Path) -> None:
    start = _start(recipe, overrides, start_steps, out) if start_steps else []
    jobs = [(algorithm, seed) for seed in seeds for algorithm in algorithms]  # one seed of each before the next
    began, lines = time.monotonic(), {}
    for done, (algorithm, seed) in enumerate(jobs):
        left = duration((time.monotonic() - began) / done * (len(jobs) - done)) if done else "unknown"
        print(f"run {done + 1} of {len(jobs)}: {algorithm}, seed {seed}; time left {left}", flush=True)
        settings = [*_settings(recipe, overrides, algorithm), f"trainer.seed={seed}", "trainer.export=false"]
        run = finish_run(recipe, f"{algorithm}_seed{seed}", [*settings, *overrides, *start], out)
        lines[algorithm, seed] = metrics.read(run.metrics)
        _write({name: [lines[name, s] for s in seeds if (name, s) in lines] for name in algorithms}, out)
    print((out / "comparison.md").read_text(encoding="utf-8"))


def _start(recipe: str, overrides: list[str], steps: int, out: Path) -> list[str]:
    """Settings that begin every run from the same briefly imitating model, trained as the recipe says.

    Of the overrides it takes those that say what is trained on what and where, not those of how the comparison trains.
    """
    shared = [override for override in overrides if override.split(".")[0] in ("model", "data", "rollout", "parallel", "actor")]
    own = ["algorithm.name=sft", f"trainer.steps={steps}", f"trainer.seed={START_SEED}", "trainer.export=true"]
    run = finish_run(recipe, "start", [*shared, *own, "evaluation.every=0"], out)
    return [f"model.path={run.export}"]


def _settings(recipe: str, overrides: list[str], algorithm: str) -> list[str]:
    """What only this algorithm is given."""
    steps = load(recipe, overrides).config.trainer.steps
    own = {"sft_grpo": [f"algorithm.sft_steps={steps // 2}"]}
    return [f"algorithm.name={algorithm}", *own.get(algorithm, [])]


def _write(runs: dict[str, list], out: Path) -> None:
    """Table, curves and numbers of the runs so far."""
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    write_whole(out / "comparison.md", table(runs))
    draw(runs, out / "comparison.png")
    numbers = {name: [asdict(reached(lines)) for lines in seeds] for name, seeds in runs.items()}
    write_whole(out / "comparison.json", json.dumps(numbers, indent=1))


if __name__ == "__main__":
    command.run(lambda: typer.run(main))
