"""One rank that builds the actor and says what Megatron's own objects are set to. Started by run_ranks.

usage: built.py CONFIG.yaml OUT.json
"""

import json
import sys
from pathlib import Path

from megatron_hpt.actor import parallel
from megatron_hpt.actor.state import build_actor
from megatron_hpt.overrides import load_yaml


def main() -> None:
    actor = build_actor(load_yaml(Path(sys.argv[1])))
    model, gradients = actor.chunks[0].config, actor.wrapped[0].ddp_config
    flags = (
        *("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"),
        *("moe_grouped_gemm", "moe_permute_fusion", "overlap_p2p_comm", "batch_p2p_comm", "deterministic_mode"),
    )
    found = {flag: getattr(model, flag) for flag in flags} | {"overlap_grad_reduce": gradients.overlap_grad_reduce}
    modules = [module for chunk in actor.chunks for module in chunk.modules()]
    found["in place"] = sum(bool(getattr(module, "fuse_wgrad_accumulation", False)) for module in modules)
    found["grouped"] = sum(type(module).__name__ == "TEGroupedMLP" for module in modules)
    if actor.ranks.is_lead:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    parallel.shutdown()


if __name__ == "__main__":
    main()
