"""The estimator against a scalar double loop, and its independence of how the batch is cut."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import AlgorithmConfig, ClipConfig, EntropyConfig, GateConfig, KlConfig, MismatchConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective import advantage as a
from megatron_hpt.objective.aggregation import TokenMean
from megatron_hpt.objective.algorithm import Algorithm, Term
from megatron_hpt.objective.algorithms import ALGORITHMS, build
from megatron_hpt.objective.estimator import unified_loss
from megatron_hpt.objective.gate import AlwaysRollouts
from megatron_hpt.objective.reference import Current, Old
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Saturating
from megatron_hpt.objective.tokens import count

from .by_hand import LENGTH, TABLE, Batch, HandRow, by_hand, flatten, make_rows, unflatten

SEEDS, NUMBERS = st.integers(0, 2**32), st.integers(0, 9)
INVARIANT = [name for name in ALGORITHMS if name != "hpt_reference"]
AROUND = {"demonstration_coefficient": 0.3, "off_policy_coefficient": 0.7}


def kl_of(name: str, coefficient: float) -> KlConfig:
    """A KL wherever there are rollouts to measure it on."""
    return KlConfig(coefficient=0.0 if name == "sft" else coefficient)


def counts(rows: list[HandRow], ranks: int = 1):
    return count(((row.role, row.group, row.length, row.weight) for row in rows), ranks)


def evaluated(algorithm: Algorithm, rows: list[HandRow], whole: list[HandRow] | None = None, **layout):
    """Loss and gradients by row of some rows of a batch."""
    tokens = flatten(rows, **layout)
    loss = unified_loss(algorithm, tokens, counts(rows if whole is None else whole))
    loss.total.backward()
    padding = layout.get("padding", 1)
    gradients = [unflatten(leaf.grad, rows, padding) for leaf in (tokens.logprobs, tokens.entropy)]
    return loss, *gradients


def assert_equal(found, expected, rtol: float = 1e-12) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rtol, abs=1e-14)


def test_every_row_of_the_table_is_written_out_by_hand() -> None:
    assert TABLE.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
@given(seed=SEEDS, number=NUMBERS)
def test_value_and_gradient_equal_a_double_loop(name: str, seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    kl = kl_of(name, 0.1)
    config = AlgorithmConfig(name=name, entropy=EntropyConfig(coefficient=0.01), kl=kl, **AROUND)
    loss, logprobs, entropy = evaluated(build(config, LENGTH), rows, reference=True)
    expected = by_hand(name, rows, sft_coefficient=0.3, off_coefficient=0.7, entropy=0.01, kl=kl.coefficient)
    assert loss.total.item() == pytest.approx(expected.loss, rel=1e-12, abs=1e-13)
    assert_equal(logprobs, expected.logprobs)
    assert_equal(entropy, expected.entropy)


@given(seed=SEEDS, number=NUMBERS)
def test_the_band_between_two_thresholds_is_off_policy_rl(seed: int, number: int) -> None:
    rows = make_rows(seed, number, tuple(Role))
    config = AlgorithmConfig(name="hpt", gate=GateConfig(threshold=1, off_policy_threshold=3), **AROUND)
    _, logprobs, _ = evaluated(build(config, LENGTH), rows)
    assert_equal(logprobs, by_hand("hpt", rows, sft_coefficient=0.3, off_coefficient=0.7).logprobs)


@given(seed=SEEDS, number=st.integers(1, 9))
def test_each_side_may_be_a_mean_of_its_own(seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    _, shared, _ = evaluated(build(AlgorithmConfig(name="hpt"), LENGTH), rows)
    _, own, _ = evaluated(build(AlgorithmConfig(name="hpt", balance="components"), LENGTH), rows)
    batch = Batch(rows, 1.0, 1.0)
    for row, ours, theirs in zip(rows, shared, own, strict=True):
        if row.weight:
            assert ours == pytest.approx([batch.share(row.role) * slope for slope in theirs], rel=1e-12)


@given(seed=SEEDS, number=NUMBERS, ranks=st.integers(1, 4))
def test_reference_arithmetic_divides_by_micro_batch_and_ranks(seed: int, number: int, ranks: int) -> None:
    rows = make_rows(seed, number)
    tokens = flatten(rows)
    algorithm = build(AlgorithmConfig(name="hpt_reference", entropy=EntropyConfig(coefficient=0.01)), LENGTH)
    loss = unified_loss(algorithm, tokens, counts(rows, ranks)).total.item()
    assert loss == pytest.approx(by_hand("hpt_reference", rows, entropy=0.01, ranks=ranks).loss, rel=1e-12, abs=1e-13)


@given(seed=SEEDS, number=NUMBERS)
def test_the_entropy_bonus_may_leave_demonstrations_out(seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    config = AlgorithmConfig(name="hpt", entropy=EntropyConfig(coefficient=0.01, demonstrations=False))
    loss, _, entropy = evaluated(build(config, LENGTH), rows)
    expected = by_hand("hpt", rows, entropy=0.01, entropy_roles=(Role.ROLLOUT,))
    assert loss.total.item() == pytest.approx(expected.loss, rel=1e-12, abs=1e-13)
    assert_equal(entropy, expected.entropy)


@pytest.mark.parametrize("name", INVARIANT)
@given(seed=SEEDS, number=st.integers(1, 9), data=st.data())
def test_any_cut_in_any_order_with_any_padding_adds_up_to_the_whole(
    name: str, seed: int, number: int, data: st.DataObject
) -> None:
    rows = make_rows(seed, number)
    config = AlgorithmConfig(name=name, entropy=EntropyConfig(coefficient=0.01), kl=kl_of(name, 0.1))
    algorithm = build(config, LENGTH)
    whole, logprobs, _ = evaluated(algorithm, rows, reference=True)
    order = data.draw(st.permutations(range(number)))
    cuts = sorted(data.draw(st.lists(st.integers(0, number), max_size=3)))
    total, gradients = 0.0, {}
    for start, end in zip([0, *cuts], [*cuts, number], strict=True):
        part = [rows[index] for index in order[start:end]]
        padding = data.draw(st.integers(0, 5))
        loss, found, _ = evaluated(algorithm, part, rows, reference=True, padding=padding)
        total += loss.total.item()
        gradients |= dict(zip(order[start:end], found, strict=True))
    assert math.isclose(total, whole.total.item(), rel_tol=1e-12, abs_tol=1e-13)
    assert_equal([gradients[index] for index in range(number)], logprobs)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("roles", [(Role.ROLLOUT,), (Role.DEMONSTRATION,)], ids=["all RL", "all SFT"])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_batches_of_one_kind_one_row_or_none_are_finite(name: str, roles: tuple, number: int) -> None:
    rows = [replace(row, weight=1.0) for row in make_rows(7, number, roles)]
    loss, logprobs, _ = evaluated(build(AlgorithmConfig(name=name), LENGTH), rows)
    assert math.isfinite(loss.total.item())
    assert all(math.isfinite(slope) for row in logprobs for slope in row)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_of_weight_zero_have_a_gradient_of_exactly_zero(name: str) -> None:
    rows = [replace(row, weight=0.0) for row in make_rows(1, 6)]
    config = AlgorithmConfig(name=name, entropy=EntropyConfig(coefficient=1.0), kl=kl_of(name, 1.0))
    tokens = flatten(rows, reference=True)
    unified_loss(build(config, LENGTH), tokens, counts(rows)).total.backward()
    assert torch.count_nonzero(tokens.logprobs.grad) == 0
    assert torch.count_nonzero(tokens.entropy.grad) == 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_overflowing_ratio_outside_the_term_does_not_poison_the_gradient(name: str) -> None:
    rows = [
        replace(row, role=Role.DEMONSTRATION, weight=1.0, logprobs=[-1e-3] * row.length, old=[-1e9] * row.length)
        for row in make_rows(3, 4)
    ]
    tokens = flatten(rows, torch.float32)
    loss = unified_loss(build(AlgorithmConfig(name=name), LENGTH), tokens, counts(rows)).total
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(tokens.logprobs.grad).all()


def one_row(**changes) -> HandRow:
    row = HandRow(Role.ROLLOUT, 1.0, 1.0, [-0.5, -1.0], [-1.5, -1.0], [0.0, 0.0], [0.0, 0.0])
    return replace(row, **changes)


def test_masked_tokens_are_counted() -> None:
    loss, _, _ = evaluated(build(AlgorithmConfig(name="grpo"), LENGTH), [one_row()])
    assert loss.parts["masked"] == 1


@pytest.mark.parametrize(("ratio", "slope"), [(1.1, -1.1), (2.9, -2.9), (3.1, 0.0), (0.7, 0.0)])
def test_dual_clip_bounds_what_a_bad_token_can_cost(ratio: float, slope: float) -> None:
    config = AlgorithmConfig(name="ppo", clip=ClipConfig(dual=3.0))
    row = one_row(advantage=-1.0, logprobs=[math.log(ratio)], old=[0.0], entropy=[0.0], reference=[0.0])
    loss, logprobs, _ = evaluated(build(config, LENGTH), [row])
    assert loss.total.item() == pytest.approx(min(3.0, max(ratio, 0.8)))
    assert logprobs[0][0] == pytest.approx(-slope)


def weights_of(correction: str, level: str, row: HandRow) -> list[float]:
    """Token weights from the definitions, with bounds 0.5 and 2."""
    ratios = [math.exp(x - y) for x, y in zip(row.logprobs, row.old, strict=True)]
    if level == "sequence":
        ratios = [math.prod(ratios) ** (1 / row.length)] * row.length
    rules = {
        "tis": lambda w: min(w, 2.0),
        "mis": lambda w: w if w <= 2.0 else 0.0,
        "icepop": lambda w: w if 0.5 <= w <= 2.0 else 0.0,
    }
    return [rules[correction](w) for w in ratios]


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@given(seed=SEEDS, number=NUMBERS)
def test_mismatch_corrections_weigh_rollouts_and_nothing_else(correction: str, level: str, seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    plain = AlgorithmConfig(name="hpt", balance="components")
    config = plain.model_copy(update={"mismatch": MismatchConfig(correction=correction, level=level)})
    loss, logprobs, _ = evaluated(build(config, LENGTH), rows)
    _, uncorrected, _ = evaluated(build(plain, LENGTH), rows)
    rollouts = max(1, sum(row.role is Role.ROLLOUT and row.weight != 0 for row in rows))
    dropped = 0
    for index, row in enumerate(rows):
        if row.role is not Role.ROLLOUT:
            assert logprobs[index] == uncorrected[index]
            continue
        weights = weights_of(correction, level, row)
        dropped += sum(w == 0 for w in weights) * (row.weight != 0)
        expected = [-row.weight * row.advantage * w / (rollouts * LENGTH) for w in weights]
        assert logprobs[index] == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert loss.parts["dropped"] == dropped


@pytest.mark.parametrize("name", ALGORITHMS)
@given(seed=SEEDS, number=NUMBERS)
def test_the_trainers_old_policy_takes_the_engines_place_in_every_ratio(name: str, seed: int, number: int) -> None:
    rows = make_rows(seed, number)
    tokens = flatten(rows, reference=True)
    tokens = replace(tokens, old_logprobs=tokens.reference_logprobs, reference_logprobs=None)
    loss = unified_loss(build(AlgorithmConfig(name=name), LENGTH), tokens, counts(rows))
    loss.total.backward()
    expected = by_hand(name, [replace(row, old=row.reference) for row in rows])
    assert loss.total.item() == pytest.approx(expected.loss, rel=1e-12, abs=1e-13)
    assert_equal(unflatten(tokens.logprobs.grad, rows), expected.logprobs)


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@given(seed=SEEDS, number=NUMBERS)
def test_a_correction_bridges_the_trainers_old_policy_and_the_engine(
    correction: str, level: str, seed: int, number: int
) -> None:
    """Decoupled PPO: the clipped ratio is π_θ/π_θold of the trainer, the weight π_θold/π of the engine."""
    rows = make_rows(seed, number)
    config = AlgorithmConfig(name="dr_grpo", mismatch=MismatchConfig(correction=correction, level=level))
    tokens = flatten(rows, reference=True)
    tokens = replace(tokens, old_logprobs=tokens.reference_logprobs, reference_logprobs=None)
    unified_loss(build(config, LENGTH), tokens, counts(rows)).total.backward()
    clipped = by_hand("dr_grpo", [replace(row, old=row.reference) for row in rows]).logprobs
    for row, found, slopes in zip(rows, unflatten(tokens.logprobs.grad, rows), clipped, strict=True):
        weights = [0.0] * row.length
        if row.role is Role.ROLLOUT:
            weights = weights_of(correction, level, replace(row, logprobs=row.reference))
        assert found == pytest.approx([w * slope for w, slope in zip(weights, slopes, strict=True)], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
def test_a_token_that_the_engine_thought_impossible_is_dropped_not_a_nan(correction: str) -> None:
    config = AlgorithmConfig(name="hpt", mismatch=MismatchConfig(correction=correction))
    rows = [one_row(logprobs=[-0.1, -1.0], old=[-100.0, -1.0])]
    tokens = flatten(rows, torch.float32)
    loss = unified_loss(build(config, LENGTH), tokens, counts(rows))
    loss.total.backward()
    assert torch.isfinite(tokens.logprobs.grad).all()
    assert loss.parts["dropped"] == (0 if correction == "tis" else 1)


def test_the_adaptive_coefficient_sees_the_entropy_of_the_bonus() -> None:
    rows = [replace(row, weight=1.0) for row in make_rows(11, 6)]
    rollouts = [x for row in rows if row.role is Role.ROLLOUT for x in row.entropy]
    config = AlgorithmConfig(name="hpt", entropy=EntropyConfig(coefficient=0.1, demonstrations=False))
    loss, _, _ = evaluated(build(config, LENGTH), rows)
    everything = [x for row in rows for x in row.entropy]
    assert loss.parts["bonus_entropy"].item() == pytest.approx(sum(rollouts) / len(rollouts))
    assert loss.parts["entropy"].item() == pytest.approx(sum(everything) / len(everything))


def test_entropy_weights_pass_no_gradient_to_the_entropy() -> None:
    _, _, entropy = evaluated(build(AlgorithmConfig(name="srft"), LENGTH), make_rows(5, 6))
    assert not any(slope for row in entropy for slope in row)


def test_a_term_that_cannot_be_is_refused() -> None:
    rollouts = frozenset({Role.ROLLOUT})
    with pytest.raises(ConfigError, match="leaves nothing to shape"):
        Term("x", rollouts, Current(), a.One(), TokenMean(), shaping=Saturating(0.1))
    terms = tuple(Term(name, rollouts, Old(), a.Return(), TokenMean()) for name in "ab")
    with pytest.raises(ConfigError, match="more than one term estimates advantages of rollout rows"):
        Algorithm(terms, AlwaysRollouts())
    with pytest.raises(ConfigError, match="different names"):
        Algorithm((terms[0], terms[0]), AlwaysRollouts())
