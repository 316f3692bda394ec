"""A machine with eight GPUs that has none: the rehearsal of the GPU path (docs/gpu.md, build.py)."""

import importlib.util
import sysconfig
from pathlib import Path

IS_REHEARSAL = importlib.util.find_spec("fake_gpu_startup") is not None
"""Whether this interpreter's environment is the one that build.py has prepared."""


def preloaded() -> dict[str, str]:
    """Return the environment of a process whose forks use the fake GPU; empty on other machines."""
    library = Path(sysconfig.get_path("purelib")) / "fake_gpu" / "no_at_fork.so"
    return {"LD_PRELOAD": str(library)} if IS_REHEARSAL else {}


def prepare_rank() -> None:
    """Have this rank build layers of Transformer Engine in float32 too; called in each rank of a test before its script.

    The product never does so, because Transformer Engine's fused attention computes in half precision. The functions that stand
    in for it compute in float32, and then a gradient through its layers is compared to 1e-5.
    """
    if IS_REHEARSAL:
        from megatron_hpt.actor.model import policy

        _interpret_triton()
        policy.uses_transformer_engine = lambda platform, dtype: platform.has_transformer_engine


def _interpret_triton() -> None:
    """Give Triton, whose kernels are interpreted here (startup.py), a driver that knows of no library of a GPU."""
    from triton.runtime import driver

    class HostDriver:
        def get_benchmarker(self):
            return lambda call, quantiles=(0.5,), **_: [0.0 for _ in quantiles]  # the first configuration is the fastest

    driver.set_active(HostDriver())
