"""Sums of small numbers with every step written out: the quickstart's task."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from megatron_hpt.data.parquet import Problem, write_problems

OPERANDS = 3


def problem(numbers: tuple[int, ...]) -> Problem:
    """``3+5+9`` → ``3+5=8,8+9=17,\\boxed{17}``."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number},")
        total += number
    return Problem("+".join(map(str, numbers)), str(total), "".join(steps) + f"\\boxed{{{total}}}")


def write(folder: Path, held_out: int, seed: int = 0) -> None:
    """Write train.parquet and heldout.parquet: all sums of three numbers from 1 to 9, split at random."""
    numbers = list(itertools.product(range(1, 10), repeat=OPERANDS))
    random.Random(seed).shuffle(numbers)
    write_problems(folder / "heldout.parquet", map(problem, numbers[:held_out]), "arithmetic", "heldout")
    write_problems(folder / "train.parquet", map(problem, numbers[held_out:]), "arithmetic", "train")
