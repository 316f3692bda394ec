"""When the first batch's mismatch stops a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.actor.guard import MOST, check_first, first_bound
from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, MismatchConfig, ModelConfig, RolloutConfig
from megatron_hpt.errors import HptError


def config(dtype: str = "bfloat16", temperature: float = 1.0, stop_above: float | None = None) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="m", dtype=dtype),
        data=DataConfig(train="t"),
        rollout=RolloutConfig(temperature=temperature),
        algorithm=AlgorithmConfig(mismatch=MismatchConfig(stop_above=stop_above)),
    )


@pytest.mark.parametrize(
    ("dtype", "temperature", "routed", "fp8", "k3"),
    [
        ("float32", 1.0, False, False, 1e-4),
        ("float32", 0.01, False, False, 1e-4),
        ("bfloat16", 1.0, False, False, 1e-2),
        ("bfloat16", 0.6, False, False, 3e-2),
        ("bfloat16", 1.0, True, False, 0.1),
        ("bfloat16", 1.0, False, True, 0.1),
    ],
)
def test_rounding_does_not_stop_a_run(dtype: str, temperature: float, routed: bool, fp8: bool, k3: float) -> None:
    check_first(config(dtype, temperature), routed, fp8, 0, k3)


@pytest.mark.parametrize(
    ("dtype", "routed", "k3"),
    [
        ("float32", False, 0.85),
        ("float32", True, 0.05),
        ("bfloat16", False, 0.85),
        ("bfloat16", True, 5.0),
        ("bfloat16", True, math.nan),
    ],
)
def test_what_no_rounding_explains_stops_it_with_the_reason(dtype: str, routed: bool, k3: float) -> None:
    with pytest.raises(HptError, match=rf"^step 7: mismatch/k3_kl {k3:.3g} of the first batch .* rounding in {dtype}"):
        check_first(config(dtype), routed, False, 7, k3)
    check_first(config(dtype, stop_above=100.0), routed, False, 7, k3)  # the recipe's own bound, which skips steps


@given(st.floats(0.01, 2.0), st.booleans(), st.booleans(), st.sampled_from(("float32", "bfloat16")))
def test_colder_sampling_and_coarser_numbers_allow_more_up_to_a_bound(
    temperature: float, routed: bool, fp8: bool, dtype: str
) -> None:
    warm, cold = (first_bound(config(dtype, t), routed, fp8) for t in (temperature, temperature / 2))
    assert warm <= cold <= MOST
    assert first_bound(config(dtype, temperature), False, False) <= warm
