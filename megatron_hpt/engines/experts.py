"""Whether an engine is to keep a mixture's experts as they were loaded."""

from __future__ import annotations

from megatron_hpt.errors import ModelError
from megatron_hpt.models.hf_config import read_config


def has_plain_experts(folder: str) -> bool:
    """Return whether a model folder is a mixture whose weights travel unquantised, and so are compared in the engine.

    On Blackwell both engines prefer expert kernels that permute the loaded weights (vLLM: fused_moe/oracle/unquantized.py;
    SGLang: quantization/unquant.py), which then are not those that were sent; SGLang would not even permute the next ones.
    FP8 mixtures are not compared, and keep the engine's choice. A folder that is not on this machine, as in a plan for others,
    counts as dense.
    """
    try:
        contents = read_config(folder)
    except ModelError:
        return False
    return bool(contents.get("num_local_experts") or contents.get("num_experts")) and not contents.get("quantization_config")
