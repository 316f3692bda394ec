"""``megatron-hpt train --from-ledger``: what is taken of the run that made a ledger, and what of it may be changed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.config import Config, EvaluationConfig
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.files import whole, write_whole
from megatron_hpt.overrides import validated
from megatron_hpt.run import RunDir

SUFFIX = "-from-ledger"
"""Ends the name of such a run, so that ``--resume RECIPE`` does not take it for the newest run of the recipe."""
_MADE_WITH: dict[str, tuple[str, ...]] = {
    "model": ("path", "overrides"),
    "data": (),
    "reward": (),
    "algorithm": ("name", "gate", "discount", "gae_lambda", "sft_steps", "mixture", "max_rounds", "overlong"),
    "rollout": ("samples_per_prompt", "temperature"),
    "trainer": ("seed", "prompts_per_step"),
}
"""Settings that the batches were made with: section → its fields, or none for all of them."""


def config_of_copy(source: RunDir, saved: Config, config: Config) -> Config:
    """Return the configuration of a run that trains another run's ledger.

    Args:
        source: the run that made it.
        saved: its configuration.
        config: the same with overrides.

    Raises:
        ConfigError: the overrides change what the batches were made with, want evaluations, or more steps than there are
            batches.
        DataError: the ledger has none, or one is missing between others.
    """
    changed = []
    for section, named in _MADE_WITH.items():
        before, after = getattr(saved, section), getattr(config, section)
        fields = named or tuple(type(before).model_fields)
        changed += [f"{section}.{field}" for field in fields if getattr(before, field) != getattr(after, field)]
    if changed:
        raise ConfigError(
            f"--from-ledger: {', '.join(changed)} cannot change: the batches of {source.path} were made with it, and no other "
            "are made"
        )
    if config.evaluation != saved.evaluation:
        raise ConfigError("--from-ledger: evaluation: nothing is evaluated, since there are no engines; leave it out")
    check_batches(source, config.trainer.steps)
    name = config.name if config.name != saved.name or source.is_from_ledger else f"{saved.name}{SUFFIX}"
    copy = config.model_copy(update={"name": name, "evaluation": EvaluationConfig()})
    return validated(copy.model_dump(mode="json"), name)


def check_batches(run: RunDir, steps: int) -> None:
    """Refuse a ledger that lacks one of the first `steps` batches.

    Raises:
        ConfigError: it has fewer.
        DataError: it has none, or one is missing between others.
    """
    there = set(Ledger(run.batches).steps())
    missing = next((step for step in range(steps) if step not in there), None)
    if not there:
        raise DataError(f"{run.batches}: no batch is there; --from-ledger trains the batches of a run that has made some")
    if missing is not None and missing < max(there):
        raise DataError(f"{run.batches}: the batch of step {missing} is missing, and later ones are there; put it back")
    if missing is not None:
        raise ConfigError(
            f"--from-ledger: trainer.steps: given {steps}; {run.batches} has {missing} batches: trainer.steps={missing} "
            "trains these (a learning rate that decays then reaches its end there)"
        )


def take_batches(source: RunDir, run: RunDir, steps: int) -> None:
    """Note in a run where its batches are from, and link them from there, or copy them where that cannot be done.

    A batch is never changed once it is there, so both runs may have the same file.
    """
    write_whole(run.ledger_source, json.dumps({"run": str(source.path.resolve()), "steps": steps}) + "\n")
    theirs, ours = Ledger(source.batches), Ledger(run.batches)
    for step in range(steps):
        with suppress(OSError):
            os.link(theirs.path(step), ours.path(step))
            continue
        with whole(ours.path(step)) as temporary:
            shutil.copyfile(theirs.path(step), temporary)


def without_engines(config: Config) -> Config:
    """Return what a launcher and a supervisor are told of a run from a ledger: no server is started, and none is there."""
    nobody = {"servers": 0, "tensor_parallel": 1, "urls": []}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=nobody)})
