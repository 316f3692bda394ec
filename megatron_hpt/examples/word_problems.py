"""Grade-school word problems with step-by-step solutions, from reasoning-gym's gsm_symbolic generator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_hpt.data.parquet import Problem, write_problems

_GENERATOR_HINT = " Give the result as your final answer. Do not include units."
_INSTRUCTION = "\nSolve it step by step and put the final number in \\boxed{}."


def problems(seed: int, fits: Callable[[Problem], bool]) -> Iterator[Problem]:
    """Endless problems that pass `fits`; the same for the same seed."""
    import reasoning_gym

    data = reasoning_gym.create_dataset("gsm_symbolic", size=1_000_000, seed=seed)
    for index in itertools.count():
        item = data[index]
        steps, marker, _ = item["metadata"]["answer_cot"].rpartition("####")
        demonstration = f"{steps.strip()}\nThe answer is \\boxed{{{item['answer']}}}."
        problem = Problem(item["question"].removesuffix(_GENERATOR_HINT) + _INSTRUCTION, item["answer"], demonstration)
        if marker and fits(problem):
            yield problem


def write(folder: Path, train: int, held_out: int, fits: Callable[[Problem], bool] = lambda _: True) -> None:
    """Write train.parquet and heldout.parquet with problems of different seeds; no question is in both.

    Args:
        fits: which problems are kept, e.g. by their length in tokens.
    """
    evaluation = list(itertools.islice(problems(1, fits), held_out))
    questions = {problem.question for problem in evaluation}
    fresh = (problem for problem in problems(0, fits) if problem.question not in questions)
    write_problems(folder / "heldout.parquet", evaluation, "gsm_symbolic", "heldout")
    write_problems(folder / "train.parquet", itertools.islice(fresh, train), "gsm_symbolic", "train")
