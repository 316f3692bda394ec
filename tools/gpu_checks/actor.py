"""The actor on one GPU: its gradient against the host's, its speed by layers and precision, memory that it gives back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .measurement import Measurement, relative_error
from .sizes import Sizes, write_model
from .variants import ENGINE, FLOAT32, FP8, OURS, Variant

LEAST_FP8_DIFFERENCE = 1e-9
"""Of the losses of one forward pass: equal to the last digit means that FP8 was ignored."""
FP8_GRADIENT = (2e-2, 0.2)
"""Of a whole gradient in FP8, beside the same layers' in bfloat16. FP8 emulated on the host in the parity model, whose other
products stayed float32, gave 0.075 to 0.14, by recipe and by layers that stay in bfloat16; bfloat16 itself is below 0.02."""
FP8_WORST_GRADIENT = 0.35
"""Likewise of one tensor's: 0.13 to 0.22, of a projection to queries."""
PRIME_RL = 26_005
"""Tokens/s of prime-rl, Qwen3-0.6B, SFT, one H100: benchmarks/baselines at 559b447, two micro-batches of 8192 tokens a step,
every layer computed again in the backward pass, FlashAttention 3; 16.8 % of the peak, 31.7 GiB."""


def parity(sizes: Sizes) -> Iterator[Measurement]:
    """Compare loss and gradient of one ragged batch with the host's in float32, and FP8's with bfloat16 of the same layers.

    The processes run side by side where the machine has room: nothing is timed here.
    """
    write_model(Path("parity"), sizes.parity.model)  # once, before they all want it
    with ThreadPoolExecutor(sizes.processes) as pool:
        host = pool.submit(_child, "gradient", FLOAT32, sizes, {"CUDA_VISIBLE_DEVICES": ""})
        runs = {v: pool.submit(_child, "gradient", v, sizes) for v in (ENGINE, *FP8, OURS, FLOAT32) if not v.missing()}
        for variant, limit in ((FLOAT32, 1e-4), (OURS, 3e-2), (ENGINE, 3e-2)):
            yield from _compared(variant, "the host", runs.get(variant), host, high=limit, worst=limit)
        for variant in FP8:
            low, high = FP8_GRADIENT
            base = runs.get(ENGINE)
            yield from _compared(variant, ENGINE.name, runs.get(variant), base, high=high, worst=FP8_WORST_GRADIENT, low=low)


def _compared(
    variant: Variant,
    with_what: str,
    run: Future[dict[str, Any]] | None,
    base: Future[dict[str, Any]] | None,
    *,
    high: float,
    worst: float,
    low: float | None = None,
) -> Iterator[Measurement]:
    """Yield the differences of two runs that may still be under way, or why there are none.

    Args:
        run, base: what `_child` returns; None where a variant cannot run here.
        low, high: what the whole gradient may differ by; the loss at most by `high`, or 0.03 where that is less.
        worst: what the gradient of one tensor may differ by.
    """
    check = f"parity with {with_what}"
    if reason := variant.missing():
        yield Measurement(check, variant.name, note=reason)
        return
    try:
        found, expected = run.result(), base.result()
    except RuntimeError as error:  # the others are still worth their time
        yield Measurement(check, variant.name, note=str(error))
        return
    loss = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
    least = None if low is None else LEAST_FP8_DIFFERENCE
    yield Measurement(check, f"{variant.name}: loss", loss, "relative error", least, min(high, 3e-2))
    pairs = {name: (found["gradient"][name], gradient) for name, gradient in expected["gradient"].items()}
    whole = relative_error(*(torch.cat([pair[side].flatten() for pair in pairs.values()]) for side in (0, 1)))
    yield Measurement(check, f"{variant.name}: gradient", whole, "relative error", low, high)
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    name = max(errors, key=errors.get)
    yield Measurement(check, f"{variant.name}: gradient of {name}", errors[name], "relative error", None, worst)


