"""Files that nobody should write: each is read, or refused in a sentence; none ends the process or keeps it for ever."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES = 5
"""Of each file, by tests/data/hostile.py."""


def read(folder: Path, numbers: range) -> Sequence[str]:
    """What becomes of the files of these numbers, in a process of their own, which a crash ends."""
    command = [sys.executable, "-m", "tests.data.hostile", str(folder), str(numbers.start), str(numbers.stop)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    lines = done.stdout.splitlines()
    assert len(lines) == USES * len(numbers)
    return lines


@pytest.mark.slow
def test_no_file_is_more_than_a_sentence(tmp_path: Path) -> None:
    lines = read(tmp_path, range(25))
    assert any("wrote" in line for line in lines)
    assert any("DataError" in line for line in lines)


@pytest.mark.thorough
def test_nor_is_one_of_three_hundred(tmp_path: Path) -> None:
    """Twelve times as many files as the test above: every kind of damage and of odd type several times."""
    lines = read(tmp_path, range(300))
    assert sum("wrote" in line for line in lines) > 50
