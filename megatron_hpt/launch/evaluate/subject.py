"""The model that is to be evaluated: a folder, a checkpoint, a part of a run, or servers that run already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import CheckpointError, ModelError
from megatron_hpt.models.checkpoints import damage, is_checkpoint, read_best, read_meta
from megatron_hpt.overrides import load_yaml
from megatron_hpt.run import RunDir

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclass(frozen=True)
class Subject:
    """A model, and where its settings are."""

    given: str
    """The command line's MODEL."""
    name: str
    """Name of the evaluation's folder."""
    path: Path | None
    """Hugging Face folder or checkpoint in Megatron's format; None if servers at `urls` have the model."""
    urls: tuple[str, ...] = ()
    run: RunDir | None = None
    """The run that the model is a part of, if any."""
    step: int | None = None
    """Optimizer steps that the model was trained for, if it is a part of a run."""

    def configuration(self) -> Config:
        """Return the settings to start from: those of the model's run, or defaults."""
        if self.run is not None:
            return load_yaml(self.run.config)
        return Config(name="evaluation", model=ModelConfig(path=str(self.path or "none")), data=DataConfig(train=""))

    def weights(self) -> str:
        """Return a digest of the names, sizes and times of the model's files."""
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")) if self.path else ():
            if path.is_file():
                digest.update(f"{path.relative_to(self.path)} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()


def resolve(model: str) -> Subject:
    """Find the model that a command line's MODEL means.

    Raises:
        ModelError, CheckpointError: MODEL is no model; says what would be one.
    """
    if model.startswith(("http://", "https://")):
        urls = tuple(url.rstrip("/") for url in model.split(","))
        return Subject(model, urls[0].partition("://")[2].replace(":", "-").replace("/", "-"), None, urls)
    path = Path(model)
    if not path.is_dir():
        raise ModelError(
            f"{model}: no such folder; give a Hugging Face folder, a checkpoint, a run directory, or a server's http://host:port"
        )
    if RunDir(path).config.is_file():
        return _part_of_run(model, RunDir(path))
    return _folder(model, path, next((run for run in _runs_around(path) if run.config.is_file()), None))


def _part_of_run(given: str, run: RunDir) -> Subject:
    """Find the model of a run: the best checkpoint if one was chosen, else the final model, else the newest checkpoint."""
    best, steps = read_best(run.path), run.checkpoint_steps()
    if best is not None:
        return _folder(given, run.checkpoint(best.step), run)
    if run.export.is_dir():
        return _folder(given, run.export, run)
    if steps:
        return _folder(given, run.checkpoint(steps[-1]), run)
    raise ModelError(f"{given}: the run has neither a checkpoint nor an export yet")


def _folder(given: str, path: Path, run: RunDir | None) -> Subject:
    if is_checkpoint(path):
        if reason := damage(path):
            raise CheckpointError(f"{path}: {reason}")
        step = read_meta(path)["step"] if run else None
    elif (path / "config.json").is_file():
        step = run.exported_step(load_yaml(run.config)) if run else None
    else:
        raise ModelError(f"{path}: has no config.json and is no checkpoint; give a Hugging Face folder or a checkpoint")
    name = "-".join((run.path.resolve().name, path.name)) if run else path.resolve().name
    return Subject(given, name, path, run=run, step=step)


def _runs_around(path: Path) -> Iterator[RunDir]:
    """Yield the runs that a folder may be in as RUN/export or RUN/checkpoints/step_000100."""
    yield from (RunDir(folder) for folder in path.resolve().parents[:2])


def dtype_of(contents: dict) -> str:
    """Return the precision to compute in from a config.json: that of the weights, and bfloat16 for float16."""
    return _DTYPES.get(str(contents.get("dtype") or contents.get("torch_dtype")), "float32")
