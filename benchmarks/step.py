"""Seconds of a whole GRPO step of SmolLM2-135M, by this project and by TRL's GRPOTrainer on the same cores, in turns.

    python3.11 -m venv .venv-trl
    .venv-trl/bin/python -m pip install --no-deps -r benchmarks/step_trl.txt
    .venv/bin/python benchmarks/step.py                                 # 4 and 8 samples a prompt, about half an hour
    .venv/bin/python benchmarks/step.py --only ours rollout.threads=1   # other settings of this project's side

A step is 12 prompts × n samples, all of them trained: rollouts, rewards, one optimizer step, and new weights in the engine.
TRL generates with transformers. Both sides have the same weights, prompts, learning rate and reward, and responses of one
length: their end-of-sequence token is one that the model never samples. The first step of each side, which warms up, does not
count. "cores" is the processor time of a side's own processes by its seconds, "others" that of all other processes of the
machine, nearly 0 on an idle one. Whoever measures beside other work compares processor seconds, with one thread on both sides
(rollout.threads=1 actor.threads=1, and OMP_NUM_THREADS=1 for TRL): threads that wait for each other count as work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from megatron_hpt.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_hpt.data.parquet import Problem, write_problems
from megatron_hpt.examples import smollm2, word_problems
from megatron_hpt.overrides import apply_overrides, dump_yaml

TRL = Path(__file__).with_name("step_trl.py")
ENVIRONMENT = Path(__file__).parents[1] / ".venv-trl"
PROMPTS, LONGEST_PROMPT, TOKENS, LR = 12, 128, 64, 1e-6
NEVER_SAMPLED = 5
"""A token of SmolLM2's for source files, which ends responses here."""
TRL_ROWS = 24
"""Rows of TRL's micro-batches: as many tokens as this project's hold."""


@dataclass(frozen=True)
class Step:
    """One measured step of one side."""

    seconds: float
    generation_s: float
    tokens: int
    """Generated."""
    own_s: float
    """Processor seconds of the side's processes."""
    others_s: float
    """Processor seconds of all others."""


def write_inputs(folder: Path) -> list[Problem]:
    """Write model and data, and return the problems of every step."""
    model = folder / "model"
    smollm2.write(model, smollm2.shipped_file())
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = {"config.json": ("eos_token_id", NEVER_SAMPLED)}
    ends["tokenizer_config.json"] = ("eos_token", tokenizer.convert_ids_to_tokens(NEVER_SAMPLED))
    for name, (key, value) in ends.items():
        settings = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**settings, key: value}), encoding="utf-8")

    def fits(problem: Problem) -> bool:
        return (
            len(tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, return_dict=False)) <= LONGEST_PROMPT
        )

    problems = list(itertools.islice(word_problems.problems(0, fits), PROMPTS))
    write_problems(folder / "train.parquet", problems, "gsm_symbolic", "train")
    return problems


def configuration(folder: Path, samples: int, steps: int, dtype: str) -> Config:
    """Return this project's side."""
    return Config(
        name=f"step_{samples}",
        model=ModelConfig(path=str(folder / "model"), dtype=dtype),
        data=DataConfig(train=str(folder / "train.parquet"), max_prompt_length=LONGEST_PROMPT, max_response_length=TOKENS),
        algorithm=AlgorithmConfig(name="grpo"),
        reward=RewardConfig(name=f"{TRL}:reward"),
        rollout=RolloutConfig(samples_per_prompt=samples, max_running=PROMPTS * samples),
        parallel=ParallelConfig(),
        actor=ActorConfig(micro_batch_tokens=4096, threads="all"),
        optimizer=OptimizerConfig(lr=LR),
        trainer=TrainerConfig(steps=steps, prompts_per_step=PROMPTS, export=False),
    )


def ours(folder: Path, samples: int, steps: int, dtype: str, settings: Sequence[str]) -> list[Step]:
    """Measure this project's steps in a run of its own."""
    place = Path(tempfile.mkdtemp(dir=folder))
    recipe = place / "recipe.yaml"
    config = apply_overrides(configuration(folder, samples, steps, dtype), list(settings))
    recipe.write_text(dump_yaml(config), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("megatron-hpt")), "train", str(recipe)]
    lines = measured(command, place, "runs/*/metrics.jsonl", steps)
    return [
        Step(seconds, line["time/rollout_s"], round(line["train/tokens"]), own, others) for seconds, own, others, line in lines
    ]


