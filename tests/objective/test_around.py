"""KL estimators, the adaptive entropy coefficient, the critic's loss, and a row of one's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    EntropyConfig,
    GateConfig,
    KlConfig,
    MismatchConfig,
    ModelConfig,
)
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.algorithms import ALGORITHMS, build, without_effect
from megatron_hpt.objective.kl import K1, K2, K3, EntropyBonus
from megatron_hpt.objective.reference_code import Logarithm, PlusLogarithm, Power
from megatron_hpt.objective.shaping import Identity, Saturating, Uncertain
from megatron_hpt.objective.value import value_loss
from megatron_hpt.overrides import apply_overrides

LOG_RATIOS = st.lists(st.floats(-3, 3), min_size=1, max_size=8)


def with_slope(function, values: list[float]) -> tuple[list[float], list[float]]:
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    y = function(x)
    y.sum().backward()
    return y.tolist(), x.grad.tolist()


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        (K1(), lambda d: d, lambda d: 1.0),
        (K2(), lambda d: d * d / 2, lambda d: d),
        (K3(), lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
    ids=["k1", "k2", "k3"],
)
@given(ratios=LOG_RATIOS)
def test_kl_estimators(estimator, value, slope, ratios: list[float]) -> None:
    values, slopes = with_slope(estimator, ratios)
    assert values == pytest.approx([value(d) for d in ratios], rel=1e-12, abs=1e-14)
    assert slopes == pytest.approx([slope(d) for d in ratios], rel=1e-12, abs=1e-14)


def test_the_estimators_agree_on_the_true_divergence() -> None:
    """k1 and k3 have the KL as their mean under the policy; k2 nearly, for close policies."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    d = (p / q).log()
    true = (p * d).sum().item()
    means = {type(k).__name__: (p * k(d)).sum().item() for k in (K1(), K2(), K3())}
    assert means["K1"] == pytest.approx(true)
    assert means["K3"] == pytest.approx(true)
    assert means["K2"] == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize(
    ("shaping", "value", "slope"),
    [
        (Identity(), lambda x: x, lambda x: 1.0),
        (Saturating(0.1), lambda x: x / (x + 0.1), lambda x: 0.1 / (x + 0.1) ** 2),
        (Logarithm(0.5), lambda x: 0.5 * math.log(x), lambda x: 0.5 / x),
        (PlusLogarithm(0.5), lambda x: x + 0.5 * math.log(x), lambda x: 1 + 0.5 / x),
        (Power(0.3), lambda x: x**0.3, lambda x: 0.3 * x**-0.7),
        (Uncertain(), lambda x: x - x * x / 2, lambda x: 1 - x),
    ],
    ids=lambda s: getattr(s, "formula", None),
)
@given(ratios=LOG_RATIOS)
def test_shapings_and_their_derivatives(shaping, value, slope, ratios: list[float]) -> None:
    values, slopes = with_slope(shaping, ratios)
    xs = [math.exp(r) for r in ratios]
    assert values == pytest.approx([value(x) for x in xs], rel=1e-10)
    assert slopes == pytest.approx([slope(x) * x for x in xs], rel=1e-10, abs=1e-12)


def test_no_shaping_underflows_on_an_impossible_token() -> None:
    for shaping in (Identity(), Saturating(0.1), Power(0.5), Uncertain()):
        values, slopes = with_slope(shaping, [-2000.0])
        assert values == pytest.approx([0.0])
        assert slopes == pytest.approx([0.0])


@given(coefficient=st.floats(1e-6, 1), entropy=st.floats(0, 5), target=st.floats(0.1, 5))
def test_an_adaptive_coefficient_steers_to_its_target(coefficient: float, entropy: float, target: float) -> None:
    after = EntropyBonus(coefficient, target=target, rate=0.1).next_coefficient(coefficient, entropy)
    assert after > 0
    assert (after > coefficient) == (entropy < target) or after == pytest.approx(coefficient)


def test_a_fixed_coefficient_stays() -> None:
    assert EntropyBonus(0.25).next_coefficient(0.25, 99.0) == 0.25
    with pytest.raises(ConfigError, match="an adaptive coefficient starts from"):
        build(AlgorithmConfig(entropy=EntropyConfig(target=1.0)), 8)


def test_the_critics_loss() -> None:
    values, old, returns = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.0], [0.0, 0.0], [2.0, 0.5]))
    loss = value_loss(values, old, returns, 0.2)
    assert loss.total.item() == pytest.approx(((2 - 0.2) ** 2 + 0.5**2) / 2)
    assert loss.clipped == 1


