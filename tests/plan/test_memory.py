"""The arithmetic of memory beside real models: parameters counted, ranks' holdings, and a training step's tensors."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.config import ActorConfig, Config, DataConfig, KlConfig, ModelConfig, ParallelConfig, TransferConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.examples import tiny_families, tiny_llama
from megatron_hpt.models.hf_config import ModelShape, model_shape, shape_of_any
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.models.published import PUBLISHED
from megatron_hpt.overrides import dump_yaml
from megatron_hpt.plan.layout import check_layout
from megatron_hpt.plan.memory import (
    GIB,
    STATE_BYTES,
    EngineMemory,
    engine_memory,
    engine_weights,
    heaviest_stage,
    optimizer_bytes,
    parameters,
    stage_parameters,
    trainer_memory,
)
from megatron_hpt.transfer.layouts import EngineLayout, actor_holdings, engine_holdings
from tests.ranks import run_ranks

WORKER = Path(__file__).parent / "memory_worker.py"
LLAMA_70B = model_shape(PUBLISHED / "Llama-3.1-70B")


def recipe(parallel: ParallelConfig, dtype: str = "bfloat16", **sections) -> Config:
    data = DataConfig(train="x", max_prompt_length=1024, max_response_length=7168)
    return Config(name="x", model=ModelConfig(path="x", dtype=dtype), data=data, parallel=parallel, **sections)


@pytest.mark.parametrize("folder", sorted(PUBLISHED.iterdir()), ids=lambda folder: folder.name)
def test_parameters_are_those_of_the_real_model_on_the_meta_device(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert parameters(shape_of_any(folder)).total == sum(p.numel() for p in model.parameters())


SHAPES = st.builds(
    lambda layers, kv, group, experts, tied, norm, bias: ModelShape(
        **{"family": "qwen3_moe" if experts else "qwen3" if norm else "qwen2" if bias else "llama", "layers": layers},
        **{"hidden": 64, "heads": kv * group, "kv_heads": kv, "head_dim": 16, "ffn": 96, "vocab": 256},
        **{"tied_embeddings": tied, "rope_theta": 1e4, "norm_eps": 1e-5, "max_positions": 64},
        **{"experts": experts, "experts_per_token": 2 if experts else 0},
        **{"qk_norm": norm or bool(experts), "qkv_bias": bias and not norm and not experts},
    ),
    st.sampled_from((2, 4, 8)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from((0, 4)),
    *(st.booleans() for _ in range(3)),
)
LAYOUTS = st.builds(
    lambda tensor, pipeline, context, data, expert, one: ParallelConfig(
        **{"tensor": tensor, "pipeline": pipeline, "context": context, "data": data, "expert": expert},
        **{"sequence": tensor > 1, "expert_tensor": 1 if one else None},
    ),
    *(st.sampled_from((1, 2, 4)) for _ in range(5)),
    st.booleans(),
)


@given(shape=SHAPES, layout=LAYOUTS)
def test_a_rank_holds_what_the_transfers_layouts_say(shape: ModelShape, layout: ParallelConfig) -> None:
    try:
        check_layout(recipe(layout), shape)
    except ConfigError:
        return
    tensors, held = hf_tensor_shapes(shape), Counter()
    for boxes in actor_holdings(tensors, shape, layout).values():
        for box, ranks in boxes:
            held.update(dict.fromkeys(ranks, box.volume))
    width = layout.ranks // layout.pipeline
    for stage in range(layout.pipeline):
        counted = stage_parameters(shape, layout, stage).total
        # Megatron's last stage has a copy of a tied embedding, which exports come from the first without.
        copied = shape.tied_embeddings and layout.pipeline > 1 and stage == layout.pipeline - 1
        copy = shape.vocab * shape.hidden // layout.tensor if copied else 0
        assert {held[rank] + copy for rank in range(stage * width, (stage + 1) * width)} == {counted}


@given(shape=SHAPES, tensor=st.sampled_from((1, 2, 4)))
def test_an_engine_rank_holds_what_the_transfers_layouts_say(shape: ModelShape, tensor: int) -> None:
    try:
        holdings = engine_holdings(hf_tensor_shapes(shape), shape, EngineLayout(tensor))
    except ConfigError:
        return
    held = Counter()
    for boxes in holdings.values():
        for box, ranks in boxes:
            held.update(dict.fromkeys(ranks, box.volume))
    assert max(held.values()) * 2 == pytest.approx(engine_weights(shape, tensor, 2), rel=0.01)


@pytest.mark.parametrize(
    ("layout", "weights", "gradients", "optimizer"),
    [((8, 4, 3), 4.2, 8.5, 8.5), ((8, 4, 2), 4.2, 8.5, 12.7), ((8, 2, 4), 8.2, 16.4, 12.3), ((4, 4, 6), 8.5, 16.9, 8.5)],
)
def test_70b_is_what_was_worked_out_by_hand(
    layout: tuple[int, ...], weights: float, gradients: float, optimizer: float
) -> None:
    tensor, pipeline, data = layout
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, sequence=True)
    _, found = heaviest_stage(LLAMA_70B, recipe(parallel, actor=ActorConfig(recompute="full")), 16)
    got = [round(nbytes / GIB, 1) for nbytes in (found.weights, found.gradients, found.optimizer)]
    assert got == [weights, gradients, optimizer]
    assert found.total < 50 * GIB


def test_what_buys_memory_buys_it() -> None:
    parallel = ParallelConfig(tensor=8, pipeline=4, data=3, sequence=True)

    def peak(**actor) -> float:
        return heaviest_stage(LLAMA_70B, recipe(parallel, actor=ActorConfig(**actor)), 16)[1].total

    assert peak() > peak(offload="optimizer") > peak(offload="optimizer", recompute="full")
    assert peak() > peak(recompute="full")
    kl = heaviest_stage(LLAMA_70B, recipe(parallel, algorithm={"kl": KlConfig(coefficient=0.1)}), 16)[1]
    assert kl.reference == kl.weights


def test_the_triton_kernel_needs_no_float32_gradient_of_the_output_layer() -> None:
    def workspace(**actor) -> float:
        config = recipe(ParallelConfig(tensor=8, pipeline=4, data=3, sequence=True), actor=ActorConfig(**actor))
        return trainer_memory(LLAMA_70B, config, 3, 16).logprob

    layer = 128256 / 8 * 8192
    assert workspace() == pytest.approx(2.5 * 2**28 + 8 * layer)
    states = 4 * 8192 * 8192
    assert workspace(logprob_kernel="triton") == pytest.approx(2**28 + 2 * states + 2 * layer)
    assert workspace(logprob_kernel="triton", micro_batch_tokens=2**15) == pytest.approx(2**28 + 4 * 2**14 * 2**14 + 6 * layer)


def test_early_stages_keep_more_micro_batches_and_few_micro_batches_keep_less() -> None:
    config = recipe(ParallelConfig(tensor=8, pipeline=4, data=3, sequence=True))
    first, second = (trainer_memory(LLAMA_70B, config, stage, 16).activations for stage in (0, 1))
    assert first / second == pytest.approx(4 / 3)
    assert trainer_memory(LLAMA_70B, config, 0, 2).activations == pytest.approx(first / 2)


def test_engines_have_room_in_their_share() -> None:
    def engine(share: float, kind: str = "vllm") -> EngineMemory:
        rollout = {"tensor_parallel": 8, "gpu_memory_share": share, "engine": kind}
        return engine_memory(LLAMA_70B, recipe(ParallelConfig(), rollout=rollout), 2, 80 * GIB)

    assert engine(0.9).token == 40 * 1024  # 2 · 80 layers · one head of 128 · two bytes
    assert engine(0.9).total == pytest.approx(72 * GIB)
    assert engine(0.9).cache - engine(0.5).cache == pytest.approx(32 * GIB)
    assert engine(0.2).tokens == 0
    assert engine(0.9, "sglang").allowance == pytest.approx(7.2 * GIB)
    assert engine(0.9, "sglang").total == pytest.approx(72 * GIB)


def row(prompt_id: int) -> Row:
    return Row(str(prompt_id), 0, Source.DEMONSTRATION, tuple(range(3, 19)), 8, None, None, None, 1.0, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "dtype", "layout"),
    [
        (False, "float32", {"tensor": 2}),
        (False, "float32", {"data": 2}),
        (False, "float32", {"pipeline": 2, "data": 2}),
        (False, "bfloat16", {"data": 2}),
        (True, "float32", {"data": 2, "expert": 2}),
    ],
    ids=str,
)
def test_a_real_rank_holds_what_was_predicted(tmp_path: Path, moe: bool, dtype: str, layout: dict) -> None:
    if moe:
        tiny_families.write(tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=256, num_local_experts=4)
    else:
        tiny_llama.write(tmp_path / "model", hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, positions=64)
    config = recipe(ParallelConfig(**layout), dtype, transfer=TransferConfig(transport="gloo"))
    config.model.path, config.algorithm.name = str(tmp_path / "model"), "sft"
    config.data.max_prompt_length, config.data.max_response_length = 8, 24
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    Ledger(tmp_path / "ledger").write(Batch(0, [row(i) for i in range(4)]))
    arguments = [tmp_path / "config.yaml", tmp_path / "ledger", tmp_path / "out.json"]
    run_ranks(WORKER, *arguments, ranks=config.parallel.ranks)
    shape = model_shape(tmp_path / "model")
    for found in json.loads((tmp_path / "out.json").read_text()):
        expected = trainer_memory(shape, config, found["stage"], 1)
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(expected, name) == pytest.approx(found[name], rel=1e-3), name


def test_optimizer_state_of_experts_is_shared_by_those_that_hold_the_same_ones() -> None:
    shape = model_shape(PUBLISHED / "Qwen3-30B-A3B")
    for layout in (
        {"data": 8, "expert": 8},
        {"data": 16, "expert": 8},
        {"tensor": 2, "sequence": True, "data": 8, "expert": 4},
    ):
        config = recipe(ParallelConfig(**layout))
        total = optimizer_bytes(shape, config, 0) * config.parallel.ranks
        copied = config.parallel.tensor > 1  # norms and routers are on every tensor parallel rank
        assert total == pytest.approx(parameters(shape).total * STATE_BYTES["bfloat16"], rel=0.01 if copied else 1e-9)
    assert math.isclose(parameters(shape).total / 1e9, 30.5, rel_tol=0.01)
