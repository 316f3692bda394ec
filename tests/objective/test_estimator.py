"""The estimator against a scalar double loop, and its independence of how the batch is cut."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import AlgorithmConfig
from megatron_hpt.objective.algorithms import ALGORITHMS, build
from megatron_hpt.objective.estimator import Tokens, count, unified_loss

LENGTH = 7  # constant length


def make_rows(seed: int, number: int) -> list[dict]:
    """Random ragged rows of both sources, some with weight 0."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        n, demonstration = rng.randint(1, 6), rng.random() < 0.4
        rows.append(
            {
                "demonstration": demonstration,
                "weight": rng.choice([0.0, 1.0, 1.0, 0.5]),
                "advantage": 1.0 if demonstration else rng.uniform(-2, 2),
                "logprobs": [rng.uniform(-4, -0.01) for _ in range(n)],
                "old": [0.0] * n if demonstration else [rng.uniform(-4, -0.01) for _ in range(n)],
                "entropy": [rng.uniform(0, 3) for _ in range(n)],
            }
        )
    return rows


def flatten(rows: list[dict], dtype: torch.dtype = torch.float64) -> Tokens:
    """Rows as flat tensors, each row after a prompt position of weight 0."""

    def column(values) -> torch.Tensor:
        return torch.tensor([v for row in rows for v in values(row)], dtype=dtype)

    return Tokens(
        logprobs=column(lambda r: [-1.0, *r["logprobs"]]).requires_grad_(),
        entropy=column(lambda r: [1.0, *r["entropy"]]).requires_grad_(),
        old_logprobs=column(lambda r: [0.0, *r["old"]]),
        advantages=column(lambda r: [0.0] + [r["advantage"]] * len(r["old"])),
        weights=column(lambda r: [0.0] + [r["weight"]] * len(r["old"])),
        row_lengths=column(lambda r: [0.0] + [float(len(r["old"]))] * len(r["old"])),
        demonstration=column(lambda r: [float(r["demonstration"])] * (len(r["old"]) + 1)).bool(),
    )


def counts(rows: list[dict]):
    return count((r["demonstration"], len(r["old"]), r["weight"]) for r in rows)


def by_hand(
    name: str, rows: list[dict], coefficient: float, entropy_coefficient: float
) -> tuple[float, list[float], list[float]]:
    """Loss and its derivatives by log-probability and by entropy, one token at a time, from the formulas of the papers."""
    trained = [r for r in rows if r["weight"]]
    rl, sft = [r for r in trained if not r["demonstration"]], [r for r in trained if r["demonstration"]]
    all_tokens = sum(len(r["old"]) for r in trained)
    loss, d_logprobs, d_entropy = 0.0, [], []
    for row in rows:
        d_logprobs.append(0.0)
        d_entropy.append(0.0)
        for logp, old, entropy in zip(row["logprobs"], row["old"], row["entropy"], strict=True):
            if not row["weight"]:
                d_logprobs.append(0.0)
                d_entropy.append(0.0)
                continue
            if row["demonstration"]:
                scale = coefficient * row["weight"] / sum(len(r["old"]) for r in sft)
                value, slope = -scale * logp, -scale
            else:
                ratio, a = math.exp(logp - old), row["advantage"]
                scale = row["weight"] / (len(rl) * (len(row["old"]) if name == "grpo" else LENGTH))
                clipped = name in ("grpo", "dr_grpo") and ((a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8))
                value = slope = 0.0 if clipped else -scale * a * ratio
            loss += value - entropy_coefficient * entropy / all_tokens
            d_logprobs.append(slope)
            d_entropy.append(-entropy_coefficient / all_tokens)
    return loss, d_logprobs, d_entropy


@pytest.mark.parametrize("name", ALGORITHMS)
@given(seed=st.integers(0, 2**32), number=st.integers(0, 9))
def test_value_and_gradient_equal_a_double_loop(name: str, seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    config = AlgorithmConfig(name=name, demonstration_coefficient=0.3, entropy_coefficient=0.01)
    tokens = flatten(rows)
    loss = unified_loss(build(config, LENGTH), tokens, counts(rows)).total
    loss.backward()
    expected, d_logprobs, d_entropy = by_hand(name, rows, 0.3, 0.01)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tokens.logprobs.grad, torch.tensor(d_logprobs, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tokens.entropy.grad, torch.tensor(d_entropy, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 2**32), number=st.integers(1, 9), data=st.data())
def test_any_cut_in_any_order_adds_up_to_the_whole(seed: int, number: int, data: st.DataObject) -> None:
    rows = make_rows(seed, number)
    algorithm = build(AlgorithmConfig(name="hpt", entropy_coefficient=0.01), LENGTH)
    whole = unified_loss(algorithm, flatten(rows), counts(rows)).total.item()
    order = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(0, number))
    parts = [unified_loss(algorithm, flatten(part), counts(rows)).total.item() for part in (order[:cut], order[cut:])]
    assert math.isclose(sum(parts), whole, rel_tol=1e-12, abs_tol=1e-13)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_of_weight_zero_have_a_gradient_of_exactly_zero(name: str) -> None:
    rows = [{**row, "weight": 0.0} for row in make_rows(1, 6)]
    tokens = flatten(rows)
    unified_loss(build(AlgorithmConfig(name=name), LENGTH), tokens, counts(rows)).total.backward()
    assert torch.count_nonzero(tokens.logprobs.grad) == 0


def test_an_overflowing_ratio_outside_the_term_does_not_poison_the_gradient() -> None:
    rows = make_rows(3, 4)
    for row in rows:
        row |= {
            "demonstration": True,
            "weight": 1.0,
            "advantage": 1.0,
            "logprobs": [-1e-3] * len(row["old"]),
            "old": [-1e9] * len(row["old"]),
        }
    tokens = flatten(rows, torch.float32)
    loss = unified_loss(build(AlgorithmConfig(name="hpt"), LENGTH), tokens, counts(rows)).total
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(tokens.logprobs.grad).all()


def test_masked_tokens_are_counted() -> None:
    row = {
        "demonstration": False,
        "weight": 1.0,
        "advantage": 1.0,
        "logprobs": [0.0, -1.0],
        "old": [-1.0, -1.0],
        "entropy": [0, 0],
    }
    loss = unified_loss(build(AlgorithmConfig(name="grpo"), LENGTH), flatten([row]), counts([row]))
    assert loss.masked == 1
