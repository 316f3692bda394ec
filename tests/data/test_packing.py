"""Micro-batch plans."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.data.packing import plan_micro_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(lengths=LENGTHS, ranks=st.integers(1, 6), budget=st.integers(1, 120))
def test_every_row_once_within_budget_and_equal_counts(lengths: list[int], ranks: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, ranks, budget)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for share in plan for batch in share for i in batch) == list(range(len(lengths)))
    for batch in (batch for share in plan for batch in share):
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(lengths=LENGTHS, ranks=st.integers(1, 6))
def test_ranks_differ_by_at_most_one_row(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[i] for batch in share for i in batch) for share in plan_micro_batches(lengths, ranks, 64)]
    assert max(loads) - min(loads) <= max(lengths, default=0)
