"""One cluster for all tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, unavailable

NODES = 17
"""What slurm/hpt_70b.sbatch asks for; smaller jobs get the first of them."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Up and idle."""
    if reason := unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hpt"))  # unix sockets want short names
    folder.chmod(0o755)  # munge
    running = Cluster(folder / "slurm", nodes=NODES)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
