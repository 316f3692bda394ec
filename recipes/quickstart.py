"""A Llama from random weights learns sums with HPT: SFT hands over to RL within minutes on two CPU cores.

make train
megatron-hpt train recipes/quickstart.py trainer.steps=20
"""

from pathlib import Path

from megatron_hpt.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_hpt.examples import arithmetic, tiny_llama

INPUTS = Path("build/quickstart")


def recipe() -> Config:
    """Two tensor parallel ranks, one vLLM server; a prompt solved at most 4 times of 8 is taught by its demonstration."""
    return Config(
        name="quickstart",
        model=ModelConfig(path=str(INPUTS / "model")),
        data=DataConfig(train=str(INPUTS / "train.parquet"), max_prompt_length=8, max_response_length=24),
        algorithm=AlgorithmConfig(name="hpt", gate=GateConfig(threshold=4)),
        rollout=RolloutConfig(samples_per_prompt=8),
        parallel=ParallelConfig(tensor=2),
        actor=ActorConfig(micro_batch_tokens=8192),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10, decay_to=0.1),
        evaluation=EvaluationConfig(sets={"heldout": str(INPUTS / "heldout.parquet")}, every=20),
        trainer=TrainerConfig(steps=140, prompts_per_step=64, save_every=50),
    )


def prepare(config: Config) -> None:
    """Make the data and the model with random weights where the recipe's own are missing."""
    if config.data.train == str(INPUTS / "train.parquet") and not Path(config.data.train).is_file():
        arithmetic.write(INPUTS, held_out=64)
    if config.model.path == str(INPUTS / "model") and not Path(config.model.path).is_dir():
        tiny_llama.write(Path(config.model.path))