def steps(sizes: Sizes, ceiling: float | None) -> Iterator[Measurement]:
    """Time training steps of the timed model in every variant.

    Args:
        ceiling: measured TFLOP/s of a bfloat16 matrix product.
    """
    engine: Mapping[str, Any] | None = None
    for variant in (ENGINE, *FP8, OURS):
        found = yield from _timed("steps", variant, sizes)
        if found is None:
            continue
        rate = found["tokens_per_second"]
        if variant.fp8 == "none":
            low, high = (20_000, 40_000) if variant is ENGINE else (12_000, 36_000)
            yield Measurement("steps", variant.name, rate, "tokens/s", low, high, found["kernels"])
        else:
            yield Measurement("steps", variant.name, rate, "tokens/s", note=found["kernels"])
            yield from _beside_bfloat16(variant, found, engine)
        if ceiling:
            share = rate * found["flops_per_token"] / 1e12 / ceiling
            most = 0.5 if variant.fp8 == "none" else 0.7
            yield Measurement("steps", f"{variant.name}: share of the bfloat16 ceiling", share, "", 0.2, most)
        yield Measurement("steps", f"{variant.name}: peak memory", found["peak_gib"], "GiB", None, 60)
        engine = found if variant is ENGINE else engine


def _beside_bfloat16(variant: Variant, found: Mapping[str, Any], engine: Mapping[str, Any] | None) -> Iterator[Measurement]:
    """Yield speed and loss of FP8 beside those of the same layers in bfloat16.

    The loss of our own layers would not do: it differs by their rounding, also from that of an FP8 that was ignored.
    """
    if engine is None:
        yield Measurement("steps", f"{variant.name}: beside bfloat16", note=f"{ENGINE.name} gave nothing to compare with")
        return
    ratio = found["tokens_per_second"] / engine["tokens_per_second"]
    yield Measurement("steps", f"{variant.name}: speed", ratio, "times bfloat16", 0.9, 1.4)
    difference = abs(found["loss"] - engine["loss"]) / abs(engine["loss"])
    what = f"{variant.name}: loss beside bfloat16"
    yield Measurement("steps", what, difference, "relative difference", LEAST_FP8_DIFFERENCE, 2e-2)


def supervised(sizes: Sizes, ceiling: float | None) -> Iterator[Measurement]:
    """Time supervised steps of Qwen3-0.6B's shape as a peer does, on the fastest layers that are sure to be right.

    Args:
        ceiling: as of `steps`.
    """
    variant = OURS if ENGINE.missing() else ENGINE
    what = f"Qwen3-0.6B, rows of 8192 tokens, {variant.name}"
    found = yield from _timed("supervised", variant, sizes)
    if found is None:
        return
    rate = found["tokens_per_second"]
    note = f"prime-rl: {PRIME_RL:,} on one H100 (its benchmarks/baselines of 2026-01-15)"
    yield Measurement("supervised", what, rate, "tokens/s", PRIME_RL, note=note)
    if ceiling:
        share = rate * found["flops_per_token"] / 1e12 / ceiling
        yield Measurement("supervised", f"{what}: share of the bfloat16 ceiling", share, "", 0.17, 0.6)
    yield Measurement("supervised", f"{what}: peak memory", found["peak_gib"], "GiB", None, 32, "prime-rl: 31.7")


def memory(sizes: Sizes) -> Iterator[Measurement]:
    """Measure what a sleeping actor gives back, how fast it wakes, and how long a save holds training up."""
    variant = ENGINE if not ENGINE.missing() else OURS
    found = _child("memory", variant, sizes)
    yield Measurement("memory", "held before sleep", found["before_gib"], "GiB")
    yield Measurement("memory", "held asleep", found["asleep_gib"], "GiB", None, 1)
    yield Measurement("memory", "sleep and wake", found["rate"], "GB/s", 10, 64)
    yield Measurement("memory", "weights after waking equal those before", found["equal"], "", 1, 1)
    yield Measurement("memory", "a save keeps training, of its whole time", found["blocked"], "", None, 0.5)


def _timed(check: str, variant: Variant, sizes: Sizes) -> Generator[Measurement, None, dict[str, Any] | None]:
    """Return what a timed process found; yield why there is nothing and return None where it cannot run or has failed."""
    if reason := variant.missing():
        yield Measurement(check, variant.name, note=reason)
        return None
    try:
        return _child(check, variant, sizes)
    except RuntimeError as error:  # the others are still worth their time
        yield Measurement(check, variant.name, note=str(error))
        return None


def _child(kind: str, variant: Variant, sizes: Sizes, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a variant in a process of its own: Megatron's state is global, and memory is measured from zero.

    Raises:
        RuntimeError: the process failed; says its last line.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rehearse = [] if sizes.has_expectations else ["rehearse"]
        arguments = [kind, json.dumps(vars(variant)), folder, *rehearse]
        done = subprocess.run(
            [sys.executable, "-m", "gpu_checks.actor_process", *arguments],
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RuntimeError(f"{variant.name} failed: {last}")
        return torch.load(Path(folder) / "found.pt", weights_only=True)
