"""Penalties on the rewards of tokens, which come as arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.batch.advantages import overlong_penalties, with_advantages
from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, ModelConfig, OverlongConfig
from megatron_hpt.objective.advantage import Outcome
from megatron_hpt.objective.algorithms import of_run

TOKENS = 4
CONFIG = Config(
    name="x",
    model=ModelConfig(path="m"),
    data=DataConfig(train="t", max_response_length=TOKENS),
    algorithm=AlgorithmConfig(name="reinforce_pp", discount=0.5, overlong=OverlongConfig(buffer=2, penalty=0.5)),
)
PENALTIES = st.lists(st.floats(-10, 10), min_size=TOKENS, max_size=TOKENS)


@given(rewards=st.lists(st.floats(-1, 1), min_size=1, max_size=4), data=st.data())
def test_penalties_of_the_same_token_are_added_before_advantages_are_estimated(
    rewards: list[float], data: st.DataObject
) -> None:
    """The same numbers, bit for bit, as from lists of Python's floats."""
    rows = [
        Row(str(i), i, Source.ROLLOUT, range(1 + TOKENS), 1, [0.0] * TOKENS, r, None, 1.0, 0) for i, r in enumerate(rewards)
    ]
    first, second = ([data.draw(PENALTIES) for _ in rows] for _ in range(2))
    algorithm, chosen = of_run(CONFIG), range(len(rows))
    found = with_advantages(
        rows, chosen, algorithm, *({i: np.array(x) for i, x in enumerate(each)} for each in (first, second))
    )
    outcomes = [
        Outcome(row.group, row.reward, TOKENS, False, [a + b for a, b in zip(first[i], second[i], strict=True)])
        for i, row in enumerate(rows)
    ]
    for row, estimate in zip(found, algorithm.estimate([row.role for row in rows], outcomes), strict=True):
        values = row.token_advantages.tolist() if row.token_advantages is not None else [row.advantage] * TOKENS
        assert values == estimate


def test_the_last_token_of_a_long_response_is_punished() -> None:
    rows = [Row("a", 0, Source.ROLLOUT, range(1 + n), 1, [0.0] * n, 1.0, None, 1.0, 0) for n in (2, 3, 4)]
    penalties = {index: penalty.tolist() for index, penalty in overlong_penalties(rows, CONFIG).items()}
    assert penalties == {1: pytest.approx([0, 0, -0.25]), 2: pytest.approx([0, 0, 0, -0.5])}
