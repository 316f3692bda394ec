"""One optimizer step on one batch: plan, forward and backward through Megatron's schedules, step, measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hpt.actor.logprob import logprob_and_entropy
from megatron_hpt.actor.microbatch import MicroBatch, pack
from megatron_hpt.actor.optimizer import learning_rate
from megatron_hpt.actor.parallel import Ranks
from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import Config
from megatron_hpt.data.packing import plan_micro_batches
from megatron_hpt.data.rows import Row, Source
from megatron_hpt.errors import HptError
from megatron_hpt.objective.algorithms import Algorithm
from megatron_hpt.objective.estimator import Denominators, Tokens, count, unified_loss

PROBE_ROWS = 8
"""Rollouts whose log-probabilities are compared with the engine's in every step, trained or not."""
_SUMS = ("loss", "loss_rollouts", "loss_demonstrations", "entropy", "masked", "k3", "measured", "logprob_gap")


@dataclass
class Actor:
    """The model on this rank and what it takes to train it."""

    config: Config
    algorithm: Algorithm
    vocab: int
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    ranks: Ranks
    platform: Platform


def selected_rows(rows: Sequence[Row]) -> list[Row]:
    """Trained rows, and as many untrained rollouts as the measurement of the mismatch needs."""
    trained = [row for row in rows if row.weight != 0]
    rollouts = sum(row.source is Source.ROLLOUT for row in trained)
    spare = [row for row in rows if row.weight == 0 and row.source is Source.ROLLOUT and row.response_length]
    return trained + spare[: max(0, PROBE_ROWS - rollouts)]


def train_step(actor: Actor, rows: Sequence[Row], step: int) -> dict[str, float | None]:
    """Train one batch; collective over all ranks, which all give the same rows.

    Returns:
        Metrics, the same on every rank.

    Raises:
        HptError: the gradient norm is not finite; the actor must not be used or saved after that.
    """
    rows = selected_rows(rows)
    denominators = count((row.source is Source.DEMONSTRATION, row.response_length, row.weight) for row in rows)
    sums = _forward_backward(actor, rows, denominators)
    lr = learning_rate(actor.config.optimizer, step, actor.config.trainer.steps)
    for group in actor.optimizer.param_groups:
        group["lr"] = lr
    grad_norm = _update(actor, step)
    measured, rollout_tokens = sums["measured"], denominators.rollouts.tokens
    return {
        "train/loss": sums["loss"],
        "train/loss_rollouts": sums["loss_rollouts"],
        "train/loss_demonstrations": sums["loss_demonstrations"],
        "train/entropy": sums["entropy"],
        "train/masked_share": sums["masked"] / rollout_tokens if rollout_tokens else 0.0,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/tokens": denominators.tokens,
        "train/rows": denominators.rollouts.rows + denominators.demonstrations.rows,
        "mismatch/k3_kl": sums["k3"] / measured if measured else None,
        "mismatch/logprob_gap": sums["logprob_gap"] / measured if measured else None,
        "mismatch/tokens": measured,
    }


def _forward_backward(actor: Actor, rows: Sequence[Row], denominators: Denominators) -> dict[str, float]:
    """Gradients of the whole batch into the buffers; returns the global sums of `_SUMS`."""
    plan = plan_micro_batches(
        [len(row.tokens) - 1 for row in rows], actor.ranks.data_size, actor.config.actor.micro_batch_tokens
    )
    mine = [[rows[index] for index in indices] for indices in plan[actor.ranks.data]]
    actor.model.zero_grad_buffer()
    actor.optimizer.zero_grad()
    parts = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(actor, denominators, next(data), model),
        data_iterator=_packed(mine, actor.platform.device),
        model=actor.model,
        num_microbatches=len(mine),
        seq_length=actor.config.max_sequence_length,  # shapes are exchanged (variable_seq_lengths); this bounds none
        micro_batch_size=1,
        forward_only=False,
    )
    total = torch.zeros(len(_SUMS), dtype=torch.float64, device=actor.platform.device)
    if actor.ranks.reports:
        total += torch.stack([part["sums"] for part in parts]).sum(dim=0)
    dist.all_reduce(total)
    return dict(zip(_SUMS, total.tolist(), strict=True))


def _packed(micro_batches: Sequence[Sequence[Row]], device: torch.device) -> Iterator[MicroBatch]:
    return (pack(rows, device) for rows in micro_batches)


def _forward(actor: Actor, denominators: Denominators, batch: MicroBatch, model: torch.nn.Module):
    """Megatron's forward step: this stage's output, and the loss as a function of the last stage's."""
    output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packing)

    def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        value, sums = _loss(actor, denominators, batch, logits.flatten(0, 1))
        return value, torch.ones((), dtype=torch.int, device=value.device), {"sums": sums}

    return output, loss


def _loss(actor: Actor, denominators: Denominators, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one micro-batch from its logits [positions, local vocabulary], and its part of `_SUMS`."""
    logprobs, entropy = logprob_and_entropy(
        logits,
        batch.targets,
        temperature=actor.config.rollout.temperature,
        vocab=actor.vocab,
        first=actor.ranks.tensor.rank * logits.shape[1],
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    tokens = Tokens(
        logprobs, entropy, batch.old_logprobs, batch.advantages, batch.weights, batch.row_lengths, batch.demonstration
    )
    loss = unified_loss(actor.algorithm, tokens, denominators)
    gap = torch.where(batch.measured, logprobs.detach() - batch.old_logprobs, 0.0).double()
    k3 = (torch.expm1(gap) - gap).sum()  # http://joschu.net/blog/kl-approx.html: KL(engine ‖ trainer), never negative
    parts = (
        loss.total.detach(),
        loss.rollouts,
        loss.demonstrations,
        loss.entropy,
        loss.masked,
        k3,
        batch.measured.sum(),
        gap.abs().sum(),
    )
    return loss.total, torch.stack([part.double() for part in parts])


def _update(actor: Actor, step: int) -> float:
    """Clip and step; returns the gradient norm before clipping."""
    with actor.platform.building():
        succeeded, grad_norm, _ = actor.optimizer.step()
    norm = math.nan if grad_norm is None else float(grad_norm)
    if not succeeded or not math.isfinite(norm):
        raise HptError(
            f"step {step}: the gradient norm is {norm}; the run stops here, its last checkpoint and this step's batch "
            "are untouched"
        )
    return norm
