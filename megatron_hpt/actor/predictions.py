"""From the last stage's hidden states to what the objective needs: values of whole rows, on every rank that sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hpt.actor.microbatch import MicroBatch
from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy
from megatron_hpt.actor.model.policy import PolicyModel

if TYPE_CHECKING:
    from megatron_hpt.actor.state import Actor


def model_logprobs(hidden: Tensor, batch: MicroBatch, model: PolicyModel, actor: Actor) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token and entropy where it is predicted; 0 at all other positions.

    Context parallel ranks exchange theirs, so that each sees whole rows; the gradient of a position goes to the rank that
    holds it. All of them compute the same loss, and one reports it.

    Args:
        hidden: [local positions, 1, hidden], cut over tensor parallel ranks too under sequence parallelism.

    Returns:
        Two tensors [positions] of the whole micro-batch.
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
        hidden = gather_from_sequence_parallel_region(hidden)  # its gradient: summed over the vocabulary's shards
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    predicted = logprob_and_entropy(hidden[batch.predicted, 0], weight, batch.targets[batch.predicted], vocabulary)
    both = hidden.new_zeros(len(batch.tokens[0]), 2, dtype=predicted[0].dtype)
    both = both.index_put((batch.predicted,), torch.stack(predicted, 1))
    if batch.packing.context_size > 1:
        both = _Whole.apply(both, parallel_state.get_context_parallel_group())[batch.packing.unsliced]
    return both[:, 0], both[:, 1]


class _Whole(torch.autograd.Function):
    """All ranks' parts one after the other. Every rank has the whole gradient, so a part's is a slice, not a sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = group.rank(), len(part)
        whole = part.new_empty((group.size() * len(part), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size], None
