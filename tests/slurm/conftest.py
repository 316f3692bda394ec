"""One cluster for all tests of a module."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, unavailable


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Up and idle, with the `NODES` of the module, or four."""
    if reason := unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hpt"))  # unix sockets want short names
    folder.chmod(0o755)  # munge
    running = Cluster(folder / "slurm", nodes=getattr(request.module, "NODES", 4))
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
