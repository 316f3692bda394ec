"""SmolLM2-135M-Instruct on grade-school word problems: real words, a real pretrained model, two pipeline stages.

make train RECIPE=smollm2_gsm
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
from megatron_hpt.data.parquet import Problem
from megatron_hpt.examples import smollm2, word_problems

INPUTS = Path("build/smollm2_gsm")
MAX_PROMPT, MAX_RESPONSE = 128, 64
"""Tokens; longer problems are left out, to keep a step under a minute on two cores."""


def recipe() -> Config:
    """HPT with a gate of 0. Its 9 heads rule out two tensor parallel ranks; its 30 layers divide by two stages."""
    return Config(
        name="smollm2_gsm",
        model=ModelConfig(path=str(INPUTS / "model")),
        data=DataConfig(train=str(INPUTS / "train.parquet"), max_prompt_length=MAX_PROMPT, max_response_length=MAX_RESPONSE),
        algorithm=AlgorithmConfig(
            name="hpt", gate=GateConfig(threshold=0), demonstration_coefficient=0.1, balance="components"
        ),
        rollout=RolloutConfig(samples_per_prompt=4, max_running=128),
        parallel=ParallelConfig(pipeline=2),
        actor=ActorConfig(micro_batch_tokens=640, threads="all"),
        optimizer=OptimizerConfig(lr=2e-4, warmup_steps=3, decay_to=0.1),
        evaluation=EvaluationConfig(sets={"heldout": str(INPUTS / "heldout.parquet")}, every=8, samples=4, temperature=0.6),
        trainer=TrainerConfig(steps=24, prompts_per_step=12, save_every=8),
    )


def prepare(config: Config) -> None:
    """Convert the model from its package and generate the problems, where the recipe's own are missing."""
    if config.model.path == str(INPUTS / "model") and not Path(config.model.path).is_dir():
        smollm2.write(Path(config.model.path), smollm2.shipped_file())
    if config.data.train == str(INPUTS / "train.parquet") and not Path(config.data.train).is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.model.path)

        def fits(problem: Problem) -> bool:
            chat = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            response = tokenizer.encode(problem.demonstration, add_special_tokens=False)
            return len(prompt) <= MAX_PROMPT and len(response) < MAX_RESPONSE

        word_problems.write(INPUTS, train=1000, held_out=32, fits=fits)
