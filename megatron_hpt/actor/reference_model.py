"""Policies that a step does not change: their log-probabilities, and the KL penalty of the reference policy on rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hpt.actor.microbatch import MicroBatch, response_slices
from megatron_hpt.actor.model.policy import PolicyModel
from megatron_hpt.actor.predictions import model_logprobs
from megatron_hpt.actor.state import Actor
from megatron_hpt.batch.advantages import overlong_penalties, with_advantages
from megatron_hpt.batch.rows import Row, Source


@torch.no_grad()
def forward_logprobs(chunks: Sequence[PolicyModel], actor: Actor, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Compute the log-probability of every response token without a gradient; collective.

    Args:
        chunks: this rank's chunks of the model: the frozen reference, or the actor itself before the first update of a batch.

    Returns:
        A tensor [positions] for each micro-batch, 0 where no response token is predicted; on stages before the last, an empty
        list.
    """
    parts = get_forward_backward_func()(
        forward_step_func=lambda data, stage: _forward(actor, next(data), stage),
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].length,
        micro_batch_size=1,
        forward_only=True,
    )
    return [part["logprobs"] for part in parts] if actor.ranks.is_last_stage else []


def _forward(actor: Actor, batch: MicroBatch, model: PolicyModel):
    """Do Megatron's forward step: return this chunk's output, and what collects the last chunk's in place of a loss."""
    output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packing)

    def collect(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logprobs, _ = model_logprobs(hidden, batch, model, actor)
        nothing = torch.zeros((), device=hidden.device)
        return nothing, torch.ones((), dtype=torch.int, device=hidden.device), {"logprobs": logprobs}

    return output, collect


def penalised(rows: Sequence[Row], plan: Sequence[Sequence[int]], references: Sequence[Tensor], actor: Actor) -> list[Row]:
    """Estimate the advantages again, from rewards less coefficient · KL at every rollout token; collective.

    The KL is that of the policy that sampled the row, so it does not depend on the step being taken.

    Args:
        plan: this rank's micro-batches, as indices of rows.
        references: for each of them the log π_ref of its response tokens, [positions].

    Returns:
        The rows with their new advantages, the same on every rank.
    """
    kl = actor.algorithm.kl
    penalties_here: dict[int, np.ndarray] = {}
    if actor.ranks.reports:
        for indices, logprobs in zip(plan, references, strict=True):
            for index, response in zip(indices, response_slices([rows[i] for i in indices], actor.layout), strict=True):
                row = rows[index]
                if row.source is Source.ROLLOUT:
                    behaviour = torch.from_numpy(row.behaviour_logprobs.astype(np.float64))
                    log_ratio = behaviour - logprobs[response].double().cpu()
                    penalties_here[index] = (-kl.coefficient * kl.estimator(log_ratio)).numpy()
    # A row lies on one data parallel rank, but every rank needs all of them: advantages are relative to a row's group.
    of_ranks: list[dict[int, np.ndarray]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, penalties_here)
    penalties = {index: penalty for part in of_ranks for index, penalty in part.items()}
    estimated = [index for index, row in enumerate(rows) if row.is_estimated]
    return with_advantages(rows, estimated, actor.algorithm, penalties, overlong_penalties(rows, actor.config))
