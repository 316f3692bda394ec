"""The rules of layouts beside Megatron-Core itself: its groups, its configuration and its layers, on a process group that
sends nothing."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_hpt.actor import parallel, platform
from megatron_hpt.actor.model import policy
from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.layout import check_layout


@pytest.fixture(scope="module")
def host() -> Iterator[platform.Platform]:
    create = parallel_state.create_group

    def silent(*arguments, backend: str | None = None, **options) -> dist.ProcessGroup:
        return create(*arguments, backend="fake", **options)  # some groups are gloo's, which would wait for the other ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "create_group", silent)
        yield platform.Platform(platform.detect(1).device, "fake")


def shape(layers: int, kv: int, group: int, ffn: int, experts: int) -> ModelShape:
    sizes = {"hidden": 16 * kv * group, "heads": kv * group, "kv_heads": kv, "head_dim": 16, "ffn": ffn, "vocab": 64}
    rest = {"tied_embeddings": False, "rope_theta": 1e4, "norm_eps": 1e-5, "max_positions": 64}
    routed = {"experts": experts, "experts_per_token": 2 if experts else 0}
    return ModelShape(family="mixtral" if experts else "llama", layers=layers, **sizes, **rest, **routed)


SHAPES = st.builds(
    shape,
    st.sampled_from((2, 4, 6, 12)),
    st.sampled_from((1, 2, 4, 6)),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((48, 60, 64, 96)),
    st.sampled_from((0, 0, 4, 6)),
)
SIZES = st.sampled_from((1, 1, 1, 2, 2, 3, 4))
LAYOUTS = st.builds(
    lambda tensor, pipeline, virtual, context, data, expert, expert_tensor: ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        data=data,
        sequence=tensor > 1,
        expert=expert,
        expert_tensor=expert_tensor,
    ),
    *(SIZES for _ in range(3)),
    st.sampled_from((1, 2)),
    SIZES,
    SIZES,
    st.sampled_from((None, 1, 2)),
)


def megatron_accepts(config: Config, of: ModelShape, host: platform.Platform) -> bool:
    """Its groups can be formed and every stage's chunks built."""
    layout = config.parallel
    os.environ["WORLD_SIZE"] = str(layout.ranks)
    stage = layout.ranks // layout.pipeline
    if dist.is_initialized():  # another module's group of one
        dist.destroy_process_group()
    try:
        for rank in range(0, layout.ranks, stage):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
            try:
                ranks = parallel.initialize_groups(layout, 0)
                policy.build(of, policy.transformer_config(of, config, host), ranks, host)
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    except (AssertionError, ValueError, RuntimeError):
        return False
    return True


@pytest.mark.slow
@settings(max_examples=300)
@given(of=SHAPES, layout=LAYOUTS)
def test_what_is_accepted_is_what_megatron_accepts(of: ModelShape, layout: ParallelConfig, host: platform.Platform) -> None:
    if not of.experts:
        layout = layout.model_copy(update={"expert": 1, "expert_tensor": None})
    config = Config(name="x", model=ModelConfig(path="x"), data=DataConfig(train="x"), parallel=layout)
    try:
        check_layout(config, of)
        ours = True
    except ConfigError:
        ours = False
    assert ours == megatron_accepts(config, of, host)
