"""Runs on engines that are there already."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine_servers import SharedEngines

from .runs import RECIPE, STARTED, Run


@dataclass(frozen=True)
class OnShared:
    """Starts runs on the servers that all tests share, with inputs that are made already."""

    engines: SharedEngines

    def start(self, folder: Path, *arguments: str, source: str | Path = RECIPE, kind: str = "vllm") -> Run:
        """`Run.start` without the start of an engine."""
        return Run.start(folder, str(source), *self.settings(folder, kind), *arguments)

    def settings(self, folder: Path, kind: str = "vllm") -> tuple[str, ...]:
        """What leads a run in this folder to the server."""
        server = self.engines.server(kind)
        if not (folder / "build").exists():
            shutil.copytree(self.engines.inputs, folder / "build" / "quickstart")
        return f"rollout.urls=[{server.url}]", f"rollout.engine={kind}"


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A test that fails, or is interrupted, leaves no run behind."""
    yield
    while STARTED:
        STARTED.pop().end()


@pytest.fixture(scope="session")
def on_shared(shared_engines: SharedEngines) -> OnShared:
    return OnShared(shared_engines)
