"""The Megatron-Core actor: builds the model, computes the unified loss, steps the optimizer."""

import sys

import torch

if not torch.cuda.device_count():
    # Megatron-Core asks only whether Transformer Engine is installed, and would take its Adam and its kernels, which know no
    # tensors of a host. This counts devices by the driver's library; torch.cuda.is_available() would forbid CUDA in forks.
    sys.modules.setdefault("transformer_engine", None)
