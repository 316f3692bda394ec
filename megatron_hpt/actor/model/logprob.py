"""Log-probabilities and entropy of a vocabulary-parallel softmax, from hidden states, with exact gradients of both.

The matrix of tokens × vocabulary never exists: both passes go over it in chunks, and the backward pass computes the logits
of a chunk again. That costs 8 instead of 6 FLOPs for each token, hidden unit and vocabulary row.

What tensor parallel ranks add up is here. What one rank does with its chunks is one of two `Passes`: those of this module,
in torch, which are the reference and run everywhere, and those of `logprob_kernel`, in Triton; `logprob_choice` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Bytes of one chunk's logits in float32: large enough for the matrix product, small beside the model."""
BLOCK_BYTES = 2 * 2**20
"""Bytes of logits that the host works on at a time, few enough to stay in its cache from one operation to the next."""


@dataclass(frozen=True)
class Vocabulary:
    """How the output layer's rows lie on the tensor parallel ranks, and the temperature of sampling.

    Raises:
        ValueError: all rows of this rank only pad the vocabulary.
    """

    size: int
    """Number of real rows; those beyond it only pad, and get no probability."""
    first: int
    """Global number of this rank's first row."""
    group: dist.ProcessGroup
    """Tensor parallel ranks."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.first >= self.size:
            raise ValueError(f"a tensor parallel rank has no row of a vocabulary of {self.size}: set parallel.tensor lower")


@dataclass(frozen=True)
class Passes:
    """What one rank computes over its part of the vocabulary, chunk by chunk.

    `columns` are the targets' rows of this rank's part, [tokens]; a target that another rank holds has some row of this one.
    """

    statistics: Callable[[Tensor, Tensor, Tensor, Vocabulary, Tensor], None]
    """Called in the forward pass as statistics(hidden, weight, columns, vocabulary, into): writes m = max z, Σ exp(z - m),
    Σ (z - m) · exp(z - m) and the target's logit z[t] of each token into a tensor [tokens, 4]."""
    gradients: Callable[[Tensor, Tensor, Tensor, Vocabulary, Tensor], tuple[Tensor, Tensor]]
    """Called in the backward pass as gradients(hidden, weight, columns, vocabulary, per_token): returns the gradients of
    hidden states and of the output layer. `per_token` is [tokens, 5]: log-partition, entropy, gradients of entropy and
    log-probability, and the latter once more with zeros where another rank holds the target."""


class _FusedLogprob(torch.autograd.Function):
    """Computes log p[target] and H = -Σ p log p of each token.

    With z the logits and p their softmax over the whole vocabulary, ∂ log p[t] / ∂z = 1[t] - p and ∂H / ∂z = -p · (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, passes: Passes
    ) -> tuple[Tensor, Tensor]:
        # Made before the passes: small tensors that stay, made between large ones that go, would keep the heap from shrinking.
        statistics = hidden.new_empty(len(hidden), 4, dtype=torch.promote_types(hidden.dtype, torch.float32))
        passes.statistics(hidden, weight, _columns(targets, weight, vocabulary), vocabulary, statistics)
        maximum, normaliser, weighted, target = statistics.T.contiguous()
        target = torch.where(_is_local(targets, weight, vocabulary), target, 0.0)
        overall = maximum.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group=vocabulary.group)
        # A rank's sums are relative to its own maximum m. Relative to the maximum M of all ranks, with d = m - M, they are
        # Σ exp(z - M) = exp(d) · Σ exp(z - m)
        # Σ (z - M) · exp(z - M) = exp(d) · (Σ (z - m) · exp(z - m) + d · Σ exp(z - m)).
        shift = maximum - overall
        scale = shift.exp()
        # Where exp(d) is 0, d may be large enough for the product to overflow, and 0 · ∞ would be no number.
        weighted = (weighted + torch.where(scale > 0, shift, 0.0) * normaliser) * scale
        sums = torch.stack([normaliser * scale, weighted, target])
        dist.all_reduce(sums, group=vocabulary.group)
        # With Z = Σ exp(z - M): log p = z - M - log Z, so H = log Z - Σ (z - M) · exp(z - M) / Z.
        log_normaliser = sums[0].log()
        entropy = log_normaliser - sums[1] / sums[0]
        log_partition = overall + log_normaliser
        ctx.save_for_backward(hidden, weight, targets, log_partition, entropy)
        ctx.vocabulary, ctx.passes = vocabulary, passes
        return sums[2] - log_partition, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, log_partition, entropy = ctx.saved_tensors
        grad_targets = grad_logprobs * _is_local(targets, weight, ctx.vocabulary)
        per_token = torch.stack([log_partition, entropy, grad_entropy, grad_logprobs, grad_targets], 1)
        columns = _columns(targets, weight, ctx.vocabulary)
        return *ctx.passes.gradients(hidden, weight, columns, ctx.vocabulary, per_token), None, None, None


def _statistics_of_chunks(hidden: Tensor, weight: Tensor, columns: Tensor, vocabulary: Vocabulary, into: Tensor) -> None:
    """Do what `Passes.statistics` says, in chunks of tokens with this rank's whole vocabulary."""
    matrix = real_rows(weight, vocabulary)
    for tokens in _chunks(hidden, weight):
        for block in _blocks(_logits(hidden[tokens], matrix, vocabulary), columns[tokens, None], into[tokens]):
            _statistics(*block)


