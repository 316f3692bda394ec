"""``megatron-hpt train``: from a recipe to a finished run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config, apply_overrides, dump_yaml, load_yaml
from megatron_hpt.data.files import write_whole
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch import preflight
from megatron_hpt.run import RunDir, create, newest, open_run
from megatron_hpt.telemetry.metrics import read as read_metrics
from megatron_hpt.telemetry.report import write_report


def start_run(source: str, overrides: list[str], root: Path) -> RunDir:
    """Train from the first step in a new run directory."""
    recipe = recipes.load(source, overrides)
    if recipe.prepare is not None:
        recipe.prepare(recipe.config)
    preflight.check(recipe.config)
    run = create(recipe.config, root)
    _supervise(recipe.config, run, 0)
    return run


def resume_run(source: str, overrides: list[str], root: Path) -> RunDir:
    """Continue a run from its last checkpoint; batches that its ledger holds are trained again, not generated again.

    Args:
        source: a run directory, or a recipe whose newest run is continued.

    Raises:
        ConfigError: nothing to continue, or the run is complete.
    """
    run = open_run(Path(source)) if Path(source).is_dir() else newest(recipes.load(source, overrides).config.name, root)
    config = apply_overrides(load_yaml(run.config), overrides)
    preflight.check(config)
    start = _last_checkpoint(run)
    if start >= config.trainer.steps:
        raise ConfigError(f"{run.path} is complete ({start} steps); to train it further: --resume trainer.steps={2 * start}")
    write_whole(run.config, dump_yaml(config))
    _supervise(config, run, start)
    return run


def _last_checkpoint(run: RunDir) -> int:
    """Steps in the newest checkpoint; 0 without one."""
    steps = [int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_*")]
    return max(steps, default=0)


def _supervise(config: Config, run: RunDir, start: int) -> None:
    from megatron_hpt.launch.supervisor import Supervisor  # imports torch

    shutil.rmtree(run.export, ignore_errors=True)
    try:
        Supervisor(config, run, start).run()
    finally:
        if read_metrics(run.metrics):
            write_report(run)
