"""What a cluster's GPUs and links reach, as shares of their peaks. Pure; no torch.

A roofline: what a part of a step computes or moves, over the peak times one stated share of it. The shares are the same for
every model, layout and published row that docs/plan.md compares them with.
"""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.plan.cluster import ClusterConfig

MATMUL = {"float32": 0.75, "bfloat16": 0.75, "fp8": 0.55}
"""Of the peak in matrix products. Large ones reach 0.80 in bfloat16 (tools/gpu_checks), a model's somewhat less. FP8's
accumulate their gradients in more steps (Transformer Engine's split accumulator) and reach a smaller share."""
ATTENTION = {True: 0.5, False: 0.35}
"""Of the peak in flash attention, of the FLOPs under the causal mask, with kernels for Hopper (cuDNN's, FlashAttention-3) and
with FlashAttention-2. arXiv 2407.08608 reports up to 0.75 forward without a mask and 0.35; causal masks and backward passes
are slower."""
MEMORY = 0.8
"""Of the bandwidth of GPU memory in elementwise operations and decoding."""
LINK = 0.75
"""Of a link's bandwidth in collectives (NCCL's ring at large messages)."""
KERNEL_S = 5e-6
"""Of a kernel, at least, where each waits for the one before it (an assumption)."""


class Peaks:
    """What the cluster reaches for one recipe, per second."""

    def __init__(self, config: Config, cluster: ClusterConfig, hopper_attention: bool = True) -> None:
        gpu, dtype = cluster.gpu, config.model.dtype
        rate = {name: tflops * 1e12 * MATMUL[name] for name, tflops in gpu.tflops.items()}
        self.products = rate["fp8" if config.actor.fp8 != "none" else dtype]
        self.output = rate[dtype]
        self.attention = gpu.tflops[dtype] * 1e12 * ATTENTION[hopper_attention]
        self.memory = gpu.memory_gbs * 1e9 * MEMORY
        self.host = gpu.host_gbs * 1e9 * LINK
        self.node = gpu.link_gbs * 1e9 * LINK
        self.network = cluster.network_gbs * 1e9 * LINK
        self.storage = cluster.storage_gbs * 1e9
        self._size = cluster.gpus_per_node

    def link(self, extent: int) -> float:
        """Bytes/s from one rank to another of a group that spans so many neighbouring ranks: in a node, or between nodes."""
        return self.node if extent <= self._size else self.network

    def ring(self, stride: int, size: int) -> float:
        """Bytes/s of one rank in a collective of `size` ranks, every `stride`-th: all its members on a node have a port each,
        and the ring runs through all of them."""
        if stride * size <= self._size:
            return self.node
        return min(self.node, self.network * max(1, self._size // stride))

    def exchange(self, stride: int, size: int) -> float:
        """Return the bytes/s of one rank that sends as much to each of `size` ranks, every `stride`-th: what stays in the node
        does not wait for what leaves it."""
        inside = min(size, max(1, self._size // stride))
        if inside == size:
            return self.node
        leaving = (size - inside) / (size - 1)
        return min(self.network / leaving, self.node / (1 - leaving) if leaving < 1 else self.node)
