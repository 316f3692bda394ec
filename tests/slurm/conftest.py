"""One cluster for all tests of a module."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, unavailable


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four nodes, up and idle."""
    if reason := unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hpt"))  # unix sockets want short names
    folder.chmod(0o755)  # munge
    running = Cluster(folder / "slurm", nodes=4)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
