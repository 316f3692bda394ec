"""What rests in host memory, and how torch rounds pinned memory."""

import pytest

from megatron_hpt.config import ActorConfig, Config, DataConfig, KlConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.published import PUBLISHED
from megatron_hpt.plan import host_memory
from megatron_hpt.plan.host_memory import host_bytes, pinned, resting_bytes
from megatron_hpt.plan.memory import optimizer_bytes, trainer_memory

MIB = 2**20


def recipe(parallel: ParallelConfig, offload: str, **sections) -> Config:
    model = ModelConfig(path="x", dtype="bfloat16")
    actor = ActorConfig(offload=offload)
    return Config(name="x", model=model, data=DataConfig(train="x"), parallel=parallel, actor=actor, **sections)


def test_pinned_memory_is_rounded_up_piece_by_piece() -> None:
    assert pinned(0) == 0
    assert pinned(1) == 1
    assert pinned(3 * MIB) == 3 * MIB
    assert pinned(3 * MIB + 2**18 + 1) == 3 * MIB + 2**19
    assert pinned(256 * MIB) == 256 * MIB
    assert pinned(257 * MIB) == 257 * MIB
    # In one piece torch took 2.15 GB for these 1.10 GB.
    assert 1.10e9 < pinned(1.10e9) < 1.10e9 + MIB


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Llama-3.1-70B", {"tensor": 8, "sequence": True, "pipeline": 4, "data": 3}),
        ("Qwen2.5-Math-1.5B", {"data": 2, "context": 2}),
        ("Qwen3-30B-A3B", {"data": 8, "expert": 8}),
        ("Qwen3-30B-A3B", {"tensor": 2, "sequence": True, "data": 8, "expert": 4, "pipeline": 2}),
        ("Qwen3-30B-A3B", {"tensor": 2, "sequence": True, "data": 8, "expert": 4, "expert_tensor": 1}),
    ],
    ids=str,
)
def test_all_optimizer_state_is_counted_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch, name: str, layout: dict) -> None:
    shape, parallel = model_shape(PUBLISHED / name), ParallelConfig(**layout)
    config = recipe(parallel, "optimizer")
    for stage in range(parallel.pipeline):
        state = optimizer_bytes(shape, config, stage)
        assert resting_bytes(shape, config, stage) == pytest.approx(state, rel=2e-3)
        with monkeypatch.context() as patched:
            patched.setattr(host_memory, "pinned", lambda nbytes: nbytes)
            # Norms, biases and routers are left out.
            assert resting_bytes(shape, config, stage) == pytest.approx(state, rel=2e-3)


def test_weights_that_rest_take_host_memory_and_gradients_none() -> None:
    shape, parallel = model_shape(PUBLISHED / "Qwen2.5-Math-7B"), ParallelConfig(data=4)
    kl = {"algorithm": {"kl": KlConfig(coefficient=0.1)}}
    none, optimizer, everything, reference = (
        host_bytes(shape, recipe(parallel, kind, **sections), 0)
        for kind, sections in (("none", {}), ("optimizer", {}), ("all", {}), ("all", kl))
    )
    weights = trainer_memory(shape, recipe(parallel, "all"), 0, 1).weights
    assert optimizer > none
    assert everything - optimizer == pytest.approx(weights, rel=0.02)
    assert reference - everything == pytest.approx(weights, rel=0.02)