OWN = '''
from dataclasses import replace

from megatron_hpt.objective.algorithms import Settings, hpt, luffy
from megatron_hpt.objective.advantage import Sign
from megatron_hpt.objective.correction import IcePop
from megatron_hpt.objective.kl import EntropyBonus


def mine(s: Settings):
    """HPT with Â = ±1."""
    base = hpt(s)
    return replace(base, terms=(replace(base.terms[0], advantage=Sign()), *base.terms[1:]))


def nothing(s: Settings):
    return None


def opinionated(s: Settings):
    base = hpt(s)
    terms = (replace(base.terms[0], correction=IcePop(2.0, low=0.5)), *base.terms[1:])
    return replace(base, terms=terms, entropy=EntropyBonus(0.01))


def bandless(s: Settings):
    base = hpt(s)
    return replace(base, terms=base.terms[:2])


def mixed(s: Settings):
    base = luffy(s)
    return replace(base, terms=(replace(base.terms[0], roles=base.terms[0].counted),))
'''


def test_an_algorithm_of_ones_own_is_one_function(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_algorithm.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    algorithm = build(AlgorithmConfig(name="own_algorithm:mine", demonstration_coefficient=0.3), 8)
    assert algorithm.terms[0].advantage.formula == "+1 if R > 0 else -1"
    assert algorithm.terms[1].coefficient == 0.3
    with pytest.raises(ConfigError, match=r"own_algorithm:nothing returned NoneType; expected an Algorithm"):
        build(AlgorithmConfig(name="own_algorithm:nothing"), 8)
    with pytest.raises(ConfigError, match=r"algorithm\.name: 'own_algorithm:none' cannot be imported"):
        build(AlgorithmConfig(name="own_algorithm:none"), 8)
    own = build(AlgorithmConfig(name="own_algorithm:opinionated"), 8)
    assert own.entropy.coefficient == 0.01  # the recipe says nothing of it
    assert "icepop" in own.terms[0].correction.formula
    own = build(AlgorithmConfig(name="own_algorithm:opinionated", entropy=EntropyConfig(coefficient=0.5)), 8)
    assert own.entropy.coefficient == 0.5
    with pytest.raises(ConfigError, match="may choose off_policy rows, and no term trains them"):
        build(AlgorithmConfig(name="own_algorithm:bandless", gate=GateConfig(off_policy_threshold=3)), 8)
    with pytest.raises(ConfigError, match="term rollouts mixes rollouts with other rows"):
        build(AlgorithmConfig(name="own_algorithm:mixed", mismatch=MismatchConfig(correction="tis")), 8)
    (tmp_path / "broken_algorithm.py").write_text("def mine(:")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        build(AlgorithmConfig(name="broken_algorithm:mine"), 8)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        (["name=hpt", "clip.low=0.3"], ["clip.low"]),  # HPT runs without its paper's clip
        (["name=grpo", "clip.low=0.3"], []),
        (["name=grpo", "gate.threshold=2"], ["gate.threshold"]),
        (["name=luffy", "gate.missing_demonstration=skip"], []),
        (["gate.soft=true", "gate.threshold=3", "gate.rollout_schedule=[0, 1, 1]"], ["gate.threshold"]),
        (["mismatch.correction=tis", "mismatch.low=0.1", "mismatch.high=3"], ["mismatch.low"]),
        (["kl.reference=somewhere"], ["kl.reference"]),
        (["kl.reference=somewhere", "kl.coefficient=0.1"], []),
        (["max_rounds=9"], ["max_rounds"]),
        (["name=dapo", "max_rounds=9", "overlong.buffer=2"], []),
        (["gate.by_source.olympiad.threshold=4"], []),
        (["name=hpt", "old_policy=trainer"], []),
        (["name=sft", "old_policy=trainer"], ["old_policy"]),
        (["name=rloo", "old_policy=trainer"], ["old_policy"]),  # no ratio
        (["name=rloo", "old_policy=trainer", "mismatch.correction=tis"], []),
    ],
)
def test_settings_that_change_nothing_are_found(settings: list[str], idle: list[str]) -> None:
    base = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"))
    config = apply_overrides(base, [f"algorithm.{setting}" for setting in settings])
    assert without_effect(config) == [f"algorithm.{key}" for key in idle]


def test_a_kl_needs_rollouts() -> None:
    with pytest.raises(ConfigError, match="sft has no rollouts to measure it on"):
        build(AlgorithmConfig(name="sft", kl=KlConfig(coefficient=0.1)), 8)


def test_an_unknown_algorithm_is_refused_with_the_table() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.name: given 'hptt'; allowed: sft, .*; did you mean 'hpt'"):
        build(AlgorithmConfig(name="hptt"), 8)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_lengths_and_coefficients_come_from_the_recipe(name: str) -> None:
    """No number of the paper stands in the code: two lengths give two records wherever a constant length is used."""
    short, long = build(AlgorithmConfig(name=name), 8), build(AlgorithmConfig(name=name, constant_length=9000), 8)
    constants = [t.aggregation for t in short.terms if "8" in t.aggregation.formula]
    assert (short != long) == bool(constants)
