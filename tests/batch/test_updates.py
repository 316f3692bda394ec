"""How a batch is cut into the parts of its optimizer steps, and in which order they are taken."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.batch.updates import order, split
from megatron_hpt.objective.roles import Role

ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.floats(1, 1000), st.sampled_from([None, *Role])), max_size=80
)  # group, cost, role
UPDATES = st.integers(1, 6)


def cut(rows: list[tuple[int, float, Role | None]], updates: int) -> list[list[int]]:
    return split(*([row[i] for row in rows] for i in range(3)), updates)


def kinds_of(rows: list[tuple[int, float, Role | None]]) -> dict[int, frozenset[Role]]:
    groups = {group for group, _, _ in rows}
    return {g: frozenset(role for group, _, role in rows if group == g and role is not None) for g in groups}


@given(rows=ROWS, updates=UPDATES)
def test_every_row_is_in_one_part_and_groups_stay_whole(rows, updates: int) -> None:
    parts = cut(rows, updates)
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in parts)
    groups = [{rows[row][0] for row in part} for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups))


@given(rows=ROWS, updates=UPDATES)
def test_costs_differ_by_at_most_the_dearest_group(rows, updates: int) -> None:
    loads = [sum(rows[row][1] for row in part) for part in cut(rows, updates)]
    groups = Counter()
    for group, cost, _ in rows:
        groups[group] += cost
    assert max(loads) - min(loads) <= max(groups.values(), default=0) + 1e-6


@given(rows=ROWS, updates=UPDATES)
def test_groups_of_every_kind_are_spread(rows, updates: int) -> None:
    kinds = kinds_of(rows)
    parts = [Counter(kinds[group] for group in {rows[row][0] for row in part}) for part in cut(rows, updates)]
    for kind in set(kinds.values()):
        assert max(part[kind] for part in parts) - min(part[kind] for part in parts) <= 1


@given(rows=ROWS, updates=UPDATES)
def test_every_part_trains_something_if_anything_does(rows, updates: int) -> None:
    training = sum(map(bool, kinds_of(rows).values()))
    parts = cut(rows, updates)
    assert len(parts) == max(1, min(updates, training))
    if training:
        assert all(any(rows[row][2] is not None for row in part) for part in parts)


@given(rows=ROWS)
def test_one_update_is_the_batch_as_it_is(rows) -> None:
    assert cut(rows, 1) == [list(range(len(rows)))]


def test_two_demonstrations_beside_long_groups_of_rollouts_are_not_in_one_part() -> None:
    rows = [(group, 800.0, Role.ROLLOUT) for group in range(4)] + [(4, 10.0, Role.DEMONSTRATION), (5, 10.0, Role.DEMONSTRATION)]
    assert cut(rows, 2) == [[0, 2, 4], [1, 3, 5]]


@given(parts=UPDATES, seed=st.integers(0, 2**70), step=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_an_order_is_a_function_of_seed_step_and_epoch(parts: int, seed: int, step: int, epoch: int) -> None:
    drawn = order(parts, seed, step, epoch)
    assert sorted(drawn) == list(range(parts))
    assert drawn == order(parts, seed, step, epoch)


def test_epochs_steps_and_seeds_have_orders_of_their_own() -> None:
    base = order(50, 1, 2, 3)
    assert base not in (order(50, 0, 2, 3), order(50, 1, 1, 3), order(50, 1, 2, 2), order(50, 2, 1, 3))
    assert base[:5] == [13, 30, 33, 41, 3]  # a resumed run on another version of numpy has it too
