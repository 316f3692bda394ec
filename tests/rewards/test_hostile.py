"""A sample of the hostile corpus; all of it: tests/rewards/hostile.py."""

import asyncio

import pytest

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.grades import Cause
from megatron_hpt.rewards.pool import GraderPool

from .hostile import KINDS, corpus, grade_all

DEADLINE_S = 0.5


@pytest.mark.slow
def test_hostile_answers_are_wrong_or_ungraded_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(corpus(240, seed=1))
    assert {case.kind for case in cases} == KINDS.keys()
    with GraderPool(RewardConfig(workers=2, deadline_s=DEADLINE_S)) as pool:
        outcomes = asyncio.run(grade_all(pool, cases, workers=2))
    paired = list(zip(cases, outcomes, strict=True))
    assert [case for case, (grade, _) in paired if grade.score not in (0.0, None)] == []
    assert {grade.cause for grade, _ in outcomes} - {Cause.DEADLINE, Cause.MEMORY, Cause.ERROR} == {None}  # no crash
    seconds = sorted(seconds for _, seconds in outcomes)
    with capsys.disabled():
        print(f" p99 {seconds[int(0.99 * len(seconds))]:.2f} s, deadline {DEADLINE_S} s ", end="")
    assert seconds[int(0.99 * len(seconds))] < DEADLINE_S + 2.0  # a killed grader, on a busy machine
