"""Memory of a GPU that a trainer rank and an engine have in turn."""

from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_hpt.config import RolloutConfig
from megatron_hpt.plan.memory import GIB, EngineMemory, TrainerMemory
from megatron_hpt.plan.shared_gpu import largest_share, moments

GIBS = st.floats(0, 30).map(lambda gib: gib * GIB)
TRAINERS = st.builds(
    TrainerMemory,
    *(GIBS,) * 8,
    rests=st.booleans(),
    leaves=st.booleans(),
)


def engine(share: float, room: float, weights: float = GIB) -> EngineMemory:
    own = share * room
    return EngineMemory(weights, GIB, own - weights - GIB, 1.0, 1)


@given(trainer=TRAINERS, sleep=st.booleans())
def test_the_largest_share_fits_and_a_larger_one_does_not(trainer: TrainerMemory, sleep: bool) -> None:
    room, rollout = 80 * GIB, RolloutConfig(sleep=sleep)
    share = largest_share(rollout, trainer, room)
    assume(share > 0.05)
    last = moments(rollout, trainer, engine(share, room))[-1]
    assert last.total <= room * (1 + 1e-9)
    assert moments(rollout, trainer, engine(share + 0.01, room))[-1].total > room * (1 - 1e-9)


@given(trainer=TRAINERS, weights=GIBS)
def test_taking_turns_never_needs_more_than_both_at_once_but_for_what_a_sleeper_keeps(
    trainer: TrainerMemory, weights: float
) -> None:
    # The allowance of a trainer at work is at least that of one at rest.
    assume(trainer.allowance >= 3 * GIB)
    own = engine(0.9, 80 * GIB, weights)
    (together,) = moments(RolloutConfig(), trainer, own)
    kept = 1.5 * GIB
    assert all(moment.total <= together.total + kept for moment in moments(RolloutConfig(sleep=True), trainer, own))
