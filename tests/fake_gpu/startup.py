"""Has torch's CUDA operators computed on the host, in every process of the rehearsal's environment that sees a device."""

import os
import sys

_VARIABLES = {
    "TORCHDYNAMO_DISABLE": "1",  # compiled code would be launched and not run
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a warning for every operator that is registered again
    "TRITON_INTERPRET": "1",  # Triton's kernels are interpreted on the host
    "NVTE_PROJECT_BUILDING": "1",  # Transformer Engine loads its Python without its compiled core
}


def start() -> None:
    """Import torch and replace its operators; called by a line in the environment's fake_gpu.pth."""
    import ctypes

    import torch

    operators = os.path.join(os.path.dirname(__file__), "fake_gpu", "host_operators.so")
    if ctypes.CDLL(operators).fake_gpu_install() < 0:
        raise RuntimeError(f"{operators} could not replace torch's CUDA operators")
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)


# pip is left alone: it replaces files of packages, which must not be loaded then.
if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and "pip" not in " ".join(sys.orig_argv):
    os.environ.update({name: value for name, value in _VARIABLES.items() if name not in os.environ})
    start()
