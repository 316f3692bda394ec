"""Micro-batch plans and the places of rows in them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.batch.packing import attention_parity, context_slice, places, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(lengths=LENGTHS, ranks=st.integers(1, 6), budget=st.integers(1, 120), multiple=st.integers(1, 4))
def test_every_row_once_within_budget_and_equal_counts(lengths: list[int], ranks: int, budget: int, multiple: int) -> None:
    plan = plan_micro_batches(lengths, ranks, budget, count_multiple=multiple)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1
    assert len(plan[0]) >= 1
    assert len(plan[0]) % multiple == 0
    assert sorted(i for share in plan for batch in share for i in batch) == list(range(len(lengths)))
    for batch in (batch for share in plan for batch in share):
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(lengths=LENGTHS, ranks=st.integers(1, 6), parity=st.sampled_from([1.0, 20.0, float("inf")]))
def test_ranks_differ_by_at_most_one_row(lengths: list[int], ranks: int, parity: float) -> None:
    def cost(length: int) -> float:
        return length * (1 + length / parity)

    plan = plan_micro_batches(lengths, ranks, 64, attention_parity=parity)
    loads = [sum(cost(lengths[i]) for batch in share for i in batch) for share in plan]
    assert max(loads) - min(loads) <= max(map(cost, lengths), default=0) + 1e-9


def test_a_long_row_weighs_more_than_its_tokens() -> None:
    """One row of 100 costs as much as four of 50 where attention dominates."""
    assert sorted(map(len, (share[0] for share in plan_micro_batches([100, 50, 50, 50, 50], 2, 10_000)))) == [2, 3]
    plan = plan_micro_batches([100, 50, 50, 50, 50], 2, 10_000, attention_parity=1e-6)
    assert plan == [[[0]], [[1, 2, 3, 4]]]


def test_the_parity_of_llama_2_7b() -> None:
    """12 h² parameters a layer and h of attention: at 12 h tokens for a plain transformer, here by its own sizes."""
    assert attention_parity(hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128) == 4 * 4096 + 3 * 11008


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    context=st.integers(1, 4),
    tensor=st.integers(1, 4),
    total=st.integers(0, 400),
)
def test_rows_have_places_that_divide(lengths: list[int], context: int, tensor: int, total: int) -> None:
    row = 2 * context if context > 1 else 1
    slots = places(lengths, row, row * tensor, total)
    assert all(slot % row == 0 for slot in slots)
    assert sum(slots) % (row * tensor) == 0
    assert sum(slots) >= total
    assert all(0 <= slot - length < row for slot, length in zip(slots, lengths, strict=False))
    assert max(slots) < max(lengths) + row
    parts = [context_slice(slots, context, rank) for rank in range(context)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(np.concatenate(parts)) == list(range(sum(slots)))


def test_a_context_rank_holds_an_early_and_a_late_piece_of_every_row() -> None:
    assert context_slice([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_slice([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
