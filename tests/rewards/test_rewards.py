"""The math rule, and graders that misbehave."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards import math
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rewards.registry import lookup

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "grader_vectors.json"


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        ("so \\boxed{12}", "12", 1.0),
        ("\\boxed{12.0}", "12", 1.0),
        ("\\boxed{13}", "12", 0.0),
        ("12", "12", 0.0),  # no box
        ("\\boxed{1} then \\boxed{2}", "2", 1.0),  # the last box counts
        ("\\boxed{2", "2", 0.0),  # unbalanced
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1.0),
        ("\\boxed{x+1}", "1+x", 1.0),
        ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", 0.0),
        ("\\boxed{5}", "\\boxed{5}", 1.0),  # a boxed ground truth
    ],
)
def test_math_rule(response: str, truth: str, reward: float) -> None:
    assert math.grade(response, truth) == reward


def hangs(response: str, truth: str) -> float:
    if response == "hang":
        time.sleep(3600)
    if response == "crash":
        os._exit(3)
    if response == "raise":
        raise ValueError("cannot")
    return 1.0


@pytest.mark.slow
def test_a_hang_a_crash_and_an_exception_are_ungraded_and_the_others_graded() -> None:
    answers = [("ok", ""), ("hang", ""), ("ok", ""), ("crash", ""), ("raise", ""), ("ok", "")]
    with GraderPool(hangs, workers=1, deadline_s=2.0) as pool:
        assert asyncio.run(pool.grade(answers)) == [1.0, None, 1.0, None, None, 1.0]
        assert asyncio.run(pool.grade([("ok", "")])) == [1.0]  # the pool lives on
        assert asyncio.run(pool.grade([])) == []


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.name: given 'maths'; allowed: math; did you mean 'math'"):
        lookup("maths")


# The reference says False to both; a person would not: math-verify reads 5=x as x=5 and compares 2π numerically.
MORE_LENIENT = {"boxed/equation_swap", "boxed/pi_decimal"}


@pytest.mark.skipif(not VECTORS.is_file(), reason="the reference's grader vectors are not beside the project")
def test_agreement_with_the_reference_rule() -> None:
    cases = [case for case in json.loads(VECTORS.read_text())["cases"] if isinstance(case["ground_truth"], str)]
    ours = {case["name"]: math.grade(case["response"], case["ground_truth"]) for case in cases}
    assert {c["name"] for c in cases if ours[c["name"]] != float(c["score"]["6"])} == MORE_LENIENT
