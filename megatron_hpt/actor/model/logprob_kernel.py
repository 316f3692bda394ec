"""The passes of `logprob` in Triton, for GPUs: statistics and gradients of logits, each in one reading of them.

Imported only where `actor.logprob_kernel=triton` asks for it, because hosts have no Triton. No GPU has run it yet.

**What is fused.** The matrix products stay cuBLAS's. With 4096 hidden units a product takes about 10 ps of an H100 for each
logit (8192 FLOPs at 800 TFLOP/s). Torch's operations move 48 bytes for its statistics and 58 for its gradient, 14 and 17 ps at
3.35 TB/s; these kernels move 8 and 10 with what the products write and read, 2.4 and 3 ps. A kernel that multiplies too would
save those 2.4 ps, and lose more where it multiplies slower than cuBLAS; the gradient must be written anyway, for two products.

**Precision.** Logits are the float32 sums of the product, as in the reference: rounded to bfloat16, one of 32 would be off by
up to 1/16 nat. The gradient overwrites them in the precision of the products that follow (bfloat16 in the first half of each
row), so a tile takes `CHUNK_BYTES` and nothing beside it, where torch's passes take two and a half times as much; what the
products of a tile's gradient add takes as much again.

**Tiles** are cut along the vocabulary; the reference's chunks have all of it. A tile of all tokens gives the output layer's
gradient of its rows at once. Chunks of 450 tokens add to all rows each time (12 bytes a weight, three times as long as their
product) and need a float32 gradient of the whole output layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hpt.actor.model import logprob
from megatron_hpt.actor.model.logprob import Passes, Vocabulary, product, real_rows

TILE_TOKENS = 16384
"""Tokens of a tile at most: more of them are several tiles, whose gradients of the output layer are added up in float32."""
ALIGNMENT = 128
"""Columns of a tile are a multiple of this, so that every row but those of the last tile begins where vector loads may."""
BLOCK = 2048
"""Columns of a row that a program works on at a time."""
WARPS = 4
LOWEST = float(torch.finfo(torch.float32).min)
"""Where maxima start: finite, because -∞ less -∞ would be no number in a row that begins with impossible tokens."""


def _statistics(hidden: Tensor, weight: Tensor, columns: Tensor, vocabulary: Vocabulary, into: Tensor) -> None:
    """Do what `Passes.statistics` says."""
    matrix = real_rows(weight, vocabulary)
    into.zero_()[:, 0] = LOWEST
    for tokens in _slices(len(hidden), TILE_TOKENS):
        for rows in _slices(len(matrix), _tile_columns(*hidden[tokens].shape)):
            _add_statistics(hidden[tokens], matrix[rows], columns[tokens] - rows.start, vocabulary, into[tokens])


def _add_statistics(hidden: Tensor, rows: Tensor, columns: Tensor, vocabulary: Vocabulary, into: Tensor) -> None:
    """Merge a tile's statistics into those of the tiles before it; a function, so that one tile is freed before the next."""
    logits = product(hidden.to(rows.dtype), rows.T)
    statistics_kernel[(len(logits),)](
        logits, columns, into, logits.stride(0), len(rows), 1 / vocabulary.temperature, BLOCK=BLOCK, num_warps=WARPS
    )


