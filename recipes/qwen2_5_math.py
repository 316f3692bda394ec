"""Qwen2.5-Math-7B and 1.5B as in arXiv 2509.04419, table 2 and 3: averages of AIME24 and 25, AMC, MATH-500, Minerva, Olympiad.

megatron-hpt train recipes/qwen2_5_math.py                                  # 7B, HPT, one node of eight GPUs
megatron-hpt train recipes/qwen2_5_math.py size=1.5B method=luffy layout=one_gpu trainer.seed=1

        before   SFT  GRPO  SFT→GRPO  LUFFY  SRFT   HPT
7B        19.3  44.5  43.1      46.5   49.8  44.2  52.7
1.5B      15.6  36.9  34.0         –   34.7     –  41.9

Those are the paper's numbers, by its evaluation; its HPT is method=hpt_reference, the default hpt has none (docs/recipes.md).
None of these runs has been made with this project.
"""

from typing import Literal

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.examples.paper import Layout, LayoutName, Method, Model, config

LONGER = {"rope_theta": 40000, "max_position_embeddings": 16384}
"""The paper's edit of config.json: 1024 + 8192 tokens do not fit the model's 4096 positions."""
MODELS = {
    "7B": Model(
        "Qwen2.5-Math-7B",
        {
            "one_node": Layout(
                ParallelConfig(tensor=2, data=4, sequence=True),
                servers=2,
                engine_tensor=4,
                micro_batch_tokens=18_432,
                recompute="none",
                max_running=512,
            ),
            "cluster": Layout(
                ParallelConfig(context=2, data=4),
                servers=2,
                engine_tensor=4,
                shared=False,
                micro_batch_tokens=9_216,
                recompute="none",
                offload="optimizer",
                max_running=512,
            ),
        },
        threshold=0,
        skip_above=80.0,
        overrides=LONGER,
        is_papers=True,
    ),
    "1.5B": Model(
        "Qwen2.5-Math-1.5B",
        {
            "one_node": Layout(ParallelConfig(data=8), servers=8),
            "one_gpu": Layout(ParallelConfig(), servers=1),
            "cluster": Layout(ParallelConfig(data=8), servers=8, shared=False),
        },
        threshold=0,
        demonstration_coefficient=0.3,
        skip_above=80.0,
        overrides=LONGER,
        is_papers=True,
    ),
}


def recipe(size: Literal["7B", "1.5B"] = "7B", method: Method = "hpt", layout: LayoutName | None = None) -> Config:
    """One run; hpt_reference, whose loss depends on it, has the paper's 32,768 tokens a micro-batch."""
    return config(MODELS[size], method, layout)
