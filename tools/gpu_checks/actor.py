"""The actor on one GPU: its gradient against the host's, its speed by layers and precision, memory that it gives back."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hpt.actor.model.precision import this_machine
from megatron_hpt.plan.timing import flops_per_token

from .measurement import Measurement, relative_error
from .sizes import Sizes, on_gpu, on_host, write_model


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    name: str
    layers: str
    """"transformer engine" or "ours"."""
    dtype: str = "bfloat16"
    fp8: str = "none"

    def missing(self) -> str:
        """Why the variant cannot run here; empty where it can."""
        is_engine = this_machine().engine is not None and torch.cuda.is_available()
        return "" if self.layers == "ours" or is_engine else "Transformer Engine is not installed here"


OURS = Variant("our layers, bfloat16", "ours")
ENGINE = Variant("Transformer Engine, bfloat16", "transformer engine")
FP8 = [
    Variant(f"Transformer Engine, FP8 {name}", "transformer engine", fp8=name)
    for name in ("tensorwise", "delayed", "blockwise")
]
FLOAT32 = Variant("our layers, float32", "ours", dtype="float32")


def parity(sizes: Sizes) -> Iterator[Measurement]:
    """Compare loss and gradient of one ragged batch with the host's in float32."""
    host = _child("gradient", FLOAT32, sizes, {"CUDA_VISIBLE_DEVICES": ""})
    for variant, limit in ((FLOAT32, 1e-4), (OURS, 3e-2), (ENGINE, 3e-2)):
        if reason := variant.missing():
            yield Measurement("parity with the host", variant.name, note=reason)
            continue
        found = _child("gradient", variant, sizes)
        loss = abs(found["loss"] - host["loss"]) / abs(host["loss"])
        yield Measurement("parity with the host", f"{variant.name}: loss", loss, "relative error", None, limit)
        errors = {name: relative_error(found["gradient"][name], g) for name, g in host["gradient"].items()}
        worst = max(errors, key=errors.get)
        yield Measurement("parity with the host", f"{variant.name}: gradient of {worst}", errors[worst], "", None, limit)


def steps(sizes: Sizes, ceiling: float | None) -> Iterator[Measurement]:
    """Time training steps of the timed model in every variant.

    Args:
        ceiling: measured TFLOP/s of a bfloat16 matrix product.
    """
    reference, engine_rate = None, None
    for variant in (OURS, ENGINE, *FP8):
        if reason := variant.missing():
            yield Measurement("steps", variant.name, note=reason)
            continue
        try:
            found = _child("steps", variant, sizes)
        except RuntimeError as error:  # the others are still worth their time
            yield Measurement("steps", variant.name, note=str(error))
            continue
        low, high = (20_000, 40_000) if variant.layers != "ours" else (12_000, 36_000)
        rate = found["tokens_per_second"]
        if variant is ENGINE:
            engine_rate = rate
        if variant.fp8 == "none":
            yield Measurement("steps", variant.name, rate, "tokens/s", low, high)
            if ceiling:
                share = rate * found["flops_per_token"] / 1e12 / ceiling
                yield Measurement("steps", f"{variant.name}: share of the bfloat16 ceiling", share, "", 0.2, 0.5)
        elif engine_rate:
            yield Measurement("steps", variant.name, rate / engine_rate, "times bfloat16", 0.9, 1.4)
        yield Measurement("steps", f"{variant.name}: peak memory", found["peak_gib"], "GiB", None, 60)
        reference = reference or found["loss"]
        if variant.fp8 != "none":  # equal to the last digit: FP8 was ignored
            difference = abs(found["loss"] - reference) / abs(reference)
            yield Measurement("steps", f"{variant.name}: loss beside bfloat16", difference, "relative difference", 1e-9, 2e-2)


def memory(sizes: Sizes) -> Iterator[Measurement]:
    """Measure what a sleeping actor gives back, how fast it wakes, and how long a save holds training up."""
    variant = ENGINE if not ENGINE.missing() else OURS
    found = _child("memory", variant, sizes)
    yield Measurement("memory", "held before sleep", found["before_gib"], "GiB")
    yield Measurement("memory", "held asleep", found["asleep_gib"], "GiB", None, 1)
    yield Measurement("memory", "sleep and wake", found["rate"], "GB/s", 10, 64)
    yield Measurement("memory", "weights after waking equal those before", found["equal"], "", 1, 1)
    yield Measurement("memory", "a save keeps training, of its whole time", found["blocked"], "", None, 0.5)