def _gradients_of_chunks(
    hidden: Tensor, weight: Tensor, columns: Tensor, vocabulary: Vocabulary, per_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `Passes.gradients` says, in chunks of tokens with this rank's whole vocabulary."""
    matrix, grad_hidden = real_rows(weight, vocabulary), torch.empty_like(hidden)
    # Summed over the chunks in float32; the rows that only pad keep their zeros.
    grad_weight = torch.zeros(weight.shape, dtype=per_token.dtype, device=weight.device)
    grad_matrix = grad_weight[: len(matrix)]
    for tokens in _chunks(hidden, weight):
        grad = _logits(hidden[tokens], matrix, vocabulary)
        for logits, of_tokens, of_targets in _blocks(grad, per_token[tokens], columns[tokens, None]):
            _to_gradient_(logits, of_tokens, of_targets, vocabulary.temperature)
        grad = grad.to(matrix.dtype)
        grad_hidden[tokens] = (grad @ matrix).to(hidden.dtype)
        if grad.dtype is grad_matrix.dtype:
            grad_matrix.addmm_(grad.T, hidden[tokens].to(grad.dtype))
        else:
            grad_matrix += grad.T @ hidden[tokens]
    return grad_hidden, grad_weight.to(weight.dtype)


TORCH = Passes(_statistics_of_chunks, _gradients_of_chunks)


def logprob_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, passes: Passes = TORCH
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target and the entropy of each distribution, at the sampling temperature.

    Collective over `vocabulary.group`.

    Args:
        hidden: [tokens, hidden], the last layer's normed output; the same on every rank of the group. Its gradient is this
            rank's part of a sum over the group.
        weight: [local vocabulary, hidden], this rank's rows of the output layer.
        targets: [tokens], token ids.

    Returns:
        Two tensors [tokens], nats, float32 (float64 where `hidden` is); the same on every rank of the group.
    """
    return _FusedLogprob.apply(hidden, weight, targets, vocabulary, passes)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Cut the tokens so that the logits of one part take `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (4 * len(weight)))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all arguments into views of the same rows: on the host `BLOCK_BYTES` of logits, on CUDA all of them."""
    rows = len(logits) if logits.is_cuda else max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def _statistics(logits: Tensor, targets: Tensor, into: Tensor) -> None:
    """Write m = max z, Σ exp(z - m), Σ (z - m) · exp(z - m) and the target's logit z[t] of each row; overwrites the logits.

    Args:
        targets: [rows, 1] columns of the targets.
        into: [rows, 4].
    """
    maximum, normaliser, weighted, target = into.unbind(1)
    target.copy_(logits.gather(1, targets).squeeze(1))
    maximum.copy_(logits.amax(dim=-1))
    shifted = logits.sub_(maximum[:, None])
    exponentials = shifted.exp()
    normaliser.copy_(exponentials.sum(dim=-1))
    weighted.copy_(exponentials.mul_(shifted).sum(dim=-1))


def _to_gradient_(logits: Tensor, of_tokens: Tensor, targets: Tensor, temperature: float) -> None:
    """Turn logits into the gradient of the loss by the logits before the temperature, in place.

    Args:
        of_tokens: [rows, 5] log-partition, entropy, gradients of entropy and log-probability, and the latter once more with
            zeros where another rank holds the target.
        targets: [rows, 1] columns of the targets.
    """
    log_partition, entropy, grad_entropy, grad_logprobs, grad_targets = of_tokens.split(1, dim=1)
    logp = logits.sub_(log_partition)
    p = logp.exp()
    # -p · ((log p + H) · g_H + g_logp) / T
    logp.mul_(-grad_entropy / temperature).sub_((entropy * grad_entropy + grad_logprobs) / temperature).mul_(p)
    logp.scatter_add_(1, targets, grad_targets / temperature)


def real_rows(weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the output layer's real rows, in the precision of their matrix products.

    On the host that is at least float32: it has no product of bfloat16 with a float32 result.
    """
    weight = weight[: vocabulary.size - vocabulary.first]
    return weight if weight.is_cuda else weight.to(torch.promote_types(weight.dtype, torch.float32))


def _columns(targets: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the targets' rows of this rank's part, [tokens]; some real row for a target that another rank holds."""
    return (targets - vocabulary.first).clamp(0, min(len(weight), vocabulary.size - vocabulary.first) - 1)


def _is_local(targets: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return which targets are rows of this rank, bool [tokens]."""
    return (targets >= vocabulary.first) & (targets < vocabulary.first + len(weight))


def _logits(hidden: Tensor, matrix: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Compute logits divided by the temperature, [tokens, local real vocabulary] in float32 (float64 where `matrix` is)."""
    logits = product(hidden.to(matrix.dtype), matrix.T)
    return logits if vocabulary.temperature == 1 else logits.div_(vocabulary.temperature)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices of one dtype; on CUDA the result of two in bfloat16 is float32."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype is torch.bfloat16 else left @ right
