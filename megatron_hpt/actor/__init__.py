"""The Megatron-Core actor: builds the model, computes the unified loss, steps the optimizer."""

import sys

import torch

if not torch.cuda.device_count():
    # Megatron-Core asks only whether these are installed, and would take their Adam and kernels, which know no tensors of a
    # host. This counts devices by the driver's library; torch.cuda.is_available() would forbid CUDA in forks.
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)
