"""Model folders of a run whose config.json has `model.overrides`, for engines to start with and checkpoints to copy from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.files import whole_folder
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.hf_config import read_config
from megatron_hpt.run import RunDir


def write(config: Config, run: RunDir) -> None:
    """Write the folders that `RunDir.actor_model` and `RunDir.engine_model` name, anew; none without overrides."""
    if config.model.overrides:
        for target, source in ((run.actor_model(config), config.model.path), (run.engine_model(config), config.engine_model)):
            write_overridden(hf_side(source), Path(target), config.model.overrides)


def write_overridden(source: Path, target: Path, overrides: Mapping[str, Any]) -> None:
    """Write a folder whose config.json has other values for some keys, and whose other files are links into `source`."""
    contents = read_config(source, overrides)
    shutil.rmtree(target, ignore_errors=True)  # of the run before it was resumed
    with whole_folder(target) as temporary:
        for path in source.resolve().iterdir():
            if path.name != "config.json":
                (temporary / path.name).symlink_to(path)
        (temporary / "config.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
