"""Log-probabilities from hidden states beside the dense computation: time, memory, error, by kernel and size of a chunk."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hpt.actor.model import logprob
from megatron_hpt.actor.model.logprob_choice import passes_by

from .measurement import Measurement, milliseconds, relative_error
from .sizes import Sizes

CHUNKS_MIB = (64, 256, 1024)
CHECK = "log-probabilities"
MOST = {"torch": (1.5, 0.35), "triton": (0.8, 0.15)}
"""By `actor.logprob_kernel`: time and memory as shares of the dense computation's, at most."""
VALUES = ("log-probabilities", "entropy")
GRADIENTS = ("gradient of hidden states", "gradient of the output layer")


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

    def ours(kernel: str) -> tuple[Tensor, Tensor]:
        return logprob.logprob_and_entropy(states, weight, targets, vocabulary, passes_by(kernel))

    expected, dense_ms, dense_gib = _measure(lambda: step(dense), device)
    yield Measurement(CHECK, "dense", dense_ms, "ms")
    yield Measurement(CHECK, "dense, peak memory", dense_gib, "GiB")
    usual, results, fastest = logprob.CHUNK_BYTES, {}, {}
    for kernel in _kernels(device):
        for mib in CHUNKS_MIB:
            logprob.CHUNK_BYTES, what = mib * 2**20, f"{kernel}, chunks of {mib} MiB"
            results[kernel], ms, gib = _measure(lambda chosen=kernel: step(lambda: ours(chosen)), device)
            fastest[kernel] = min(ms, fastest.get(kernel, ms))
            yield Measurement(CHECK, what, ms / dense_ms, "times dense", None, MOST[kernel][0])
            yield Measurement(CHECK, f"{what}, peak memory", gib / dense_gib, "of dense", None, MOST[kernel][1])
            yield _difference(f"{what}, difference from dense", VALUES + GRADIENTS, results[kernel], expected, 2e-2)
    logprob.CHUNK_BYTES = usual
    yield from _decision(results, fastest)
    dist.destroy_process_group()


def _kernels(device: torch.device) -> tuple[str, ...]:
    return ("torch", "triton") if device.type == "cuda" and importlib.util.find_spec("triton") else ("torch",)


def _decision(results: dict[str, tuple[Tensor, ...]], fastest: dict[str, float]) -> Iterator[Measurement]:
    """What `actor.logprob_kernel` should be: Triton's kernel beside torch's operations, whose products are float32 too."""
    if "triton" not in results:
        yield Measurement(CHECK, "triton", note="needs a GPU and the package triton")
        return
    found, expected = results["triton"], results["torch"]
    yield _difference("triton, difference from torch", VALUES, found[:2], expected[:2], 1e-5)
    yield _difference("triton, difference from torch", GRADIENTS, found[2:], expected[2:], 1e-2)
    note = "the shortest of each; below 1, set actor.logprob_kernel=triton"
    yield Measurement(CHECK, "triton", fastest["triton"] / fastest["torch"], "times torch", None, 1.0, note)


def _difference(
    what: str, names: tuple[str, ...], found: tuple[Tensor, ...], expected: tuple[Tensor, ...], most: float
) -> Measurement:
    """Return the largest relative error, by name."""
    errors = {name: relative_error(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    worst = max(errors, key=errors.get)
    return Measurement(CHECK, f"{what} ({worst})", errors[worst], "", None, most)


def _measure(work: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[tuple[Tensor, ...], float, float]:
    """Return what `work` returns, its milliseconds, and GiB at the peak (1 on the host, where memory is not counted)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(work, device, warm=2, repeats=5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 1.0
    return tuple(t.clone() for t in work()), ms, peak
