"""The machine itself: its two ceilings, Transformer Engine's arithmetic, memory shared between processes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as multiprocessing

from megatron_hpt.actor.model.precision import FP8_RECIPES, this_machine

from .measurement import Measurement, milliseconds, relative_error
from .sizes import Sizes

BF16_CEILING = "bfloat16 matrix product"


def ceilings(sizes: Sizes) -> Iterator[Measurement]:
    """Measure memory rate and matrix products; expected are 80 % and more of an H100 SXM's 3.35 or an H200's 4.8 TB/s, and of
    989 TFLOP/s."""
    device = sizes.device
    source = torch.zeros(sizes.copy_elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source), device) / 1e3
    yield Measurement("ceilings", "copy, read and write", 2 * source.nbytes / seconds / 1e12, "TB/s", 2.7, 4.8)
    size = sizes.matrix
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in "ab")
    yield Measurement("ceilings", BF16_CEILING, _tflops(lambda: a @ b, size, device), "TFLOP/s", 700, 900)
    one = torch.ones((), device=device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    product = lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    yield Measurement("ceilings", "FP8 matrix product", _tflops(product, size, device), "TFLOP/s", 1000, 1700)
    error = relative_error(product()[:64], left[:64].double() @ right.double())
    yield Measurement("ceilings", "FP8 matrix product, error", error, "", None, 1e-2)


def transformer_engine(sizes: Sizes) -> Iterator[Measurement]:
    """Compare one linear layer, forward and backward by every recipe, with float64."""
    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        yield Measurement("Transformer Engine", "linear layer", note="Transformer Engine is not installed here")
        return
    for name in ("bfloat16", *FP8_RECIPES):
        if name in FP8_RECIPES and (this_machine().capability or (0, 0)) < FP8_RECIPES[name].capability:
            yield Measurement("Transformer Engine", f"linear layer, {name}", note="this GPU is too old for the recipe")
            continue
        # On normal numbers, rounded on the host: 0.037 with e4m3 on both sides, 0.059 with the gradient's e5m2 on one.
        limits = (1e-2, 1e-2) if name == "bfloat16" else (6e-2, 8e-2)
        try:
            output, gradient, weight = _linear_errors(sizes, name)
        except RuntimeError as error:  # the others are still worth their time
            yield Measurement("Transformer Engine", f"linear layer, {name}", note=f"{type(error).__name__} {error}")
            continue
        errors = (("output", output), ("input gradient", gradient), ("weight gradient", weight))
        for (what, error), limit in zip(errors, (*limits, limits[1]), strict=True):
            yield Measurement("Transformer Engine", f"linear layer, {name}: {what}", error, "relative error", None, limit)


def _linear_errors(sizes: Sizes, recipe: str) -> tuple[float, float, float]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    kinds = {
        "delayed": recipes.DelayedScaling,
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    tokens, inputs, outputs = sizes.linear
    torch.manual_seed(0)
    layer = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):  # delayed scaling needs a history
        x.grad = layer.weight.grad = None
        with te.fp8_autocast(enabled=recipe in kinds, fp8_recipe=kinds[recipe]() if recipe in kinds else None):
            y = layer(x)
        y.backward(g)
    wide = [t.detach().double() for t in (x, layer.weight, g)]
    return (
        relative_error(y.detach(), wide[0] @ wide[1].T),
        relative_error(x.grad, wide[2] @ wide[1]),
        relative_error(layer.weight.grad, wide[2].T @ wide[0]),
    )


def shared_memory(sizes: Sizes) -> Iterator[Measurement]:
    """Read tensors of another process on the same device, as a colocated engine reads weights."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs, sizes.device.type))
    receiver.start()
    shares = [torch.randn(sizes.copy_elements // 16, device=sizes.device).to(torch.bfloat16) for _ in range(16)]
    nbytes, rounds = sum(share.nbytes for share in shares), []
    for _ in range(4):
        for share in shares:
            share.mul_(1.01)
        started = time.perf_counter()
        ours.send(shares)
        copying, sums = ours.recv()
        rounds.append((time.perf_counter() - started, copying))
        right = sums == [_checksum(share) for share in shares]
        yield from () if right else (Measurement("IPC", "checksums of what arrived", 0, "", 1, 1),)
    ours.send(None)
    receiver.join()
    wall, copying = rounds[-1]
    # Read and write at the rate of the memory, and the exchange of handles.
    yield Measurement("IPC", "copy out of another process's memory", 2 * nbytes / copying / 1e12, "TB/s", 2.0, 4.8)
    yield Measurement("IPC", "whole exchange", nbytes / wall / 1e9, "GB/s", 50, None)


def _receive(connection: Connection, device: str) -> None:
    mine: list[torch.Tensor] = []
    while (shares := connection.recv()) is not None:
        mine = mine or [torch.empty_like(share) for share in shares]
        _synchronize(device)
        started = time.perf_counter()
        for own, share in zip(mine, shares, strict=True):
            own.copy_(share)
        _synchronize(device)
        copying = time.perf_counter() - started
        del share, shares  # the sender reuses its memory only when nobody holds it
        connection.send((copying, [_checksum(own) for own in mine]))


def _checksum(tensor: torch.Tensor) -> int:
    return int(tensor.view(torch.int16).long().sum())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _tflops(product: Callable[[], object], size: int, device: torch.device) -> float:
    return 2 * size**3 / milliseconds(product, device) / 1e9
