"""Ranges of flat tensors as boxes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.actor.optimizer.state import boxes

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_boxes_are_the_range_in_the_order_of_memory(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(0, total))
    whole, found = torch.arange(total).view(shape), []
    cut = boxes(shape, start, end)
    for offset, size in cut:
        box = whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        assert tuple(box.shape) == size, "inside the tensor"
        found.append(box.reshape(-1))
    covered = torch.cat(found).tolist() if found else []
    assert covered == list(range(start, end))
    assert len(cut) <= 2 * len(shape) - 1


def test_a_range_of_whole_rows_is_one_box() -> None:
    assert boxes((4, 3, 2), 6, 18) == [((1, 0, 0), (2, 3, 2))]
    assert boxes((4, 3), 0, 12) == [((0, 0), (4, 3))]
    assert boxes((4, 3), 4, 5) == [((1, 1), (1, 1))]
    assert boxes((4, 3), 1, 8) == [((0, 1), (1, 2)), ((1, 0), (1, 3)), ((2, 0), (1, 2))]
