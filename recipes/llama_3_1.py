"""Llama-3.1-8B as in arXiv 2509.04419, table 3, and the 70B beside it; averages of six sets of mathematics (docs/recipes.md).

megatron-hpt train recipes/llama_3_1.py method=hpt
megatron-hpt train recipes/llama_3_1.py size=70B                            # 7 nodes of trainers, 9 of engines

        before   SFT  GRPO  LUFFY   HPT
8B         4.6   5.9   9.6   13.2  18.2        (SFT, GRPO and LUFFY are the LUFFY paper's)

The 8B's numbers are the paper's, whose HPT is method=hpt_reference; none of these runs has been made with this project. The 70B
has no published result: its settings are the 8B's, a start, and its engines work two batches ahead.
"""

from typing import Literal

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.examples.paper import Layout, LayoutName, Method, Model, config

QUESTION = (
    "Question:\n{{ messages[-1]['content'] }}\nPlease reason step by step, and put your final answer within \\boxed{}."
    "\nAnswer:\nLet's think step by step."
)
"""The paper's prompt for a base model: no template of its own, and no beginning-of-sequence token."""
EIGHT = ParallelConfig(tensor=2, data=4, sequence=True)
MODELS = {
    "8B": Model(
        "Llama-3.1-8B",
        {
            "one_node": Layout(EIGHT, servers=2, engine_tensor=4, micro_batch_tokens=18_432, recompute="none", max_running=512),
            "cluster": Layout(
                EIGHT, servers=2, engine_tensor=4, shared=False, micro_batch_tokens=9_216, recompute="none", max_running=512
            ),
        },
        threshold=2,
        is_papers=True,
        chat_template=QUESTION,
    ),
    "70B": Model(
        "Llama-3.1-70B",
        {
            "cluster": Layout(
                ParallelConfig(tensor=2, pipeline=4, data=7, sequence=True),
                servers=9,
                engine_tensor=8,
                shared=False,
                micro_batch_tokens=9_216,
                offload="optimizer",
                max_lag=2,
            )
        },
        threshold=2,
        chat_template=QUESTION,
    ),
}


def recipe(size: Literal["8B", "70B"] = "8B", method: Method = "hpt", layout: LayoutName | None = None) -> Config:
    """One run. A prompt solved at most twice of eight is taught by its demonstration."""
    return config(MODELS[size], method, layout)
