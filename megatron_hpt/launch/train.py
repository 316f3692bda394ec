"""``megatron-hpt train``: from a recipe to a finished run directory."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.cores import assigned
from megatron_hpt.data.source import check_same_files, files
from megatron_hpt.engines.seeding import settled
from megatron_hpt.environment import say_what_is_withheld
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.files import check_folder, write_whole
from megatron_hpt.launch import from_ledger, overridden_models, preflight
from megatron_hpt.launch.engine_arguments import check_extra_arguments
from megatron_hpt.launch.launchers import Launcher, gpus_here, on_this_machine
from megatron_hpt.models.checkpoints import damage
from megatron_hpt.objective.algorithms import of_run, without_effect
from megatron_hpt.overrides import apply_overrides, dump_yaml, load_yaml
from megatron_hpt.run import RunDir, create, newest, open_run
from megatron_hpt.space import in_words, is_no_space
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.report.write import write_report

logger = logging.getLogger(__name__)
Launch = Callable[[Config], Callable[[RunDir], Launcher]]
"""Takes a configuration, refuses one that cannot be placed, and returns what makes the launcher once there is a run."""


def start_run(source: str, overrides: list[str], root: Path, launch: Launch = on_this_machine) -> RunDir:
    """Train a recipe from the first step in a new run directory below `root`; return it when the run has ended well."""
    recipe = recipes.load(source, overrides)
    check_folder(root)
    prepare_inputs(recipe, root)
    config = settled(recipe.config, bool(gpus_here()))
    preflight.check(config)
    start = launch(config)
    check_extra_arguments(config)
    for key in without_effect(config):
        logger.warning("note: %s has no effect on %s", key, config.algorithm.name)
    with in_words(root):
        run = create(config, root)
        write_whole(run.data, json.dumps(files(config), indent=1))
    _supervise(config, run, 0, start(run))
    return run


def start_from_ledger(source: str, overrides: list[str], root: Path, launch: Launch = on_this_machine) -> RunDir:
    """Train the batches of another run's ledger in a new run directory below `root`, without engines and evaluations.

    With the same settings and layout it ends with the weights of the other run, bit for bit.

    Args:
        source: directory of the other run, which may still be going on.

    Raises:
        ConfigError, DataError: as `from_ledger.config_of_copy`.
    """
    other = open_run(Path(source))
    saved = load_yaml(other.config)
    check_folder(root)
    config = from_ledger.config_of_copy(other, saved, apply_overrides(saved, overrides))
    preflight.check_without_engines(config)
    start = launch(from_ledger.without_engines(config))
    with in_words(root):
        run = create(config, root)
        from_ledger.take_batches(other, run, config.trainer.steps)
    _supervise(config, run, 0, start(run))
    return run


def prepare_inputs(recipe: recipes.Recipe, root: Path) -> None:
    """Have the recipe make its own inputs (`prepare`); wait for another process that is making them."""
    if recipe.prepare is not None:
        with in_words(root), _alone(root):
            recipe.prepare(recipe.config)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold a lock while inputs are prepared: a process that comes second waits, and finds them made."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".preparing").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("note: another process prepares inputs here; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resume_run(source: str, overrides: list[str], root: Path, launch: Launch = on_this_machine) -> RunDir:
    """Continue a run from its last checkpoint; batches that its ledger holds are trained again, but not generated again.

    Args:
        source: a run directory, or a recipe whose newest run is continued.

    Raises:
        ConfigError: there is nothing to continue, or the run is complete, or a setting cannot change within a run.
    """
    if Path(source).is_dir():
        run = open_run(Path(source))
    else:
        recipe = recipes.load(source, overrides)
        run, overrides = newest(recipe.config.name, root), list(recipe.overrides)
    saved = load_yaml(run.config)
    config = settled(apply_overrides(saved, overrides), bool(gpus_here()))
    _check_same_batches(saved, config)
    _check_steps(run, config.trainer.steps)
    if run.is_from_ledger:
        from_ledger.check_batches(run, config.trainer.steps)
        preflight.check_without_engines(config)
        launcher = launch(from_ledger.without_engines(config))(run)
    else:
        preflight.check(config)
        if run.data.is_file():  # older runs have none
            check_same_files(_files_of(run), config)
        launcher = launch(config)(run)
        check_extra_arguments(config)
    start = resume_point(run, config)
    if start == config.trainer.steps:
        raise ConfigError(f"{run.path} is complete ({start} steps); to train it further: --resume trainer.steps={2 * start}")
    _supervise(config, run, start, launcher, saved)
    return run


def finish_run(recipe: str, name: str, settings: list[str], root: Path) -> RunDir:
    """Return a finished run of a name: as it is, continued, or trained from its first step.

    Raises:
        ConfigError: the run that is there has other settings.
    """
    settings = [f"name={name}", *settings]
    try:
        run = newest(name, root)
    except ConfigError:
        return start_run(recipe, settings, root)
    on_gpus = bool(gpus_here())
    config, wanted = (settled(recipes.load(*source).config, on_gpus) for source in ((str(run.path), []), (recipe, settings)))
    if config != wanted:
        raise ConfigError(f"{run.path} has other settings than asked for; name another folder with --out")
    return run if resume_point(run, config) == config.trainer.steps else resume_run(str(run.path), [], root)


def _check_steps(run: RunDir, steps: int) -> None:
    """Refuse to continue a run to fewer steps than it has trained.

    Raises:
        ConfigError: it has trained more than `steps`.
    """
    trained = max(len(metrics.read(run.metrics)), *run.checkpoint_steps(), 0)
    if steps < trained:
        raise ConfigError(
            f"--resume: trainer.steps: given {steps}; {run.path} has trained {trained} steps, and none is taken back: "
            f"more than {trained}, or start a new run from its checkpoint (model.path={run.checkpoints}/step_…)"
        )


def resume_point(run: RunDir, config: Config) -> int:
    """Return the step to continue from: the newest checkpoint after which everything that is missing can still be made.

    A checkpoint is written before its step's line of metrics, and the last one before the export and the final evaluation. A
    run that ended in between goes back one checkpoint, and trains the batches since then from its ledger.
    """
    steps, lines = config.trainer.steps, len(metrics.read(run.metrics))
    exported = run.exported_step(config)
    finished = lines >= steps and ((exported or 0) >= steps or not config.trainer.export)
    usable = [s for s in run.checkpoint_steps() if s <= lines and (s < steps or (s == steps and finished))]
    for step in reversed(usable):
        reason = damage(run.checkpoint(step))
        if reason is None:
            return step
        logger.warning("%s is damaged (%s): continuing from the checkpoint before", run.checkpoint(step), reason)
    return 0


def _files_of(run: RunDir) -> list[dict[str, Any]]:
    """Return the training files that the run began with, from RUN/data.json.

    Raises:
        DataError: the file is damaged.
    """
    try:
        listed = json.loads(run.data.read_text(encoding="utf-8"))
        return [{**each, "file": each["file"], "rows": each["rows"]} for each in listed]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        what = f"damaged ({type(error).__name__}: {error}); it names the training files"
        raise DataError(f"{run.data}: {what}. Put it back, or start a new run") from None


def _check_same_batches(saved: Config, config: Config) -> None:
    """Refuse changes of settings that the ledger's batches depend on.

    Raises:
        ConfigError: names the settings.
    """
    sections = ("name", "model", "data", "algorithm", "reward")
    changed = [key for key in sections if getattr(saved, key) != getattr(config, key)]
    fields = {"rollout": ("samples_per_prompt", "temperature"), "trainer": ("seed", "prompts_per_step")}
    for section, names in fields.items():
        before, after = getattr(saved, section), getattr(config, section)
        changed += [f"{section}.{name}" for name in names if getattr(before, name) != getattr(after, name)]
    if not changed and of_run(saved).gate != of_run(config).gate:
        changed = ["trainer.steps, which the gate's schedule depends on (algorithm.mixture.steps=0),"]
    if changed:
        raise ConfigError(f"--resume: {', '.join(changed)} cannot change within a run; start a new one without --resume")


def _supervise(config: Config, run: RunDir, start: int, launcher: Launcher, saved: Config | None = None) -> None:
    """Run the supervisor with the run's lock held, and draw the report however it ends.

    Args:
        saved: configuration of the run before, if it is resumed; nothing is lost of it before what replaces it is written.
    """
    from megatron_hpt.launch.supervisor import Supervisor  # imports torch

    say_what_is_withheld()
    if not gpus_here():
        logger.warning("note: %s (rollout.threads, actor.threads)", assigned(config))
    with run.lock(), _logged(run), in_words(run.path):
        if saved is not None:
            if run.export.is_dir():
                run.note_export(run.exported_step(saved) or 0)
            write_whole(run.config, dump_yaml(config))
        overridden_models.write(config, run)
        try:
            told = from_ledger.without_engines(config) if run.is_from_ledger else config
            Supervisor(told, run, start, launcher).run()
        finally:
            _report(run)


@contextmanager
def _logged(run: RunDir) -> Iterator[None]:
    """Write this process's warnings to a log too, made with the first one, because its output streams may be gone."""
    handler = logging.FileHandler(run.log("supervisor"), encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("megatron_hpt").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("megatron_hpt").removeHandler(handler)
        handler.close()


def _report(run: RunDir) -> None:
    """Draw the report of the steps that there are; a failure to draw it must not hide how the run ended."""
    try:
        if metrics.read(run.metrics):
            write_report([run])
    except Exception as error:
        if is_no_space(error):
            logger.warning("note: no space for the report of %s", run.path)
        else:
            logger.exception("the report of %s could not be drawn", run.path)
