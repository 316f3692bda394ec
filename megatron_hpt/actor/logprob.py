"""Log-probabilities and entropy of a vocabulary-parallel softmax, with exact gradients of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LogprobEntropy(torch.autograd.Function):
    """Per token: log p[target] and H = -Σ p log p, over logits whose last dimension is cut over `group`.

    With z the logits and p their softmax over the whole vocabulary:
    ∂ log p[t] / ∂z = 1[t] - p, and ∂H / ∂z = -p · (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        maximum = logits.amax(dim=-1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        shifted = logits - maximum[:, None]
        exponentials = shifted.exp()
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)
        target = torch.where(mine, shifted.gather(1, local[:, None]).squeeze(1), 0.0)
        # torch.where: a padded vocabulary row has the logit -inf and the probability 0, and 0 · -inf is no number.
        weighted = torch.where(exponentials > 0, exponentials * shifted, 0.0).sum(dim=-1)
        sums = torch.stack([exponentials.sum(dim=-1), weighted, target])
        dist.all_reduce(sums, group=group)
        log_normaliser = sums[0].log()
        entropy = log_normaliser - sums[1] / sums[0]
        ctx.save_for_backward(shifted, log_normaliser, entropy, local, mine)
        return sums[2] - log_normaliser, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        shifted, log_normaliser, entropy, local, mine = ctx.saved_tensors
        logp = shifted - log_normaliser[:, None]
        p = logp.exp()
        inner = grad_logprobs[:, None] + grad_entropy[:, None] * torch.where(p > 0, logp + entropy[:, None], 0.0)
        grad = -p * inner
        grad.scatter_add_(1, local[:, None], (grad_logprobs * mine)[:, None])
        return grad, None, None, None


def logprob_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float, vocab: int, first: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, at the sampling temperature.

    Args:
        logits: [tokens, local vocabulary], this rank's columns; arithmetic is in float32, or float64 where they are.
        targets: [tokens], token ids.
        temperature: what the engine sampled with.
        vocab: real size of the vocabulary; columns beyond it only pad and get no probability.
        first: global id of this rank's first column.
        group: tensor parallel ranks.

    Returns:
        Two tensors [tokens], nats, float32 (float64 where `logits` are); the same on every rank of `group`.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    padding = first + logits.shape[1] - vocab
    if padding > 0:
        keep = torch.arange(logits.shape[1], device=logits.device) < logits.shape[1] - padding
        scaled = scaled.masked_fill(~keep, float("-inf"))
    return _LogprobEntropy.apply(scaled, targets, first, group)
