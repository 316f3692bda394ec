"""What the parts of a training step share: the model on this rank and what it takes to train it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_hpt.actor import parallel, platform
from megatron_hpt.actor.microbatch import MicroBatchLayout
from megatron_hpt.actor.model import policy, routing
from megatron_hpt.actor.model.logprob_choice import check_kernel
from megatron_hpt.actor.model.precision import check_bf16_layers, check_fp8, this_machine, token_multiple
from megatron_hpt.actor.optimizer import optimizer
from megatron_hpt.actor.optimizer.offload import Offload
from megatron_hpt.actor.timing import ObjectiveTimer
from megatron_hpt.batch.packing import attention_parity
from megatron_hpt.config import Config
from megatron_hpt.cores import assigned
from megatron_hpt.models.hf_config import ModelShape, run_shape
from megatron_hpt.objective import algorithms
from megatron_hpt.objective.algorithm import Algorithm

logger = logging.getLogger(__name__)


@dataclass
class Actor:
    """The model on this rank and what it takes to train it."""

    config: Config
    algorithm: Algorithm
    vocab: int
    """Rows of the vocabulary without those that pad it."""
    wrapped: list[DistributedDataParallel]
    """This rank's chunks of the model with their gradient buffers; more than one under virtual pipelining."""
    optimizer: MegatronOptimizer
    ranks: parallel.Ranks
    platform: platform.Platform
    layout: MicroBatchLayout
    """How micro-batches are padded and cut for this rank."""
    attention_parity: float
    """Tokens of a row at which its attention costs as much as everything else (`batch.packing`)."""
    reference: list[policy.PolicyModel] | None
    """The frozen reference policy of the KL penalty, laid out like the actor; None without a penalty."""
    offload: Offload
    """What rests in host memory."""
    entropy_coefficient: float
    """The coefficient of the next batch, which an adaptive one changes after every batch."""
    skipped_in_a_row: int = 0
    """Updates before the next one that were not taken (`guard`); a batch that was refused as a whole is one."""
    timer: ObjectiveTimer = field(default_factory=ObjectiveTimer)

    @property
    def chunks(self) -> list[policy.PolicyModel]:
        """The chunks of the model without their gradient buffers."""
        return [wrapped.module for wrapped in self.wrapped]


def build_actor(config: Config) -> Actor:
    """Join the process group and build this rank's part of the actor, with the weights of `config.model.path`.

    Raises:
        ConfigError: another number of ranks was started, or the machine lacks what the FP8 or the kernel that is asked
            for needs.
        ModelError: the weights cannot be read.
    """
    where = platform.detect(assigned(config).trainer.threads, config.actor.deterministic)
    check_fp8(config.actor.fp8, config.model.dtype, this_machine())
    check_kernel(config.actor.logprob_kernel)
    ranks = parallel.initialize(config.parallel, where, config.trainer.seed, config.deadlines.step_s)
    shape = run_shape(config)
    check_bf16_layers(config.actor.fp8, config.actor.bf16_layers, shape.layers)
    algorithm = algorithms.of_run(config)
    kernels = policy.kernels_of_run(shape, config, where)
    if ranks.is_lead:
        logger.info("kernels: %s", ", ".join(flag for flag, on in kernels.items() if on) or "none fused")
    wrapped = optimizer.wrap(policy.load(config.model.path, config, ranks, where), config.actor.fp8_param_gather, kernels)
    for chunk in wrapped:
        chunk.train()
    routing.install([chunk.module for chunk in wrapped], ranks)
    reference = None
    if algorithm.kl is not None:
        path = config.algorithm.kl.reference or config.model.path
        with torch.no_grad():  # then Transformer Engine keeps no second copy of FP8 weights, which only an optimizer needs
            reference = [chunk.requires_grad_(False).eval() for chunk in policy.load(path, config, ranks, where)]
    megatron_optimizer = optimizer.build(config.optimizer, wrapped, where)
    return Actor(
        config=config,
        algorithm=algorithm,
        vocab=shape.vocab,
        wrapped=wrapped,
        optimizer=megatron_optimizer,
        ranks=ranks,
        platform=where,
        layout=_layout(config, shape, ranks),
        attention_parity=attention_parity(
            shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, shape.experts_per_token or 1
        ),
        reference=reference,
        offload=Offload(config.actor.offload, wrapped, megatron_optimizer, reference or (), shared=config.rollout.sleep),
        entropy_coefficient=algorithm.entropy.coefficient,
    )


def _layout(config: Config, shape: ModelShape, ranks: parallel.Ranks) -> MicroBatchLayout:
    return MicroBatchLayout(
        config.parallel.row_multiple,
        config.parallel.batch_multiple * token_multiple(config.actor.fp8),
        ranks.context.size,
        ranks.context.rank,
        equal=config.parallel.virtual_pipeline > 1,
        routers=(shape.layers, shape.experts_per_token, shape.experts) if shape.experts else (0, 0, 0),
    )