def _child(kind: str, variant: Variant, sizes: Sizes, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a variant in a process of its own: Megatron's state is global, and memory is measured from zero."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rehearse = [] if sizes.has_expectations else ["rehearse"]
        arguments = [kind, json.dumps(vars(variant)), folder, *rehearse]
        done = subprocess.run(
            [sys.executable, "-m", "gpu_checks.actor", *arguments],
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(f"{variant.name} failed: {done.stderr.strip().splitlines()[-1]}")
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _actor(variant: Variant, model: Path, sizes: Sizes, **actor: Any):
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
        data=DataConfig(train="none", max_prompt_length=sizes.row_tokens, max_response_length=sizes.row_tokens),
        algorithm=AlgorithmConfig(name="hpt", entropy=EntropyConfig(coefficient=0.01)),
        actor=ActorConfig(
            micro_batch_tokens=sizes.micro_batch_tokens,
            fp8=variant.fp8,
            bf16_layers=0 if variant.fp8 in ("none", "delayed") else 1,
            recompute="selective",
            threads=os.cpu_count() or 1,
            **actor,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        trainer=TrainerConfig(steps=100),
    )
    return build_actor(config)


def _rows(number: int, longest: int, vocab: int, ragged: bool):
    """Make rollouts and demonstrations of random tokens; a quarter of each row is its prompt."""
    from megatron_hpt.batch.rows import Row, Source

    rng, rows = random.Random(0), []
    for index in range(number):
        length = rng.randint(longest // 3, longest) if ragged else longest
        tokens, prompt = [rng.randrange(vocab) for _ in range(length)], length // 4
        if index % 2:
            rows.append(Row(str(index), index, Source.DEMONSTRATION, tokens, prompt, None, None, 1.0, 1.0, None))
        else:
            logprobs = [-9.0] * (length - prompt)
            rows.append(
                Row(str(index), index, Source.ROLLOUT, tokens, prompt, logprobs, 1.0, rng.uniform(-1, 1), 1.0, 0, "stop")
            )
    return rows


def _gradient(variant: Variant, sizes: Sizes, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.model.policy import contributed_views
    from megatron_hpt.actor.train_step import accumulate
    from megatron_hpt.models.hf_config import model_shape

    actor = _actor(variant, model, sizes)
    sums, _ = accumulate(actor, _rows(6, sizes.parity_tokens, actor.vocab, ragged=True))
    views = contributed_views(actor.chunks, model_shape(model), actor.ranks, of=lambda parameter: parameter.main_grad)
    gradient: dict[str, Tensor] = {}
    for view in views:
        whole = gradient.setdefault(view.name, torch.zeros(view.shape))
        box = tuple(slice(o, o + e) for o, e in zip(view.offset, view.extent, strict=True))
        whole[box] = view.read().float().cpu()
    return {"loss": sums["loss"], "gradient": gradient}


def _steps(variant: Variant, sizes: Sizes, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.train_step import train_step
    from megatron_hpt.models.hf_config import model_shape

    actor = _actor(variant, model, sizes)
    rows = _rows(sizes.rows, sizes.row_tokens, actor.vocab, ragged=False)
    first = train_step(actor, rows, 0)
    for step in range(1, sizes.steps):
        train_step(actor, rows, step)
    _synchronize()
    started = time.perf_counter()
    for step in range(sizes.steps):
        train_step(actor, rows, sizes.steps + step)
    _synchronize()
    seconds = (time.perf_counter() - started) / sizes.steps
    return {
        "loss": first["train/loss"],
        "tokens_per_second": sizes.rows * sizes.row_tokens / seconds,
        "flops_per_token": flops_per_token(model_shape(model), sizes.row_tokens),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def _memory(variant: Variant, sizes: Sizes, model: Path) -> dict[str, Any]:
    from megatron_hpt.actor.checkpoint import Saver
    from megatron_hpt.actor.train_step import train_step

    actor = _actor(variant, model, sizes, offload="all")
    train_step(actor, _rows(2, sizes.row_tokens, actor.vocab, ragged=False), 0)
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


_KINDS = {"gradient": _gradient, "steps": _steps, "memory": _memory}


def main(arguments: Sequence[str]) -> None:
    """Be the process of one variant; the arguments are KIND VARIANT FOLDER [rehearse]."""
    kind, variant, folder, *rehearse = arguments
    sizes = on_host() if rehearse else on_gpu()
    name = "parity" if kind == "gradient" else "model"
    model = write_model(Path(name), getattr(sizes, name))
    torch.save(_KINDS[kind](Variant(**json.loads(variant)), sizes, model), Path(folder) / "found.pt")
    from megatron_hpt.actor.parallel import shutdown

    shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