def _gradients(
    hidden: Tensor, weight: Tensor, columns: Tensor, vocabulary: Vocabulary, per_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `Passes.gradients` says."""
    matrix, grad_hidden = real_rows(weight, vocabulary), torch.empty_like(hidden)
    is_one = len(hidden) <= TILE_TOKENS
    # With one tile of tokens every row is written once, and summed by the product alone. The rows that only pad keep zeros.
    grad_weight = torch.zeros(weight.shape, dtype=weight.dtype if is_one else per_token.dtype, device=weight.device)
    for tokens in _slices(len(hidden), TILE_TOKENS):
        states = hidden[tokens].to(matrix.dtype)
        grad_states = torch.zeros(states.shape, dtype=per_token.dtype, device=states.device)
        for rows in _slices(len(matrix), _tile_columns(*states.shape)):
            grad = _gradient_of_tile(states, matrix[rows], columns[tokens] - rows.start, vocabulary, per_token[tokens])
            grad_states += product(grad, matrix[rows])
            grad_weight[rows] += product(grad.T, states)
            del grad  # freed before the next tile is made
        grad_hidden[tokens] = grad_states.to(hidden.dtype)
    return grad_hidden, grad_weight.to(weight.dtype)


def _gradient_of_tile(states: Tensor, rows: Tensor, columns: Tensor, vocabulary: Vocabulary, per_token: Tensor) -> Tensor:
    """Compute a tile's gradient by the logits before the temperature, [tokens, rows] in the precision of `states`.

    It lies where the logits were, so its rows are as far apart as theirs.
    """
    logits = product(states, rows.T)
    grad = logits.view(states.dtype)[:, : len(rows)]
    gradient_kernel[(len(logits),)](
        logits,
        grad,
        columns,
        per_token,
        logits.stride(0),
        grad.stride(0),
        len(rows),
        1 / vocabulary.temperature,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return grad


TRITON = Passes(_statistics, _gradients)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _tile_columns(tokens: int, hidden: int) -> int:
    """Return of how many columns logits, and gradients of the output layer, take at most `CHUNK_BYTES` each, in float32."""
    return max(ALIGNMENT, logprob.CHUNK_BYTES // (4 * max(tokens, hidden)) // ALIGNMENT * ALIGNMENT)


@triton.jit
def statistics_kernel(logits, columns, into, row_stride, width, inverse_temperature, BLOCK: tl.constexpr):
    """Merge the statistics of a row of logits into `into`; one program a row.

    Args:
        logits: [rows, width], float32 or bfloat16; divided by the temperature here.
        columns: [rows], int64, the targets' columns; one outside of this tile leaves the target's logit alone.
        into: [rows, 4], float32, what `Passes.statistics` writes, of the tiles before this one.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    into += row * 4
    lanes = tl.arange(0, BLOCK)
    # All lanes share one maximum, so their sums are added up at the end only; lane 0 has those of the tiles before.
    maximum = tl.load(into)
    normaliser = tl.where(lanes == 0, tl.load(into + 1), 0.0)
    weighted = tl.where(lanes == 0, tl.load(into + 2), 0.0)
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        z = tl.load(logits + start + lanes, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        larger = tl.maximum(maximum, tl.max(z, 0))
        shift = maximum - larger
        scale = tl.exp(shift)
        exponentials = tl.exp(z - larger)
        # Where an exponential is 0, what it is multiplied by may be infinite. Compared so, no number stays no number.
        terms = tl.where(exponentials == 0, 0.0, z - larger) * exponentials
        weighted = (weighted + tl.where(scale == 0, 0.0, shift) * normaliser) * scale + terms
        normaliser = normaliser * scale + exponentials
        maximum = larger
    tl.store(into, maximum)
    tl.store(into + 1, tl.sum(normaliser, 0))
    tl.store(into + 2, tl.sum(weighted, 0))
    column = tl.load(columns + row)
    is_here = (column >= 0) & (column < width)
    tl.store(into + 3, tl.load(logits + column, mask=is_here, other=0.0).to(tl.float32) * inverse_temperature, mask=is_here)


@triton.jit
def gradient_kernel(logits, grad, columns, per_token, row_stride, grad_stride, width, inverse_temperature, BLOCK: tl.constexpr):
    """Write the gradient of a row of logits, which may lie over the row itself; one program a row.

    Args:
        logits: [rows, width], float32 or bfloat16; divided by the temperature here.
        grad: [rows, width], any precision that is no wider than the logits'.
        columns: as of `statistics_kernel`.
        per_token: [rows, 5], float32, what `Passes.gradients` is given.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    grad += row * grad_stride
    per_token += row * 5
    lanes = tl.arange(0, BLOCK)
    log_partition = tl.load(per_token)
    entropy = tl.load(per_token + 1)
    grad_entropy = tl.load(per_token + 2)
    grad_logprob = tl.load(per_token + 3)
    grad_target = tl.load(per_token + 4) * inverse_temperature
    column = tl.load(columns + row)
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        z = tl.load(logits + start + lanes, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        logp = z - log_partition
        p = tl.exp(logp)
        logp = tl.where(p == 0, 0.0, logp)
        # -p · ((log p + H) · g_H + g_logp) / T, and g_logp / T more at the target
        gradient = -p * ((logp + entropy) * grad_entropy + grad_logprob) * inverse_temperature
        gradient += tl.where(start + lanes == column, grad_target, 0.0)
        # Narrower numbers of this block lie over wider ones of the same and earlier blocks, which every warp must have read.
        tl.debug_barrier()
        tl.store(grad + start + lanes, gradient.to(grad.dtype.element_ty), mask=inside)
