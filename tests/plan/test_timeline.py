"""Who waits for whom, beside what is worked out by hand, and what holds for all loads."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.plan.rollouts.lengths import Lengths, of_means
from megatron_hpt.plan.rollouts.rollout_timing import Decoding
from megatron_hpt.plan.rollouts.timeline import BatchWork, alone, timeline

STEADY = Decoding(weights_s=0.01, cached_s=0, sequence_s=0, fixed_s=0, unused=0, prefill_s=0, slots=1000)
"""A hundredth of a second a token, however many sequences run."""
EQUAL = Lengths(0, ((1000, 1.0),), 1000, "x")
"""Every response has 1,000 tokens: a batch takes ten seconds alone."""
WORK = BatchWork(STEADY, EQUAL, prompts=10, samples=8, training_s=4, transfer_s=1, in_flight="keep")


def test_without_lag_a_step_is_one_after_the_other() -> None:
    step = timeline(WORK, 0)
    assert step.seconds == pytest.approx(10 + 4 + 1)
    assert (step.trainer_idle, step.engines_idle) == (pytest.approx(10 / 15), pytest.approx(4 / 15))
    assert step.running == pytest.approx(80)


@pytest.mark.parametrize(
    ("training", "lag", "seconds", "trainer_idle", "engines_idle"),
    [
        # A batch is on its way for 10 s, twice a second longer where a transfer stops the engines, and two are under way.
        (4, 1, (10 + 1 + 4 + 1) / 2, 3 / 8, 0),
        # The trainer is busy: a batch is there whenever it wants one.
        (30, 1, 31, 0, 20 / 31),
        (30, 2, 31, 0, 20 / 31),
    ],
)
def test_with_lag_a_step_is_worked_out_by_hand(
    training: float, lag: int, seconds: float, trainer_idle: float, engines_idle: float
) -> None:
    step = timeline(replace(WORK, training_s=training), lag)
    assert step.seconds == pytest.approx(seconds, rel=0.01)
    assert step.trainer_idle == pytest.approx(trainer_idle, abs=0.01)
    assert step.engines_idle == pytest.approx(engines_idle, abs=0.01)


def test_engines_that_are_full_take_what_their_tokens_take() -> None:
    full = replace(WORK, decoding=replace(STEADY, slots=20), training_s=1)
    assert alone(full).total == pytest.approx(80 / 20 * 10)
    assert alone(full).running == 20
    for lag in (1, 2):
        step = timeline(full, lag)
        assert step.seconds == pytest.approx(40 + 1)
        assert step.engines_idle == 0
        assert step.running == pytest.approx(20)


def test_the_next_batch_fills_the_tail() -> None:
    """Long responses run on nearly empty engines, unless others run beside them."""
    slow = replace(STEADY, weights_s=0.02, sequence_s=0.001)
    work = replace(WORK, decoding=slow, lengths=of_means(0, 300, 3000, "x"), training_s=0.1)
    batch = alone(work)
    assert batch.tail > batch.decode
    assert timeline(work, 1).seconds < 0.8 * batch.total < timeline(work, 0).seconds


def test_requests_that_new_weights_meet_keep_their_keys_or_compute_them_again() -> None:
    decoding = replace(STEADY, prefill_s=1e-5)
    work = replace(WORK, decoding=decoding, lengths=of_means(100, 500, 2000, "x"))
    keep, recompute, abort = (timeline(replace(work, in_flight=what), 1).seconds for what in ("keep", "recompute", "abort"))
    assert keep < recompute < abort
    alternating = {timeline(replace(work, in_flight=what), 0).seconds for what in ("keep", "recompute", "abort")}
    assert len(alternating) == 1  # nothing is under way then


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(4, 300),
    sequence=st.floats(0, 1e-3),
    cached=st.floats(0, 1e-7),
    training=st.floats(0.01, 500),
    transfer=st.floats(0, 5),
    mean=st.floats(20, 4000),
    prompts=st.floats(0.2, 40),
)
def test_a_step_is_never_quicker_than_its_sides_nor_slower_for_more_lag(
    slots: int, sequence: float, cached: float, training: float, transfer: float, mean: float, prompts: float
) -> None:
    decoding = Decoding(0.005, cached, sequence, 0.001, 0, 1e-6, slots)
    work = BatchWork(decoding, of_means(100, mean, 4000, "x"), prompts, 8, training, transfer, "keep")
    steps = [timeline(work, lag) for lag in range(4)]
    for lag, step in enumerate(steps):
        assert step.seconds >= 0.93 * work.least_s(lag, alone(work).total)
        assert 0 <= step.trainer_idle <= 1
        assert 0 <= step.engines_idle <= 1
        assert step.running <= slots + 1e-6
    assert steps[0].seconds == pytest.approx(alone(work).total + training + transfer)
    for lower, higher in itertools.pairwise(steps):
        assert higher.seconds <= 1.1 * lower.seconds
