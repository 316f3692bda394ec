"""One optimizer step on one batch: plan, forward and backward through Megatron's schedules, step, measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hpt.actor import guard
from megatron_hpt.actor.microbatch import MicroBatch, pack_all
from megatron_hpt.actor.optimizer.optimizer import learning_rate
from megatron_hpt.actor.predictions import model_logprobs
from megatron_hpt.actor.reference_model import penalised, reference_logprobs
from megatron_hpt.actor.state import Actor
from megatron_hpt.batch.packing import plan_micro_batches
from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.objective.estimator import Loss, part_names, unified_loss
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.tokens import Denominators, Tokens, count

PROBE_ROWS = 8
"""Rollouts whose log-probabilities are compared with the engine's in every step, trained or not."""
_MISMATCH = ("k3", "measured", "logprob_gap")


def selected_rows(rows: Sequence[Row], in_reward: bool = False) -> list[Row]:
    """Choose the rows that a step computes: trained rows, then as many untrained rollouts as make up `PROBE_ROWS` of them.

    Args:
        in_reward: a KL penalty enters the rewards, so rows that do not train but are compared with those that do are chosen
            too: their rewards change as well.
    """
    needed = [_is_needed(row, in_reward) for row in rows]
    chosen = [row for row, needs in zip(rows, needed, strict=True) if needs]
    spare = [row for row, needs in zip(rows, needed, strict=True) if not needs and row.source is Source.ROLLOUT]
    rollouts = sum(row.source is Source.ROLLOUT for row in chosen)
    return chosen + spare[: max(0, PROBE_ROWS - rollouts)]


def _is_needed(row: Row, in_reward: bool) -> bool:
    return row.weight != 0 or (in_reward and row.is_estimated)


def train_step(actor: Actor, rows: Sequence[Row], step: int) -> dict[str, float | str | None]:
    """Train one batch; called once a step, collective over all ranks, which must all give the same rows.

    A step that must not be taken (see `guard`) leaves weights and optimizer as they are and says so in its metrics.

    Returns:
        Metrics, the same on every rank.
    """
    sums, denominators = accumulate(actor, rows)
    lr = learning_rate(actor.config.optimizer, step, actor.config.trainer.steps)
    for group in actor.optimizer.param_groups:
        group["lr"] = lr
    with actor.offload.optimizer():
        update = guard.update(actor, denominators, _mean(sums["k3"], sums["measured"]))
    metrics = _metrics(actor, sums, denominators) | {"train/lr": lr} | update
    bonus = actor.algorithm.entropy
    if not update["train/skipped"] and denominators.of(bonus.roles).tokens:
        actor.entropy_coefficient = bonus.next_coefficient(actor.entropy_coefficient, sums["bonus_entropy"])
    return metrics


def accumulate(actor: Actor, rows: Sequence[Row]) -> tuple[dict[str, float], Denominators]:
    """Put the gradient of a batch into the model's gradient buffers; collective.

    Returns:
        Sums over all ranks by name (the loss, its parts, the mismatch), and the counts by which the loss was divided.
    """
    kl = actor.algorithm.kl
    in_reward = kl is not None and kl.in_reward
    rows = selected_rows(rows, in_reward)
    plan = _plan(rows, sum(_is_needed(row, in_reward) for row in rows), actor)
    batches, references = _packed(rows, plan, actor), []
    if actor.reference is not None:
        references = reference_logprobs(actor.reference, actor, batches)
    if in_reward:
        rows = penalised(rows, plan, references, actor)
        batches = _packed(rows, plan, actor)  # with the advantages estimated again
    denominators = count(((row.role, row.group, row.response_length, row.weight) for row in rows), actor.ranks.data_size)
    return _forward_backward(actor, batches, references, denominators), denominators


def _metrics(actor: Actor, sums: dict[str, float], denominators: Denominators) -> dict[str, float | None]:
    rollout_tokens = denominators.of([Role.ROLLOUT]).tokens
    losses = {f"train/{name}": value for name, value in sums.items() if name.startswith("loss")}
    kl = {"train/kl": sums["kl"]} if actor.algorithm.kl is not None else {}
    return {
        **losses,
        **kl,
        "train/entropy": sums["entropy"],
        "train/entropy_coefficient": actor.entropy_coefficient,
        "train/masked_share": _mean(sums["masked"], rollout_tokens) or 0.0,
        "train/tokens": denominators.tokens,
        "train/rows": denominators.rows,
        "mismatch/k3_kl": _mean(sums["k3"], sums["measured"]),
        "mismatch/logprob_gap": _mean(sums["logprob_gap"], sums["measured"]),
        "mismatch/tokens": sums["measured"],
        "mismatch/dropped_share": _mean(sums["dropped"], rollout_tokens) or 0.0,
        "time/objective_s": actor.timer.collect(actor.platform.device),
    }


