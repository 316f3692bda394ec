"""Megatron's data parallel wrapper, its distributed optimizer, and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_hpt.actor.optimizer import adam
from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import OptimizerConfig


def wrap(chunks: Sequence[GPTModel], fp8_param_gather: bool, kernels: Mapping[str, bool]) -> list[DistributedDataParallel]:
    """Give each chunk gradient buffers, which are reduced in float32 and sharded over the data parallel ranks.

    Args:
        kernels: which of Megatron's kernels are used, by flag (`policy.kernels_of_run`).
    """
    overlaps = kernels["overlap_grad_reduce"]
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        fp8_param_gather=fp8_param_gather,
        overlap_grad_reduce=overlaps,
    )
    model = chunks[0].config
    if kernels["gradient_accumulation_fusion"]:
        _accumulate_in_place(chunks)
    # num_tokens is dropped: it would divide the gradient a second time by a denominator the loss already has.
    model.finalize_model_grads_func = lambda models, num_tokens=None, **kwargs: finalize_model_grads(models, None, **kwargs)
    wrapped = [DistributedDataParallel(model, config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    if overlaps:  # only the last micro-batch's backward pass starts reductions
        model.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _accumulate_in_place(chunks: Sequence[GPTModel]) -> None:
    """Have linear layers add their weight gradients to the gradient buffers, in float32, by their own matrix products.

    Megatron refuses the setting where it builds the output layer, which is none of Transformer Engine's and would need Apex.
    But that layer's own forward pass is never called (`logprob`), so the setting is made after everything is built.
    """
    for chunk in chunks:
        chunk.config.gradient_accumulation_fusion = True
        for module in chunk.decoder.modules():
            for name in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):  # Transformer Engine's, Megatron's own
                if hasattr(module, name):
                    setattr(module, name, True)


def build(config: OptimizerConfig, wrapped: Sequence[DistributedDataParallel], platform: Platform) -> MegatronOptimizer:
    """Build Adam with float32 main weights; its state is sharded over the data parallel ranks."""
    adam.offer_to_megatron()
    dtype = wrapped[0].config.params_dtype
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    with platform.building():
        optimizer = get_megatron_optimizer(megatron, list(wrapped))
        # Moments are allocated from the start, because a run whose first steps are all skipped writes a checkpoint too.
        for part in optimizer.chained_optimizers:
            part.init_state_fn(part.optimizer)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step from 0 to steps-1: a linear warm-up, then a straight line to `decay_to`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return config.lr * (1 - (1 - config.decay_to) * min(1.0, progress))
