"""The data order as pure functions."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.data.order import BlockLayout, Shuffle, SourceMixture, uniform
from megatron_hpt.errors import DataError

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(
    sizes=SIZES,
    large=st.sets(st.integers(0, 5)),
    windows=st.integers(1, 4),
    seed=st.integers(0, 3),
    draws=st.permutations(range(40)),
)
def test_every_epoch_has_each_row_once_in_any_order_of_asking(
    sizes: list[int], large: set[int], windows: int, seed: int, draws: list[int]
) -> None:
    starts = np.cumsum([0, *sizes]).tolist()
    blocks = [range(a, b) for a, b in itertools.pairwise(starts)]
    kinds = [[block for index, block in enumerate(blocks) if (index in large) is kind] for kind in (False, True)]
    layout, rows = BlockLayout(*kinds, windows), sum(sizes)
    shuffle = Shuffle(layout, (seed,))
    for epoch in range(2):
        assert sorted(shuffle.at(epoch * rows + place) for place in range(rows)) == list(range(rows))
    again = Shuffle(layout, (seed,))
    assert {draw: again.at(draw) for draw in draws} == {draw: shuffle.at(draw) for draw in draws}


def test_a_window_has_whole_small_blocks_and_the_next_part_of_large_ones() -> None:
    small, large = [range(10 * block, 10 * block + 10) for block in range(8)], [range(80, 120)]
    shuffle, met = Shuffle(BlockLayout(small, large, 4), (0,)), set()
    for epoch in range(5):
        for window in range(4):
            rows = {shuffle.at(120 * epoch + 30 * window + place) for place in range(30)}
            assert {row for row in rows if row >= 80} == set(range(80 + 10 * window, 90 + 10 * window))
            blocks = {row // 10 for row in rows if row < 80}
            assert len(blocks) == 2
            met.add(frozenset(blocks))
    assert len(met) > 10  # other blocks are together in other epochs


def test_epochs_seeds_and_sources_have_other_orders() -> None:
    orders = {
        tuple(Shuffle(BlockLayout([range(25), range(25, 50)], windows=windows), seed).at(50 * epoch + i) for i in range(50))
        for seed in [(0, 0), (1, 0), (0, 1)]
        for epoch in (0, 1)
        for windows in (1, 2)
    }
    assert len(orders) == 12


def test_a_shuffle_is_uniform() -> None:
    """Row 0 is first as often as any other, over seeds."""
    first = Counter(Shuffle(BlockLayout([range(2), range(2, 5)]), (seed,)).at(0) for seed in range(2000))
    assert all(abs(count - 400) < 5 * 18 for count in first.values())  # 5 standard deviations


@given(weights=st.lists(st.floats(0.1, 100), min_size=1, max_size=4), start=st.integers(0, 50_000))
def test_a_source_has_its_share_and_each_of_its_draws_once(weights: list[float], start: int) -> None:
    mixture = SourceMixture(weights, (0,))
    assert sum(mixture.shares) == pytest.approx(1)
    assert np.allclose(mixture.shares, np.array(weights) / sum(weights), atol=1 / SourceMixture.CYCLE)
    drawn: dict[int, list[int]] = {}
    for position in range(start, start + 300):
        source, draw = mixture.at(position)
        drawn.setdefault(source, []).append(draw)
    for draws in drawn.values():
        assert draws == list(range(draws[0], draws[0] + len(draws)))
    before = Counter(mixture.at(position)[0] for position in range(start - start % SourceMixture.CYCLE, start))
    for source, draws in drawn.items():
        whole = start // SourceMixture.CYCLE * round(mixture.shares[source] * SourceMixture.CYCLE)
        assert draws[0] == whole + before[source]


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match=r"given the weights 1, 1e-06; the smallest must be at least 1/10000 of their sum"):
        SourceMixture([1.0, 1e-6], (0,))


def test_uniform_numbers_depend_on_their_parts_alone() -> None:
    numbers = [uniform(3, "x", position) for position in range(4000)]
    assert numbers == [uniform(3, "x", position) for position in range(4000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02)
