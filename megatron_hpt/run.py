"""A run directory: where everything of a run lies."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.files import check_folder, write_whole
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.overrides import dump_yaml, load_yaml


@dataclass(frozen=True)
class RunDir:
    """Paths below one folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; it can be trained again from here."""
        return self.path / "config.yaml"

    @property
    def started(self) -> Path:
        """When the run began, and its number among the runs beside it."""
        return self.path / "started.json"

    @property
    def data(self) -> Path:
        """Files of the training data with their rows and checksums, when the run started."""
        return self.path / "data.json"

    @property
    def ledger_source(self) -> Path:
        """Of a run whose ledger is another one's: which run that is. There are no engines in it."""
        return self.path / "ledger_source.json"

    @property
    def is_from_ledger(self) -> bool:
        """It trains the batches of another run, which lie in its ledger from the start (``train --from-ledger``)."""
        return self.ledger_source.is_file()

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def batches(self) -> Path:
        """The ledger."""
        return self.path / "batches"

    @property
    def checkpoints(self) -> Path:
        """Megatron checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def skipped(self) -> Path:
        """Batches of steps that were not taken, each with its reason."""
        return self.path / "skipped"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def export(self) -> Path:
        """The final model as a Hugging Face folder."""
        return self.path / "export"

    @property
    def exported(self) -> Path:
        """Which step the export is of."""
        return self.path / "exported.json"

    def exported_step(self, config: Config) -> int | None:
        """Optimizer steps in the export; None: there is none. One of an older version says nothing, and is of the last step."""
        if not self.export.is_dir():
            return None
        return (
            json.loads(self.exported.read_text(encoding="utf-8"))["step"] if self.exported.is_file() else config.trainer.steps
        )

    def note_export(self, step: int) -> None:
        """The export is of `step`."""
        write_whole(self.exported, json.dumps({"step": step}))

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The page of curves."""
        return self.path / "report.html"

    def actor_model(self, config: Config) -> str:
        """Folder that says what the actor computes: with `model.overrides` a copy whose config.json has them."""
        return str((self.path / "actor_model").resolve()) if config.model.overrides else str(hf_side(config.model.path))

    def engine_model(self, config: Config) -> str:
        """As `actor_model`, of the engines' model."""
        return str((self.path / "engine_model").resolve()) if config.model.overrides else str(hf_side(config.engine_model))

    @property
    def evaluations(self) -> Path:
        """Every sample of the newest evaluations, by step (`evaluation.samples`)."""
        return self.path / "evaluations"

    def evaluation(self, step: int) -> Path:
        """Samples of the weights after `step` optimizer steps."""
        return self.evaluations / f"step_{step:06d}"

    def evaluation_steps(self) -> list[int]:
        """Steps whose samples are there, oldest first."""
        return _steps(self.evaluations)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step_{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return _steps(self.checkpoints)

    def lock(self) -> IO:
        """Claim the directory for this process until the returned file is closed.

        Raises:
            ConfigError: another process is training in it.
        """
        file = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"{self.path}: another process is training in this run directory") from None
        return file

    def log(self, process: str) -> Path:
        """Log file of one process."""
        return self.logs / f"{process}.log"


def _steps(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in folder.glob("step_*"))
    return sorted(int(match[1]) for match in matches if match)


def create(config: Config, root: Path) -> RunDir:
    """Make a new run directory ``<root>/<name>-<time>`` with the configuration in it; the time is UTC.

    Raises:
        DataError: nothing can be written in `root`.
    """
    check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    number, now = 1 + max((_number(path) for path in root.iterdir()), default=0), time.gmtime()
    run = RunDir(_new_folder(root, f"{config.name}-{time.strftime('%Y%m%d-%H%M%S', now)}"))
    for folder in (run.batches, run.checkpoints, run.logs):
        folder.mkdir()
    write_whole(run.started, json.dumps({"number": number, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", now)}) + "\n")
    write_whole(run.config, dump_yaml(config))
    return run


def _new_folder(root: Path, name: str) -> Path:
    for attempt in itertools.count():
        path = root / (f"{name}-{attempt}" if attempt else name)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("it counts on")


def _number(path: Path) -> int:
    """Of a run among those beside it, in the order of their starts, in which no clock has a part; 0: of an older version's."""
    try:
        return int(json.loads(RunDir(path).started.read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def _order(path: Path) -> tuple[int, str, int]:
    """Of starts; of two that were made at the same moment, or by an older version, their names say it."""
    stamp, _, attempt = re.fullmatch(r".*?-(\d{8}-\d{6})(-(\d+))?", path.name).groups()
    return _number(path), stamp, int(attempt or 0)


def newest(name: str, root: Path) -> RunDir:
    """The newest run of a name.

    Raises:
        ConfigError: there is none.
    """
    own = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")  # not those of a longer name
    found = [path.parent for path in root.glob("*/config.yaml") if own.fullmatch(path.parent.name)]
    if not found:
        raise ConfigError(f"--resume: no run of {name!r} under {root}/; start one without --resume, or name a run directory")
    return RunDir(max(found, key=_order))


def open_run(path: Path) -> RunDir:
    """An existing run directory.

    Raises:
        ConfigError: the folder is not one.
    """
    run = RunDir(path)
    if not run.config.is_file():
        raise ConfigError(f"{path}: not a run directory (it has no config.yaml)")
    load_yaml(run.config)
    return run
