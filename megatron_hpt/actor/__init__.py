"""The Megatron-Core actor: builds the model, computes the unified loss, steps the optimizer."""

import sys
import types

import torch

if not torch.cuda.device_count():
    # Megatron-Core asks only whether these are installed, and would take their Adam and kernels, which know no tensors of a
    # host. This counts devices by the driver's library; torch.cuda.is_available() would forbid CUDA in forks.
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)
    # Megatron-Core compiles its small fused functions as it is imported (core/jit.py): on a host that takes three seconds of
    # a rank's start, and a C++ compiler when they are called.
    uncompiled = types.ModuleType("megatron.core.jit")
    uncompiled.jit_fuser = uncompiled.noop_decorator = lambda function: function
    sys.modules.setdefault(uncompiled.__name__, uncompiled)
