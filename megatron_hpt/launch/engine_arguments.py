"""What an engine thinks of the command line that it would be started with, asked without starting it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.engines import extra_arguments
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch import overridden_models
from megatron_hpt.launch.launchers import gpus_here
from megatron_hpt.run import RunDir

ANSWER_S = 300
"""That an engine may take to look at its arguments; importing it is nearly all of that."""


def check_extra_arguments(config: Config) -> None:
    """Have the engine read `rollout.extra_arguments` where there are any; a command line that is all ours needs no such look.

    Called by runs and evaluations before anything is started.

    Raises:
        ConfigError: as `check_engine_arguments`.
    """
    if config.rollout.extra_arguments:
        check_engine_arguments(config)


def check_engine_arguments(config: Config) -> None:
    """The engine takes the command line that it would be started with, and its model.

    Raises:
        ConfigError: it does not; ends with what it says. Or some of `rollout.extra_arguments` are not the user's to give.
    """
    kind, on_gpus = engine_of(config), bool(gpus_here())
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        overridden_models.write(config, run)
        start = Start(run.engine_model(config), 1, run.path, on_gpus)
        command = kind.command(config, interpreter(config), start)
        _check_extra(config, command, kind.command(_without_extra(config), command[0], start))
        environment = {**kind.environment(config, on_gpus), "PYTHONUTF8": "1"}
        try:
            done = subprocess.run(
                [command[0], "-c", kind.argument_check, *command],
                env=environment,
                capture_output=True,
                timeout=ANSWER_S,
                encoding="utf-8",
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{config.rollout.engine}: did not look at its arguments within {ANSWER_S} s") from None
    if done.returncode != 0:
        raise ConfigError(f"{config.rollout.engine} refuses its arguments:\n  " + "\n  ".join(_last_error(done.stderr)))


def _check_extra(config: Config, command: list[str], own: list[str]) -> None:
    given = config.rollout.extra_arguments
    extra_arguments.check(given, own, engine_of(config).reserved_arguments)
    if given and command == own:
        raise ConfigError(f"rollout.extra_arguments: the command line of rollout.engine={config.rollout.engine} takes none")


def _without_extra(config: Config) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"extra_arguments": []})})


def _last_error(stderr: str) -> list[str]:
    """What a process said last, without the way to it: from the last line that names an error."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    named = [number for number, line in enumerate(lines) if re.match(r"(\S+: )?\S*(Error|Exception|error)\b", line)]
    return lines[named[-1] if named else -6 :][:6]
