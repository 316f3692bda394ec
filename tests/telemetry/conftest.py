"""Runs to be told of."""

from pathlib import Path
from typing import Any

import pytest

from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.report.write import write_report

from .runs import HPT, STOPPED, UNION, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer: Any) -> list[RunDir]:
    """A whole run, one that stopped early and skipped steps, and one of a single step."""
    root = tmp_path_factory.mktemp("runs")
    return [write(root, tiny_model, tokenizer, story) for story in (HPT, STOPPED, UNION)]


@pytest.fixture(scope="module")
def report(runs: list[RunDir], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all of them."""
    return write_report(runs, tmp_path_factory.mktemp("report") / "three.html")
