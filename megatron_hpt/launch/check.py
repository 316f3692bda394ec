"""``megatron-hpt check``: everything that a run would refuse, found without starting one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.cores import assigned
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.seeding import settled
from megatron_hpt.files import check_folder
from megatron_hpt.launch import preflight
from megatron_hpt.launch.engine_arguments import check_engine_arguments
from megatron_hpt.launch.launchers import gpus_here, on_this_machine
from megatron_hpt.launch.train import prepare_inputs
from megatron_hpt.launch.training_data import TrainingDataReport
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective.algorithms import of_run, without_effect
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.pool import GraderPool


def check_recipe(source: str, overrides: list[str], root: Path, console: Console) -> None:
    """Look at settings, model, tokenizer, data, places and the engine's arguments as `train` would, and print what was found.

    Inputs that the recipe makes itself are made where they are missing. No trainer and no engine is started.

    Args:
        root: folder of the runs.

    Raises:
        ConfigError, ModelError, DataError: what `train` would refuse, in the same words.
    """
    recipe = recipes.load(source, overrides)
    config = settled(recipe.config, bool(gpus_here()))
    check_folder(root)
    prepare_inputs(recipe, root)
    found = preflight.check(config)
    on_this_machine(config)
    if not config.rollout.urls:
        console.print("asking the engine what it thinks of its arguments …", highlight=False)
        check_engine_arguments(config)
    table = Table(show_header=False, box=None)
    for row in [*_told(config, found), *_graded(config, found)]:
        table.add_row(*row)
    console.print(table, highlight=False)
    for note in _notes(config, found):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"[green]nothing stands in the way[/green] of megatron-hpt train {source}", highlight=False, soft_wrap=True)


def _told(config: Config, found: TrainingDataReport) -> Iterator[tuple[str, str]]:
    data, trainer, rollout = config.data, config.trainer, config.rollout
    taken = trainer.steps * trainer.prompts_per_step
    yield "model", f"{config.model.path}, {config.model.dtype}"
    yield "data", f"{found.name}: {found.overview.rows:,} rows, {found.overview.demonstrations:,} with a demonstration"
    yield "looked at", f"{found.rows:,} rows: {found.prompts:,} prompts, {found.demonstrations:,} demonstrations can be used"
    yield (
        "longest",
        (
            f"prompt {found.longest_prompt:,} of {data.max_prompt_length:,} tokens, demonstration "
            f"{found.longest_demonstration:,} of {data.max_response_length:,}"
        ),
    )
    yield "algorithm", f"{config.algorithm.name}; gate: {of_run(config).gate.formula}"
    yield "a step", f"{trainer.prompts_per_step:,} prompts × {rollout.samples_per_prompt:,} rollouts"
    yield "the run", f"{trainer.steps:,} steps, {taken / max(1, found.overview.rows):.2f} times through the data"
    yield "evaluated", ", ".join(config.evaluation.held_out) or "nothing (evaluation.sets)"
    if not gpus_here():
        yield "cores", str(assigned(config))
    yield "engine", f"{rollout.engine}: " + (f"servers {', '.join(rollout.urls)}" if rollout.urls else "takes its arguments")


def _graded(config: Config, found: TrainingDataReport) -> Iterator[tuple[str, str]]:
    """What the run's own reward says of some demonstrations: they teach the form in which it looks for an answer."""
    shown = [prompt for prompt in found.examples if prompt.demonstration]
    if not shown:
        return
    tokenizer = load_tokenizer(config)

    def answer(prompt: Prompt) -> Answer:
        response = tokenizer.decode(prompt.demonstration, skip_special_tokens=True)
        return Answer(response, prompt.ground_truth, tokenizer.decode(prompt.tokens), prompt.data_source)

    with GraderPool(config.reward) as pool:
        grades = asyncio.run(pool.grade([answer(prompt) for prompt in shown]))
    found.unrewarded = sum(grade.score != 1.0 for grade in grades)
    yield "reward", f"{len(grades) - found.unrewarded} of {len(grades)} demonstrations earn 1"


def _notes(config: Config, found: TrainingDataReport) -> Iterator[str]:
    if found.unrewarded:
        yield (
            f"{found.unrewarded} demonstrations do not earn the reward that the rollouts are judged by: they teach another "
            "answer, or another form than the one in which the reward looks for it (docs/data.md, docs/rewards.md)"
        )
    for key in without_effect(config):
        yield f"{key} has no effect on {config.algorithm.name}"
