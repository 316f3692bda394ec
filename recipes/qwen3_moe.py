"""Qwen3-30B-A3B, a mixture of 128 experts, with the settings of Qwen2.5-Math-7B, a start: a run that nobody has published.

megatron-hpt train recipes/qwen3_moe.py method=hpt                          # 1 node of trainers, 2 of engines
megatron-hpt train recipes/qwen3_moe.py layout=one_node                     # eight H200
"""

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.examples.paper import Layout, LayoutName, Method, Model, config

EXPERTS = ParallelConfig(tensor=2, sequence=True, data=4, expert=8, expert_tensor=1)
"""Eight ranks share the experts whole; Megatron-Core wants sequence parallelism where tensor ranks cut attention."""
MODEL = Model(
    "Qwen3-30B-A3B",
    {
        "cluster": Layout(
            EXPERTS,
            servers=4,
            engine_tensor=4,
            shared=False,
            micro_batch_tokens=9_216,
            recompute="none",
            offload="optimizer",
            max_running=512,
            max_lag=2,
        ),
        "one_node": Layout(
            ParallelConfig(pipeline=4, context=2),
            servers=2,
            engine_tensor=4,
            micro_batch_tokens=18_432,
            recompute="none",
            max_running=512,
        ),
    },
    threshold=0,
    skip_above=80.0,
)


def recipe(method: Method = "hpt", layout: LayoutName | None = None) -> Config:
    """One run; its 40,960 positions need no override."""
    return config(MODEL, method, layout)