def _mean(total: float, number: float) -> float | None:
    return total / number if number else None


def _plan(rows: Sequence[Row], needed: int, actor: Actor) -> list[list[int]]:
    """Plan this data parallel rank's micro-batches, as indices of rows.

    The first `needed` rows train, the others are only measured and get micro-batches of their own. Which of those others
    there are may depend on when rollouts were cancelled, and the order of sums over trained rows must not depend on it.
    """
    parallel, lengths = actor.config.parallel, [len(row.tokens) - 1 for row in rows]
    parts = [part for part in (range(needed), range(needed, len(rows))) if part] or [range(0)]
    return [
        [part[index] for index in indices]
        for part in parts
        for indices in plan_micro_batches(
            [lengths[index] for index in part],
            actor.ranks.data_size,
            actor.config.actor.micro_batch_tokens,
            attention_parity=actor.attention_parity,
            count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )[actor.ranks.data]
    ]


def _packed(rows: Sequence[Row], plan: Sequence[Sequence[int]], actor: Actor) -> list[MicroBatch]:
    return pack_all(rows, plan, actor.platform.device, actor.layout)


def _forward_backward(
    actor: Actor, batches: Sequence[MicroBatch], references: Sequence[Tensor], denominators: Denominators
) -> dict[str, float]:
    """Put the gradients of the whole batch into the buffers, and return sums over all ranks by name."""
    for wrapped in actor.wrapped:
        wrapped.zero_grad_buffer()
    actor.optimizer.zero_grad()
    parts = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(actor, denominators, next(data), model),
        data_iterator=[_with_references(batches, references) for _ in actor.wrapped],
        model=actor.wrapped,
        num_microbatches=len(batches),
        seq_length=batches[0].length,  # read where all micro-batches are of one length; elsewhere stages exchange shapes
        micro_batch_size=1,
        forward_only=False,
    )
    names = (*part_names(actor.algorithm), *_MISMATCH)
    # All other ranks add zeros, so that each loss is counted once.
    total = torch.zeros(len(names), dtype=torch.float64, device=actor.platform.device)
    if actor.ranks.reports:
        total += torch.stack([part["sums"] for part in parts]).sum(dim=0)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _with_references(batches: Sequence[MicroBatch], references: Sequence[Tensor]):
    """Pair each micro-batch with the reference model's log-probabilities, or with None where this stage has none."""
    return zip(batches, references or [None] * len(batches), strict=True)


def _forward(actor: Actor, denominators: Denominators, data: tuple[MicroBatch, Tensor | None], model: DistributedDataParallel):
    """Do Megatron's forward step: return this chunk's output, and the loss as a function of the last chunk's."""
    batch, reference = data
    output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packing)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        predictions = model_logprobs(hidden, batch, model.module, actor)
        value, sums = _loss(actor, denominators, batch, reference, *predictions)
        return value, torch.ones((), dtype=torch.int, device=value.device), {"sums": sums}

    return output, loss


def _loss(
    actor: Actor, denominators: Denominators, batch: MicroBatch, reference: Tensor | None, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one micro-batch, and its sums in the order of `part_names` and `_MISMATCH`, float64.

    Args:
        reference: log π_ref, as `logprobs` and `entropy` float [positions]; None without a reference.
    """
    with actor.timer.forward():
        loss = _objective(actor, denominators, batch, reference, logprobs, entropy)
    actor.timer.watch_backward(loss.total, (logprobs, entropy))
    gap = torch.where(batch.measured, logprobs.detach() - batch.behaviour_logprobs, 0.0).double()
    k3 = (torch.expm1(gap) - gap).sum()  # http://joschu.net/blog/kl-approx.html: KL(engine ‖ trainer), never negative
    sums = (*loss.parts.values(), k3, batch.measured.sum(), gap.abs().sum())
    return loss.total, torch.stack([part.double() for part in sums])


def _objective(
    actor: Actor, denominators: Denominators, batch: MicroBatch, reference: Tensor | None, logprobs: Tensor, entropy: Tensor
) -> Loss:
    tokens = Tokens(
        logprobs=logprobs,
        entropy=entropy,
        behaviour_logprobs=batch.behaviour_logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        row_lengths=batch.row_lengths,
        rows=batch.rows,
        roles=batch.roles,
        reference_logprobs=reference,
    )
    return unified_loss(actor.algorithm, tokens, denominators, actor.entropy_coefficient)
