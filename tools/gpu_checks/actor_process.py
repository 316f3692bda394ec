"""The process of one variant of the actor: it computes what `actor` compares and times, with the product's own code."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hpt.plan.timing import flops_per_token

from .sizes import Workload, on_gpu, on_host, write_model
from .variants import Variant

SETTLING = 3
"""Passes before a loss or gradient is measured: delayed scaling takes its scales from passes before, and has none at first."""


def _actor(variant: Variant, model: Path, load: Workload, **actor: Any):
    """Set up the product's own actor on one rank."""
    from megatron_hpt.actor.platform import Platform
    from megatron_hpt.actor.state import build_actor
    from megatron_hpt.config import (
        ActorConfig,
        AlgorithmConfig,
        Config,
        DataConfig,
        EntropyConfig,
        ModelConfig,
        OptimizerConfig,
        TrainerConfig,
    )

    if variant.layers == "ours":
        Platform.has_transformer_engine = False
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    config = Config(
        name="gpu_check",
        model=ModelConfig(path=str(model), dtype=variant.dtype),
        data=DataConfig(train="none", max_prompt_length=load.row_tokens, max_response_length=load.row_tokens),
        algorithm=AlgorithmConfig(name=load.algorithm, entropy=EntropyConfig(coefficient=load.entropy)),
        actor=ActorConfig(
            micro_batch_tokens=load.micro_batch_tokens,
            fp8=variant.fp8,
            bf16_layers=0 if variant.fp8 in ("none", "delayed") else 1,
            recompute=load.recompute,
            threads=os.cpu_count() or 1,
            **actor,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        trainer=TrainerConfig(steps=100),
    )
    return build_actor(config)


def _rows(load: Workload, vocab: int, ragged: bool = False) -> list[Any]:
    """Make rollouts and demonstrations of random tokens in turn; a quarter of each is its prompt. SFT has demonstrations alone,
    and trains every token."""
    from megatron_hpt.batch.rows import Row, Source

    rng, rows, longest = random.Random(0), [], load.row_tokens
    for index in range(load.rows):
        length = rng.randint(longest // 3, longest) if ragged else longest
        tokens = [rng.randrange(vocab) for _ in range(length)]
        if load.algorithm == "sft":
            rows.append(Row(str(index), index, Source.DEMONSTRATION, tokens, 1, None, None, 1.0, 1.0, None))
        elif index % 2:
            rows.append(Row(str(index), index, Source.DEMONSTRATION, tokens, length // 4, None, None, 1.0, 1.0, None))
        else:
            logprobs, advantage = [-9.0] * (length - length // 4), rng.uniform(-1, 1)
            rows.append(Row(str(index), index, Source.ROLLOUT, tokens, length // 4, logprobs, 1.0, advantage, 1.0, 0, "stop"))
    return rows


def _settled(actor: Any, rows: Sequence[Any]) -> float:
    """Return the loss after `SETTLING` passes over the same rows and weights; the last one's gradient is in the buffers."""
    from megatron_hpt.actor.train_step import accumulate

    losses = [accumulate(actor, rows)[0]["loss"] for _ in range(SETTLING)]
    return losses[-1]


def _gradient(variant: Variant, load: Workload, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.model.policy import contributed_views
    from megatron_hpt.models.hf_config import model_shape

    actor = _actor(variant, model, load)
    loss = _settled(actor, _rows(load, actor.vocab, ragged=True))
    views = contributed_views(actor.chunks, model_shape(model), actor.ranks, of=lambda parameter: parameter.main_grad)
    gradient: dict[str, Tensor] = {}
    for view in views:
        whole = gradient.setdefault(view.name, torch.zeros(view.shape))
        box = tuple(slice(o, o + e) for o, e in zip(view.offset, view.extent, strict=True))
        whole[box] = view.read().float().cpu()
    return {"loss": loss, "gradient": gradient}


def _steps(variant: Variant, load: Workload, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.model.policy import kernels_of_run
    from megatron_hpt.actor.train_step import train_step
    from megatron_hpt.models.hf_config import model_shape

    actor = _actor(variant, model, load)
    rows = _rows(load, actor.vocab)
    loss = _settled(actor, rows)
    train_step(actor, rows, 0)  # the optimizer's first step allocates
    _synchronize()
    started = time.perf_counter()
    for step in range(load.steps):
        train_step(actor, rows, 1 + step)
    _synchronize()
    seconds = (time.perf_counter() - started) / load.steps
    used = kernels_of_run(model_shape(model), actor.config, actor.platform)
    return {
        "loss": loss,
        "tokens_per_second": load.rows * load.row_tokens / seconds,
        "kernels": ", ".join(flag for flag, on in used.items() if on) or "none of Megatron-Core's fused ones",
        "flops_per_token": flops_per_token(model_shape(model), load.row_tokens),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def _memory(variant: Variant, load: Workload, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.checkpoint import Saver
    from megatron_hpt.actor.train_step import train_step

    actor = _actor(variant, model, load, offload="all")
    train_step(actor, _rows(replace(load, rows=2), actor.vocab), 0)
    weights = [p.detach().clone().cpu() for chunk in actor.chunks for p in chunk.parameters()]
    before = _held()
    started = time.perf_counter()
    given = actor.offload.sleep()
    asleep = _held()
    actor.offload.wake()
    _synchronize()
    seconds = time.perf_counter() - started
    now = [p.detach().cpu() for chunk in actor.chunks for p in chunk.parameters()]
    saver, times = Saver(actor.platform, actor.config.model.path), []
    with tempfile.TemporaryDirectory(dir=".") as folder, actor.offload.optimizer():
        for step in range(2):  # the first one starts helpers
            saving = time.perf_counter()
            saver.save(Path(folder) / f"step_{step:06}", step, actor.chunks, actor.optimizer)
            blocked = time.perf_counter() - saving
            saver.finish()
            times.append(blocked / (time.perf_counter() - saving))
    return {
        "before_gib": before,
        "asleep_gib": asleep,
        "rate": 2 * given / seconds / 1e9,
        "equal": float(all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))),
        "blocked": times[-1],
    }


def _held() -> float:
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_KINDS = {
    "gradient": (_gradient, "parity"),
    "steps": (_steps, "hybrid"),
    "supervised": (_steps, "supervised"),
    "memory": (_memory, "hybrid"),
}
"""What a process may be asked for: the function, and the workload of `Sizes`, whose model has a folder of that name."""


def main(arguments: Sequence[str]) -> None:
    """Be the process of one variant; the arguments are KIND VARIANT FOLDER [rehearse]."""
    kind, variant, folder, *rehearse = arguments
    compute, name = _KINDS[kind]
    load = getattr(on_host() if rehearse else on_gpu(), name)
    found = compute(Variant(**json.loads(variant)), load, write_model(Path(name), load.model))
    torch.save(found, Path(folder) / "found.pt")
    from megatron_hpt.actor.parallel import shutdown

    shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
