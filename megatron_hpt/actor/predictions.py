"""From the last stage's hidden states to what the objective needs: log-probabilities and entropies of whole rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hpt.actor.microbatch import MicroBatch
from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy
from megatron_hpt.actor.model.logprob_choice import passes_by
from megatron_hpt.actor.model.policy import PolicyModel
from megatron_hpt.actor.state import Actor


def model_logprobs(hidden: Tensor, batch: MicroBatch, model: PolicyModel, actor: Actor) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of every response token and the entropy where it is predicted; 0 at all other positions.

    Called on the last stage, for the actor and for the reference model; collective over context and tensor parallel ranks.
    Context parallel ranks exchange their values, so that each sees whole rows, and the gradient of a position goes to the
    rank that holds it. All of them compute the same loss, and one of them reports it (`Ranks.reports`).

    Args:
        hidden: [local positions, 1, hidden], cut over tensor parallel ranks too under sequence parallelism.

    Returns:
        Log-probabilities and entropies, nats, [positions] of the whole micro-batch each, float32 (float64 where `hidden` is).
    """
    weight = model.output_weight
    tensor = actor.ranks.tensor
    vocabulary = Vocabulary(
        size=actor.vocab,
        first=tensor.rank * len(weight),
        group=parallel_state.get_tensor_model_parallel_group(),
        temperature=actor.config.rollout.temperature,
    )
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)  # its gradient is summed over the vocabulary's shards
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    passes = passes_by(actor.config.actor.logprob_kernel)
    predicted = logprob_and_entropy(hidden[batch.predicted, 0], weight, batch.targets[batch.predicted], vocabulary, passes)
    # One tensor of both, so that context parallel ranks exchange it in one message.
    both = hidden.new_zeros(len(batch.tokens[0]), 2, dtype=predicted[0].dtype)
    both = both.index_put((batch.predicted,), torch.stack(predicted, 1))
    if batch.packing.context_size > 1:
        both = _Whole.apply(both, parallel_state.get_context_parallel_group())[batch.packing.unsliced]
    return both[:, 0], both[:, 1]


class _Whole(torch.autograd.Function):
    """Gathers all ranks' parts one after the other. Every rank has the whole gradient, so a part's is a slice of it, no sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = group.rank(), len(part)
        whole = part.new_empty((group.size() * len(part), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size], None
