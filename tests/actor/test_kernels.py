"""Which of Megatron's kernels a run uses: what each needs, what is refused, and that the setting has the table's keys."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from megatron_hpt.actor.model.kernels import KERNELS, Situation, choose, dispatcher
from megatron_hpt.config import KernelFlag
from megatron_hpt.errors import ConfigError

GPU = Situation(
    on_gpus=True,
    engine=Version("2.11"),
    has_apex=False,
    has_deepep=False,
    has_experts=True,
    expert_ranks=4,
    replicas=8,
    pipeline=4,
    virtual_pipeline=1,
)
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "gpu.md"
SITUATIONS = st.builds(
    Situation,
    on_gpus=st.booleans(),
    engine=st.sampled_from([None, Version("1.8"), Version("2.2"), Version("2.11")]),
    has_apex=st.booleans(),
    has_deepep=st.booleans(),
    has_experts=st.booleans(),
    expert_ranks=st.integers(1, 2),
    replicas=st.integers(1, 4),
    pipeline=st.integers(1, 4),
    virtual_pipeline=st.integers(1, 3),
)


def test_setting_table_and_documentation_have_the_same_kernels() -> None:
    assert set(get_args(KernelFlag)) == set(KERNELS)
    rows = re.findall(r"^\| `(\w+)` \| (?:on|off)", DOCUMENTATION.read_text(encoding="utf-8"), flags=re.M)
    assert set(KERNELS) <= set(rows)


def test_everything_that_fits_is_on_with_transformer_engine() -> None:
    assert choose(GPU, {}) == {flag: flag != "overlap_p2p_comm" for flag in KERNELS}
    interleaved = choose(replace(GPU, virtual_pipeline=2), {})
    assert interleaved["overlap_p2p_comm"]
    assert not interleaved["batch_p2p_comm"]  # Megatron refuses both together


def test_a_host_uses_none_and_a_gpu_without_transformer_engine_few() -> None:
    assert not any(choose(replace(GPU, on_gpus=False, engine=None), {}).values())
    plain = replace(GPU, engine=None, has_experts=False, pipeline=1)
    used = {flag for flag, on in choose(plain, {}).items() if on}
    assert used == {"bias_activation_fusion", "bias_dropout_fusion", "overlap_grad_reduce"}
    assert choose(replace(plain, has_apex=True), {})["gradient_accumulation_fusion"]


@pytest.mark.parametrize(
    ("change", "flag", "message"),
    [
        ({"on_gpus": False}, "apply_rope_fusion", "apply_rope_fusion needs a GPU"),
        ({"engine": Version("2.2")}, "apply_rope_fusion", r"layers of Transformer Engine 2\.3 or newer"),
        ({"engine": None}, "gradient_accumulation_fusion", "or NVIDIA Apex"),
        ({"has_experts": False}, "moe_grouped_gemm", "needs a mixture of experts"),
        ({}, "overlap_p2p_comm", "virtual_pipeline above 1"),
        ({"virtual_pipeline": 2}, "batch_p2p_comm", "not interleaved"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict, flag: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(replace(GPU, **change), {flag: True})


@given(SITUATIONS, st.dictionaries(st.sampled_from(sorted(KERNELS)), st.booleans()))
def test_a_setting_is_followed_or_refused(situation: Situation, asked: dict[str, bool]) -> None:
    missing = [flag for flag, on in asked.items() if on and KERNELS[flag].missing(situation)]
    if missing:
        with pytest.raises(ConfigError, match=missing[0]):
            choose(situation, asked)
        return
    used = choose(situation, asked)
    assert asked.items() <= used.items()
    assert not any(on and KERNELS[flag].missing(situation) for flag, on in used.items())


@given(SITUATIONS)
def test_deepep_is_taken_where_it_runs_and_refused_elsewhere(situation: Situation) -> None:
    assert dispatcher(situation, "alltoall") == {"moe_token_dispatcher_type": "alltoall"}
    if situation.on_gpus and situation.has_experts and situation.has_deepep and situation.expert_ranks > 1:
        assert dispatcher(situation, "deepep")["moe_flex_dispatcher_backend"] == "deepep"
        return
    with pytest.raises(ConfigError, match=r"actor\.expert_dispatcher: given 'deepep', which needs"):
        dispatcher(situation, "deepep")
