"""SGLang on a host without a GPU: a platform of SGLang's own plugin interface that uses plain torch operations.

SGLang's in-tree CPU platform wants a kernel package that is on no registry. A platform of the entry-point group
``sglang.srt.platforms`` whose dispatch key is ``native`` runs every fused operation's torch form, with torch's attention
and gloo. Chosen by ``SGLANG_PLATFORM=megatron_hpt_host``; written against SGLang 0.5.23. Only this module and
``engines/sglang/plugin.py`` import SGLang.
"""

from __future__ import annotations

from typing import Any

NAME = "megatron_hpt_host"


def activate() -> str:
    """Return where SGLang finds the platform. Entry point of the group ``sglang.srt.platforms``."""
    return f"{__name__}:HostPlatform"


def __getattr__(name: str) -> Any:
    """Make the class HostPlatform when SGLang first asks for it, because importing this module must not import SGLang."""
    if name != "HostPlatform":
        raise AttributeError(name)
    from sglang.srt.arg_groups import choices
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    class HostPlatform(CpuDeviceMixin, SRTPlatform):
        """Runs every operation in plain torch on the CPU."""

        _enum = PlatformEnum.OOT
        capabilities = PlatformCapabilities()

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def is_pin_memory_available(self, device: Any = None) -> bool:
            return False

        def get_dispatch_key_name(self) -> str:
            return "native"

    # SGLang heeds a request's seed in deterministic mode only, which it refuses with backends that it does not list.
    for allow in (
        choices.add_deterministic_attention_backend_choices,
        choices.add_radix_supported_deterministic_attention_backend_choices,
    ):
        allow(["torch_native"])
    globals()[name] = HostPlatform
    return HostPlatform


def hooks() -> dict[str, Any]:
    """Return replacements of the Triton kernels of SGLang's deterministic mode: dotted name → function."""
    from megatron_hpt.engines.sglang.sampling_hash import hash32

    # The mode is wanted for its seeds; plain torch operations stay as they are.
    return {
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode": lambda *_, **__: None,
        "sglang.srt.layers.sampler.murmur_hash32": hash32,
    }
