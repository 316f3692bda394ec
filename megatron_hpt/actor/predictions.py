"""From the last stage's logits to what the objective needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core import parallel_state
from torch import Tensor

from megatron_hpt.actor.logprob import logprob_and_entropy

if TYPE_CHECKING:
    from megatron_hpt.actor.train_step import Actor


def model_logprobs(logits: Tensor, targets: Tensor, actor: Actor) -> tuple[Tensor, Tensor]:
    """`logprob_and_entropy` of the last stage's logits [tokens, local vocabulary], as the actor's layout has them."""
    return logprob_and_entropy(
        logits,
        targets,
        temperature=actor.config.rollout.temperature,
        vocab=actor.vocab,
        first=actor.ranks.tensor.rank * logits.shape[1],
        group=parallel_state.get_tensor_model_parallel_group(),
    )
