"""Whether a step is taken: a batch that would damage the policy is skipped, counted, and kept by the trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_hpt.errors import HptError
from megatron_hpt.objective.tokens import Denominators

if TYPE_CHECKING:
    from megatron_hpt.actor.train_step import Actor

EMPTY = "nothing to train"
"""Reason of a step without a single trained token; it does no harm, and neither counts towards stopping nor ends a row."""


def update(actor: Actor, denominators: Denominators, k3: float | None) -> dict[str, float | str | None]:
    """Clip and step, or skip.

    Args:
        k3: KL between engine and trainer on this batch's rollouts; None without any.

    Returns:
        Metrics: the gradient norm before clipping, whether the step was skipped and why; the same on every rank.
    """
    with actor.platform.building():
        actor.optimizer.prepare_grads()
        norm = float(actor.optimizer.get_grad_norm())
        reason = _reason(actor, denominators, norm, k3)
        if reason is None:
            actor.optimizer.step()
    if reason is None:
        actor.skipped_in_a_row = 0
    elif reason != EMPTY:
        actor.skipped_in_a_row += 1
    return {"train/grad_norm": norm, "train/skipped": int(reason is not None), "train/skip_reason": reason}


def _reason(actor: Actor, denominators: Denominators, norm: float, k3: float | None) -> str | None:
    """Why the step must not be taken; None: it may."""
    limit, stop_above = actor.config.optimizer.skip_above, actor.config.algorithm.mismatch.stop_above
    if stop_above is not None and k3 is not None and not k3 <= stop_above:
        return f"mismatch/k3_kl {k3:.4g} is above algorithm.mismatch.stop_above={stop_above:g}"
    if denominators.tokens == 0:
        return EMPTY
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if limit is not None and norm > limit:
        return f"the gradient norm {norm:.4g} is above optimizer.skip_above={limit:g}"
    return None


def check(actor: Actor, step: int, reason: str | None) -> None:
    """Stop a run whose steps are no longer taken; called when the batch has been kept.

    Raises:
        HptError: as many in a row as `optimizer.stop_after_skipped`.
    """
    if actor.skipped_in_a_row >= actor.config.optimizer.stop_after_skipped:
        raise HptError(
            f"step {step}: {reason}; {actor.skipped_in_a_row} steps in a row were not taken "
            "(optimizer.stop_after_skipped), so the run stops. Their batches are kept in skipped/"
        )
