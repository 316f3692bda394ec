"""Which passes compute log-probabilities: `actor.logprob_kernel`, and what is missing for it.

This module imports no Megatron, because preflight reads it.
"""

from __future__ import annotations

import importlib.util

import torch

from megatron_hpt.actor.model.logprob import TORCH, Passes
from megatron_hpt.errors import ConfigError


def passes_by(kernel: str) -> Passes:
    """Return the passes that `actor.logprob_kernel` names; Triton is imported where it is chosen, because hosts have none."""
    if kernel == "torch":
        return TORCH
    from megatron_hpt.actor.model.logprob_kernel import TRITON

    return TRITON


def check_kernel(kernel: str) -> None:
    """Check that `actor.logprob_kernel` can run on this machine.

    Raises:
        ConfigError: something is missing; it names everything that is.
    """
    needs = {
        "a GPU, found none": torch.cuda.is_available(),
        "Triton (package triton), found none": importlib.util.find_spec("triton") is not None,
    }
    missing = [what for what, is_there in needs.items() if not is_there]
    if kernel == "triton" and missing:
        raise ConfigError(
            f"actor.logprob_kernel: given 'triton', which needs {'; '.join(missing)}. Install or change that, or set "
            "actor.logprob_kernel=torch"
        )
