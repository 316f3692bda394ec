"""The runs of arXiv 2509.04419 and of its baselines: what their scripts share, what each sets, where each may run.

The numbers are those of the reference code's scripts (train.sh, train_llama.sh, train_luffy.sh, train_srft.sh) and of the
defaults that they leave standing. `recipes/` has one file a model family; docs/recipes.md the results that they aim at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_hpt.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    DeadlinesConfig,
    EntropyConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
    TransferConfig,
)
from megatron_hpt.errors import ConfigError

Method = Literal["hpt", "hpt_reference", "grpo", "sft", "sft_grpo", "luffy", "srft"]
LayoutName = Literal["one_gpu", "one_node", "cluster"]
PROBLEMS = 46_000
"""Rows of Openr1-Math-46k-8192, roughly."""
REFERENCE_TOKENS = 32_768
"""Of a micro-batch in the paper's runs, on which the loss of hpt_reference depends."""


@dataclass(frozen=True)
class Layout:
    """Trainer ranks and engines."""

    parallel: ParallelConfig
    servers: int
    engine_tensor: int = 1
    shared: bool = True
    """Engines run on the trainer's GPUs and have their memory in turn; else on their own, reached by messages."""
    engine_share: float = 0.85
    """Of a GPU's memory, for an engine (megatron-hpt plan says how much fits beside a trainer)."""
    micro_batch_tokens: int = REFERENCE_TOKENS
    recompute: Literal["none", "full"] = "full"
    offload: Literal["none", "optimizer"] = "none"
    """Of the optimizer's state, where engines have GPUs of their own."""
    max_running: int = 256
    """Sequences of an engine at a time (`rollout.max_running`)."""
    max_lag: int = 0
    """Batches that engines work ahead (`rollout.max_lag`)."""


@dataclass(frozen=True)
class Model:
    """A model and what the paper chose for it."""

    name: str
    layouts: Mapping[LayoutName, Layout]
    """The first one is the default."""
    threshold: int
    """Of the gate: correct answers of 8 up to which a demonstration teaches."""
    demonstration_coefficient: float = 1.0
    skip_above: float | None = None
    """HPT's steps with a larger gradient norm are not taken."""
    overrides: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    is_papers: bool = False
    """The paper has runs of it: hpt_reference is computed with its micro-batches."""


@dataclass(frozen=True)
class Run:
    """What a method sets."""

    algorithm: AlgorithmConfig
    lr: float
    steps: int = 500
    prompts: int = 128
    warmup_steps: int = 0
    skip_above: float | None = None
    reward: str = "math"


_ENTROPY = EntropyConfig(coefficient=1e-3)


def _hybrid(name: Method) -> Callable[[Model], Run]:
    """train.sh and train_llama.sh."""

    def run(model: Model) -> Run:
        gate = GateConfig(threshold=model.threshold)
        coefficient = model.demonstration_coefficient
        algorithm = AlgorithmConfig(name=name, gate=gate, demonstration_coefficient=coefficient, entropy=_ENTROPY)
        reward = "math_reference" if name == "hpt_reference" else "math"
        return Run(algorithm, lr=5e-6, skip_above=model.skip_above, reward=reward)

    return run


def _baseline(name: Method, lr: float) -> Callable[[Model], Run]:
    """train_luffy.sh, train_srft.sh; GRPO, which has no script, with the rate of HPT."""
    return lambda _: Run(AlgorithmConfig(name=name, entropy=_ENTROPY), lr)


def _sft(_: Model) -> Run:
    """LUFFY's SFT baseline: three epochs in batches of 64, a tenth of them warm-up. It has no rollouts."""
    steps = 3 * PROBLEMS // 64
    return Run(AlgorithmConfig(name="sft"), lr=5e-5, steps=steps, prompts=64, warmup_steps=steps // 10)


def _sft_grpo(_: Model) -> Run:
    """Three epochs of SFT, then GRPO for as long as the others. Both phases have one rate: that of HPT."""
    first = 3 * PROBLEMS // 128
    entropy = EntropyConfig(coefficient=1e-3, demonstrations=False)  # the first phase is plain SFT
    return Run(AlgorithmConfig(name="sft_grpo", sft_steps=first, entropy=entropy), lr=5e-6, steps=first + 500)


_METHODS: dict[Method, Callable[[Model], Run]] = {
    "hpt": _hybrid("hpt"),
    "hpt_reference": _hybrid("hpt_reference"),
    "grpo": _baseline("grpo", 5e-6),
    "sft": _sft,
    "sft_grpo": _sft_grpo,
    "luffy": _baseline("luffy", 1e-6),
    "srft": _baseline("srft", 1e-6),
}


def config(model: Model, method: Method, layout: LayoutName | None) -> Config:
    """One run of one model.

    Args:
        layout: None: the model's first one.

    Raises:
        ConfigError: the model has no such layout: it does not fit there, or nothing is gained.
    """
    layout = layout or next(iter(model.layouts))
    if layout not in model.layouts:
        raise ConfigError(f"layout: given {layout!r}; {model.name} has {', '.join(model.layouts)}")
    run, place = _METHODS[method](model), model.layouts[layout]
    if method == "hpt_reference" and model.is_papers:
        place = replace(place, micro_batch_tokens=REFERENCE_TOKENS, recompute="full")
    return Config(
        name=f"{model.name}-{method}-{layout}",
        model=ModelConfig(path=f"models/{model.name}", dtype="bfloat16", overrides=model.overrides),
        data=DataConfig(
            train="data/openr1.parquet",
            max_prompt_length=1024,
            max_response_length=8192,
            chat_template=model.chat_template,
        ),
        algorithm=run.algorithm,
        reward=RewardConfig(name=run.reward, workers=8),
        rollout=RolloutConfig(
            samples_per_prompt=8,
            servers=place.servers,
            tensor_parallel=place.engine_tensor,
            gpu_memory_share=place.engine_share,
            sleep=place.shared,
            max_running=place.max_running,
            max_lag=place.max_lag,
        ),
        transfer=TransferConfig(transport="cuda_ipc" if place.shared else "nccl"),
        parallel=place.parallel,
        actor=ActorConfig(
            micro_batch_tokens=place.micro_batch_tokens,
            recompute=place.recompute,
            offload="all" if place.shared else place.offload,
        ),
        optimizer=OptimizerConfig(
            lr=run.lr,
            warmup_steps=run.warmup_steps,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            clip_grad=1.0,
            skip_above=run.skip_above,
        ),
        evaluation=EvaluationConfig(
            sets={name: f"data/{name}.parquet" for name in ("aime24", "amc23", "math500")},
            every=10,
            samples=8,
            temperature=0.6,
            top_p=0.95,
        ),
        trainer=TrainerConfig(steps=run.steps, prompts_per_step=run.prompts, save_every=50),
        deadlines=DeadlinesConfig(startup_s=1800),
    )
