"""Log-probabilities from hidden states beside the dense computation: time, memory, error, and the size of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hpt.actor.model import logprob

from .measurement import Measurement, milliseconds, relative_error
from .sizes import Sizes

CHUNKS_MIB = (64, 256, 1024)


def log_probabilities(sizes: Sizes) -> Iterator[Measurement]:
    """Measure log-probabilities of chosen tokens and entropies, forward and backward, in bfloat16."""
    device = sizes.device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokens, hidden, vocab = sizes.logprob
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=device).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device) * 3 / hidden**0.5).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device)
    weights = torch.rand(2, tokens, device=device)
    vocabulary = logprob.Vocabulary(vocab, 0, dist.group.WORLD)

    def step(compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        states.grad = weight.grad = None
        values = compute()
        (torch.stack(values) * weights).sum().backward()
        return (*(value.detach() for value in values), states.grad, weight.grad)

    def dense() -> tuple[Tensor, Tensor]:
        logp = (states @ weight.T).float().log_softmax(dim=-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)

    def ours() -> tuple[Tensor, Tensor]:
        return logprob.logprob_and_entropy(states, weight, targets, vocabulary)

    expected, dense_ms, dense_gib = _measure(lambda: step(dense), device)
    yield Measurement("log-probabilities", "dense", dense_ms, "ms")
    yield Measurement("log-probabilities", "dense, peak memory", dense_gib, "GiB")
    usual = logprob.CHUNK_BYTES
    for mib in CHUNKS_MIB:
        logprob.CHUNK_BYTES, what = mib * 2**20, f"chunks of {mib} MiB"
        found, ms, gib = _measure(lambda: step(ours), device)
        yield Measurement("log-probabilities", what, ms / dense_ms, "times dense", None, 1.5)
        yield Measurement("log-probabilities", f"{what}, peak memory", gib / dense_gib, "of dense", None, 0.35)
        names = ("log-probabilities", "entropy", "gradient of hidden states", "gradient of the output layer")
        errors = {n: relative_error(a, b) for n, a, b in zip(names, found, expected, strict=True)}
        worst = max(errors, key=errors.get)
        yield Measurement("log-probabilities", f"{what}, difference from dense ({worst})", errors[worst], "", None, 2e-2)
    logprob.CHUNK_BYTES = usual
    dist.destroy_process_group()


def _measure(work: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[tuple[Tensor, ...], float, float]:
    """Return what `work` returns, its milliseconds, and GiB at the peak (1 on the host, where memory is not counted)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(work, device, warm=2, repeats=5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 1.0
    return tuple(t.clone() for t in work()), ms, peak
