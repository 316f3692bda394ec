"""Log-probabilities and entropy from hidden states, beside the dense computation: memory, time, exactness.

    .venv/bin/python benchmarks/logprob.py                                          # one rank
    .venv/bin/torchrun --nproc-per-node=2 benchmarks/logprob.py                     # the vocabulary cut over two

The size asked about is 32,768 tokens × 151,936 rows of vocabulary. Both computations are linear in the tokens, so a slice
of them is measured (--tokens) with the whole vocabulary, and memory is scaled: what grows with the tokens by their
number, the rest (gradient of the output layer, one chunk) not at all. Every run of a computation is a process of its
own, whose peak is the kernel's high-water mark above what it held before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hpt.actor.model import logprob
from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy

FULL_TOKENS, VOCAB = 32_768, 151_936


def memory(key: str) -> int:
    """This process's memory in bytes: VmRSS now, VmHWM its high-water mark."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def inputs(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same hidden states, output layer rows (this rank's), targets and loss weights on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = (torch.randn(VOCAB, width, generator=generator, dtype=dtype) * 3 / width**0.5).chunk(dist.get_world_size())
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    weights = torch.rand(2, tokens, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight[dist.get_rank()].clone().requires_grad_(), targets, weights


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours."""
    return logprob_and_entropy(hidden, weight, targets, Vocabulary(VOCAB, dist.get_rank() * len(weight), dist.group.WORLD))


def dense(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a training loop without a kernel of its own does (one rank)."""
    logp = (hidden @ weight.T).log_softmax(dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)


def measure(compute, tokens: int, width: int) -> dict[str, float]:
    """Peak memory above the inputs, and the better of two forward and backward passes."""
    hidden, weight, targets, weights = inputs(tokens, width, torch.float32)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before, seconds = memory("VmRSS"), []
    for _ in range(2):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        (torch.stack(compute(hidden, weight, targets)) * weights).sum().backward()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "bytes": memory("VmHWM") - before}


def error(tokens: int, width: int) -> float:
    """Largest relative error (norm of the difference) of values and gradients against dense float64."""
    hidden, weight, targets, weights = inputs(tokens, width, torch.float32)
    both = torch.stack(fused(hidden, weight, targets))
    (both * weights).sum().backward()
    dist.all_reduce(hidden.grad)
    exact = [x.detach().double().requires_grad_() for x in (hidden, _whole(weight))]
    expected = torch.stack(dense(*exact, targets))
    (expected * weights.double()).sum().backward()
    mine = exact[1].grad.chunk(dist.get_world_size())[dist.get_rank()]
    pairs = ((both[0], expected[0]), (both[1], expected[1]), (hidden.grad, exact[0].grad), (weight.grad, mine))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.detach())
    return torch.cat(parts)


def in_process(kind: str, tokens: int, width: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--only", kind, "--tokens", str(tokens), "--width", str(width)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return json.loads(subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout)


def report(tokens: int, width: int) -> None:
    """The table of one rank."""
    half, ours, theirs = (
        in_process(*what) for what in (("fused", tokens // 2, width), ("fused", tokens, width), ("dense", tokens, width))
    )
    growth = max(4.0 * width, ours["bytes"] - half["bytes"]) / (tokens - tokens // 2)
    extra = ours["bytes"] + growth * (FULL_TOKENS - tokens)
    logits = 4 * FULL_TOKENS * VOCAB
    print(
        f"{tokens} tokens x {VOCAB} rows, hidden {width}, float32, {torch.get_num_threads()} threads; chunks of "
        f"{logprob.CHUNK_BYTES >> 20} MiB"
    )
    print(f"peak extra memory   ours {ours['bytes'] / 2**30:.2f} GiB, dense {theirs['bytes'] / 2**30:.2f} GiB")
    print(f"  at {FULL_TOKENS} tokens   {extra / 2**30:.2f} GiB of {logits / 2**30:.1f} GiB dense logits: {extra / logits:.1%}")
    print(
        f"time                ours {ours['seconds']:.2f} s, dense {theirs['seconds']:.2f} s: "
        f"{ours['seconds'] / theirs['seconds']:.2f} times"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--only", choices=("fused", "dense"))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if arguments.only:
        compute = {"fused": fused, "dense": dense}[arguments.only]
        print(json.dumps(measure(compute, arguments.tokens, arguments.width)))
        return
    worst = error(96, 256)
    if dist.get_rank() == 0:
        print(f"relative error against dense float64, {dist.get_world_size()} tensor parallel rank(s): {worst:.1e}")
    if dist.get_world_size() == 1:
        report(arguments.tokens, arguments.width)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
