"""What overlaps leave visible, what fusions save, and which of them the actor has."""

from dataclasses import fields, replace

import pytest

from megatron_hpt.config import ActorConfig, Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.models.published import PUBLISHED
from megatron_hpt.plan.assumptions import DEFAULT_CLUSTER
from megatron_hpt.plan.cluster import load_cluster
from megatron_hpt.plan.flags import OVERLAPS, Flags, Load, flags_of, visible
from megatron_hpt.plan.peaks import KERNEL_S
from megatron_hpt.plan.plan import make
from megatron_hpt.plan.rollouts.lengths import of_fill
from megatron_hpt.plan.timing import EXPERT_KERNELS, Pass, StepSize, StepTime, micro_batch_s, train_s

CLUSTER = load_cluster(DEFAULT_CLUSTER)
LLAMA_70B = model_shape(PUBLISHED / "Llama-3.1-70B")
QWEN_30B = model_shape(PUBLISHED / "Qwen3-30B-A3B")
COMPUTED = {"products": 6.0, "experts": 0.0, "attention": 2.0, "elementwise": 1.0}


def recipe(parallel: ParallelConfig, dtype: str = "bfloat16", **actor) -> Config:
    data = DataConfig(train="x", max_prompt_length=1024, max_response_length=7168)
    return Config(name="x", model=ModelConfig(path="x", dtype=dtype), data=data, parallel=parallel, actor=ActorConfig(**actor))


def load(forwards: int = 1, micro_batches: int = 64, held: int = 400_000_000, **parallel) -> Load:
    return Load(ParallelConfig(**parallel), forwards, micro_batches, held)


def one(shape: ModelShape, config: Config, flags: Flags, tokens: float = 8192) -> Pass:
    return micro_batch_s(shape, config, CLUSTER, flags, 64, tokens, 4096)


def test_the_table_speaks_of_flags_and_of_parts_that_exist() -> None:
    names = {field.name for field in (*fields(Pass), *fields(StepTime))}
    for overlap in OVERLAPS:
        assert overlap.part in names & {field.name for field in fields(Flags)}
        assert set(overlap.behind) <= set(COMPUTED) <= {field.name for field in fields(Pass)}
    assert len({overlap.part for overlap in OVERLAPS}) == len(OVERLAPS)
    assert not any(getattr(replace(Flags(), reduce=True, tensor=True).without_overlaps(), o.part) for o in OVERLAPS)


@pytest.mark.parametrize(
    ("part", "given", "tail", "cover"),
    [
        # Two reduce-scatters of the forward pass, a quarter of each, of ten messages; behind all products.
        ("tensor", load(tensor=4, sequence=True), 0.05, 6.0),
        ("tensor", load(forwards=2, tensor=4, sequence=True), 1 / 14, 6.0),
        ("context", load(context=4), 0.0, 1.5),
        ("pipeline", load(pipeline=8, virtual_pipeline=5), 32 / 320, 9.0),
        ("expert", load(pipeline=8, virtual_pipeline=4, expert=8, data=8), 24 / 256, 9.0),
        ("reduce", load(data=8), 0.1, 6.0),
        ("reduce", load(data=8, forwards=2), 0.1, 4.5),
        ("reduce", load(data=80, held=800_000_000), 0.1, 6.0),
        ("reduce", load(data=2, pipeline=4, virtual_pipeline=5), 0.2, 6.0),
        ("gather", load(data=8), 0.1, 3.0),
        ("reduce", load(data=8, held=1000), 1.0, 6.0),
    ],
)
def test_what_is_seen_of_a_communication(part: str, given: Load, tail: float, cover: float) -> None:
    on = Flags(**{part: True})
    assert visible(part, 1.0, COMPUTED, on, given) == pytest.approx(tail)
    assert visible(part, 100.0, COMPUTED, on, given) == pytest.approx(max(100 * tail, 100 - cover))
    assert visible(part, 1.0, COMPUTED, Flags(), given) == 1.0


def test_the_actor_hides_gradients_and_pipelines_and_not_what_it_cannot() -> None:
    config = recipe(ParallelConfig(tensor=8, sequence=True, pipeline=2, virtual_pipeline=5, data=2))
    flags = flags_of(config)
    assert flags.reduce
    assert flags.pipeline
    assert not (flags.tensor)
    assert not (flags.gather)
    assert not (flags.expert)
    batch = StepSize(128, 4096, 32, 8192, 4096)
    mine, plain = (train_s(LLAMA_70B, config, CLUSTER, these, batch) for these in (flags, flags.without_overlaps()))
    assert mine.reduce < plain.reduce / 2
    assert mine.gather == plain.gather > 0
    assert mine.passes < plain.passes
    assert flags_of(recipe(ParallelConfig(data=2), dtype="float32")) == Flags()
    assert not flags_of(recipe(ParallelConfig())).reduce


@pytest.mark.parametrize("flag", ["hopper_attention", "activation", "rope", "gradients", "grouped", "permute"])
def test_a_fusion_saves_time(flag: str) -> None:
    config = recipe(ParallelConfig(data=8, expert=8))
    on = replace(flags_of(config), **{flag: True})
    assert one(QWEN_30B, config, on).total < one(QWEN_30B, config, replace(on, **{flag: False})).total


def test_small_experts_one_after_the_other_wait_for_their_kernels() -> None:
    config = recipe(ParallelConfig())
    flags = flags_of(config)
    apart, grouped = (one(QWEN_30B, config, replace(flags, grouped=kind), tokens=512).experts for kind in (False, True))
    floor = 3 * QWEN_30B.layers * QWEN_30B.experts * EXPERT_KERNELS * KERNEL_S
    assert floor <= apart < 1.05 * floor
    assert grouped < apart / 2
    # Each expert gets 32 tokens, which fill a tile of 128 rows no less than 128 do.
    assert one(QWEN_30B, config, flags, tokens=2048).experts == pytest.approx(grouped)
    assert one(QWEN_30B, config, flags, tokens=65536).experts > 7 * grouped


def test_experts_cost_what_dense_products_do_where_they_are_large() -> None:
    config = recipe(ParallelConfig())
    tokens = 2**20
    experts = one(QWEN_30B, config, flags_of(config), tokens).experts
    weights = QWEN_30B.layers * QWEN_30B.experts_per_token * 3 * QWEN_30B.hidden * QWEN_30B.ffn
    assert experts == pytest.approx(6 * weights * tokens / (0.75 * 989e12), rel=0.02)


def test_a_plan_says_what_runs_beside_computation() -> None:
    config = recipe(ParallelConfig(tensor=8, sequence=True, pipeline=2, virtual_pipeline=5, data=4), recompute="full")
    config.model.path, config.rollout.tensor_parallel = "Llama-3.1-70B", 8
    config.transfer.transport = "nccl"
    plan = make(config, CLUSTER, of_fill(config, 0.5), 0.0)
    assert set(plan.hidden) == {"pipeline", "reduce"}
    plain = train_s(LLAMA_70B, config, CLUSTER, flags_of(config).without_overlaps(), plan.scenarios[0].batch)
    # The bubble waits for the pipeline's messages too, which the sum of the parts leaves out.
    assert plain.total - plan.scenarios[0].training.total >= sum(plan.hidden.values()) > 0
