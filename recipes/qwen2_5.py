"""Qwen2.5-72B with the settings of Qwen2.5-Math-7B, a start: nobody has published this run, nor has it been made here.

megatron-hpt train recipes/qwen2_5.py method=hpt                            # 7 nodes of trainers, 9 of engines
"""

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.examples.paper import Layout, LayoutName, Method, Model, config

MODEL = Model(
    "Qwen2.5-72B",
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
    threshold=0,
    skip_above=80.0,
)


def recipe(method: Method = "hpt", layout: LayoutName | None = None) -> Config:
    """One run; its 32,768 positions and more need no override."""
    return config(MODEL, method, layout)