def theirs(folder: Path, samples: int, steps: int, dtype: str, rows: int, problems: Sequence[Problem]) -> list[Step]:
    """Measure TRL's steps in a process of its environment."""
    place = Path(tempfile.mkdtemp(dir=folder))
    given = {"model": str(folder / "model"), "prompts": [each.question for each in problems], "samples": samples}
    given |= {"dtype": dtype, "steps": steps, "rows": rows, "tokens": TOKENS, "lr": LR, "out": str(place / "steps.jsonl")}
    command = [str(ENVIRONMENT / "bin" / "python"), str(TRL), json.dumps(given)]
    lines = measured(command, place, "steps.jsonl", steps)
    return [Step(seconds, line["generation_s"], line["tokens"], own, others) for seconds, own, others, line in lines]


def measured(command: Sequence[str], place: Path, lines: str, steps: int) -> list[tuple[float, float, float, dict[str, Any]]]:
    """Run one side until it ends, and measure its steps from line to line of the file that it writes one for each step.

    Args:
        place: working directory.
        lines: pattern of the file.

    Returns:
        For each step but the first: seconds, processor seconds of the side and of all other processes, and its line.
    """
    with (place / "log").open("wb") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = psutil.Popen(command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        marks: list[tuple[float, float, float]] = []
        while process.poll() is None:
            time.sleep(0.2)
            if len(marks) < sum(text.count("\n") for text in texts(place, lines)):
                marks.append((time.perf_counter(), processor_seconds(process), sum(busy())))
    found = [json.loads(line) for text in texts(place, lines) for line in text.splitlines()]
    if process.returncode or len(found) != steps or len(marks) != steps:
        raise SystemExit(f"{command[0]} ended with {process.returncode}: {(place / 'log').read_text()[-3000:]}")
    deltas = [[after - before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]
    return [(seconds, own, all_ - own, line) for (seconds, own, all_), line in zip(deltas, found[1:], strict=True)]


def texts(place: Path, pattern: str) -> Iterator[str]:
    """Yield the contents of the files of a pattern."""
    yield from (path.read_text(encoding="utf-8") for path in place.glob(pattern))


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process and of all that it has started."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += sum(each.cpu_times()[:4])  # user and system, and those of its children that have ended
        except psutil.NoSuchProcess:
            continue
    return total


def busy() -> Iterator[float]:
    """Yield the processor times of the whole machine in which it was not idle."""
    times = psutil.cpu_times()
    yield from (getattr(times, name) for name in ("user", "nice", "system", "irq", "softirq"))


def shown(name: str, samples: int, steps: Sequence[Step]) -> float:
    """Print a line for the steps of one side, and return the median of their seconds."""
    seconds = statistics.median(step.seconds for step in steps)
    generation = statistics.median(step.generation_s for step in steps)
    rate = statistics.median(step.tokens / step.generation_s for step in steps)
    total = sum(step.seconds for step in steps)
    each = ", ".join(f"{step.seconds:.1f}" for step in steps)
    own, others = (sum(getattr(step, kind) for step in steps) / total for kind in ("own_s", "others_s"))
    print(
        f"n={samples}  {name:5} {seconds:6.1f} s a step ({each}); generation {generation:5.1f} s, {rate:4.0f} tokens/s; "
        f"the rest {seconds - generation:5.1f} s; {steps[0].tokens} tokens; cores {own:.2f}, others {others:.2f}",
        flush=True,
    )
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="overrides of this project's side")
    parser.add_argument("--samples", type=int, nargs="*", default=[4, 8], help="samples a prompt")
    parser.add_argument("--steps", type=int, default=3, help="of each side, the first one not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=TRL_ROWS, help="of TRL's micro-batches")
    parser.add_argument("--only", choices=("ours", "TRL"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        place = Path(folder).resolve()
        problems = write_inputs(place)
        for _, samples in itertools.product(range(arguments.rounds), arguments.samples):
            seconds = {}
            if arguments.only != "TRL":
                steps = ours(place, samples, arguments.steps, arguments.dtype, arguments.settings)
                seconds["ours"] = shown("ours", samples, steps)
            if arguments.only != "ours":
                steps = theirs(place, samples, arguments.steps, arguments.dtype, arguments.rows, problems)
                seconds["TRL"] = shown("TRL", samples, steps)
            if len(seconds) == 2:
                print(f"n={samples}  TRL takes {seconds['TRL'] / seconds['ours']:.2f} times as long", flush=True)


if __name__ == "__main__":
    main()
