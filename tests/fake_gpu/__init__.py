"""A machine with eight GPUs that has none: the rehearsal of the GPU path (docs/gpu.md, build.py)."""

import importlib.util
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

IS_REHEARSAL = importlib.util.find_spec("fake_gpu_startup") is not None
"""Whether this interpreter's environment is the one that build.py has prepared."""


def with_devices() -> dict[str, str]:
    """Return the environment of a process that sees the machine's GPUs, and whose forks do.

    The rehearsal runs pytest itself without them (Makefile): it is a fork, and a process that is one cannot use CUDA.
    """
    if not IS_REHEARSAL:
        return dict(os.environ)
    library = Path(sysconfig.get_path("purelib")) / "fake_gpu" / "no_at_fork.so"
    return {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"LD_PRELOAD": str(library)}


def prepare_rank() -> None:
    """Have this rank build layers of Transformer Engine in float32 too; called in each rank of a test before its script.

    The product never does so, because Transformer Engine's fused attention computes in half precision. The functions that stand
    in for it compute in float32, and then a gradient through its layers is compared to 1e-5.
    """
    if IS_REHEARSAL:
        from megatron_hpt.actor.model import kernels, policy

        _interpret_triton()
        policy.uses_transformer_engine = lambda platform, dtype: platform.has_transformer_engine
        if "ALL_KERNELS" not in os.environ:  # minutes a test; those that are about it ask for it
            slow = kernels.KERNELS["moe_permute_fusion"]
            kernels.KERNELS[slow.flag] = replace(slow, useless=lambda situation: "its Triton kernels are interpreted here")


def _interpret_triton() -> None:
    """Give Triton, whose kernels are interpreted here (startup.py), a driver that knows of no library of a GPU."""
    from triton.runtime import driver

    class HostDriver:
        def get_benchmarker(self):
            return lambda call, quantiles=(0.5,), **_: [0.0 for _ in quantiles]  # the first configuration is the fastest

    driver.set_active(HostDriver())
