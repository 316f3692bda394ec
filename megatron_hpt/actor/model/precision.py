"""FP8: what each recipe needs, what is missing for it, and the proof that a model really computes in it.

Megatron-Core ignores `fp8` in silence where Transformer Engine is missing or the layers are not Transformer Engine's. So
FP8 that cannot work is refused before anything starts, and FP8 is looked for in the model that was built. This module
imports no Megatron, because preflight reads it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from packaging.version import Version

from megatron_hpt.errors import ConfigError


@dataclass(frozen=True)
class Fp8Recipe:
    """One way to scale FP8 tensors, and what it needs."""

    name: str
    format: str
    """Megatron's `fp8`: "e4m3" everywhere, or "hybrid", which has e5m2 for gradients."""
    engine: Version
    """Oldest Transformer Engine that has it."""
    capability: tuple[int, int]
    """Lowest compute capability of a GPU."""
    cuda: Version
    """Oldest CUDA."""
    token_multiple: int
    """The tokens of a matrix product that sums over tokens must be a multiple of this."""


FP8_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Fp8Recipe("delayed", "hybrid", Version("2.1"), (8, 9), Version("12.1"), 16),
        Fp8Recipe("tensorwise", "hybrid", Version("2.2"), (8, 9), Version("12.1"), 16),
        Fp8Recipe("blockwise", "e4m3", Version("2.3"), (9, 0), Version("12.9"), 128),
        Fp8Recipe("mxfp8", "e4m3", Version("2.1"), (10, 0), Version("12.8"), 32),
    )
}


@dataclass(frozen=True)
class Machine:
    """What of a machine FP8 depends on; None for what it does not have."""

    engine: Version | None
    capability: tuple[int, int] | None
    cuda: Version | None


def this_machine() -> Machine:
    """Return what this process finds on its machine."""
    try:
        engine = Version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    has_cuda = torch.cuda.is_available()
    return Machine(
        engine=engine,
        capability=torch.cuda.get_device_capability() if has_cuda else None,
        cuda=Version(torch.version.cuda) if has_cuda and torch.version.cuda else None,
    )


def check_fp8(name: str, dtype: str, machine: Machine) -> None:
    """Check that FP8 by a recipe runs on a machine.

    Args:
        name: a recipe, or "none".
        dtype: `model.dtype`.

    Raises:
        ConfigError: something is missing; it names everything that is.
    """
    if name == "none":
        return
    recipe = FP8_RECIPES[name]
    needs = [
        ("Transformer Engine (package transformer-engine)", recipe.engine, machine.engine),
        ("CUDA", recipe.cuda, machine.cuda),
        ("a GPU of compute capability", recipe.capability, machine.capability),
    ]
    missing = [
        f"{what} {_text(least)} or newer, found {_text(present) if present else 'none'}"
        for what, least, present in needs
        if present is None or present < least
    ]
    if dtype != "bfloat16":
        missing.append(f"model.dtype=bfloat16, given {dtype}")
    if missing:
        raise ConfigError(
            f"actor.fp8: given {name!r}, which needs {'; '.join(missing)}. Install or change that, or set actor.fp8=none"
        )


def token_multiple(name: str) -> int:
    """Return what the tokens of a rank's micro-batch must be a multiple of, under a recipe or "none"."""
    return FP8_RECIPES[name].token_multiple if name != "none" else 1


def check_bf16_layers(name: str, bf16_layers: int, layers: int) -> None:
    """Refuse layers in bfloat16 at both ends of the model that leave none in FP8.

    Args:
        name: the recipe that was asked for, or "none".
        bf16_layers: `actor.bf16_layers`.
        layers: layers of the model.

    Raises:
        ConfigError: no layer would compute in FP8.
    """
    if name != "none" and 2 * bf16_layers >= layers:
        raise ConfigError(
            f"actor.bf16_layers: given {bf16_layers}; the first and the last {bf16_layers} of the model's {layers} layers in "
            f"bfloat16 leave none in FP8: at most {(layers - 1) // 2}, or set actor.fp8=none"
        )


def prove_fp8(name: str, layers: Iterable[torch.nn.Module]) -> int:
    """Count the modules that compute in FP8; called when a model has been built.

    Args:
        name: the recipe that was asked for, or "none".
        layers: this rank's layers that are to compute in FP8; a rank of a pipeline may have none.

    Raises:
        ConfigError: a recipe was asked for and a layer does not compute in FP8; the run would train in bfloat16 under an FP8
            flag.
    """
    counts = [sum(map(_computes_in_fp8, layer.modules())) for layer in layers]
    if name != "none" and not all(counts):
        raise ConfigError(
            f"actor.fp8: given {name!r}, but no part of a layer that was built is Transformer Engine's, so it would train in "
            "bfloat16; set actor.fp8=none"
        )
    return sum(counts)


def _computes_in_fp8(module: torch.nn.Module) -> bool:
    return hasattr(module, "fp8_meta") and any(cls.__module__.startswith("transformer_engine.") for cls in type(module).__mro__)


def _text(version: Version | tuple[int, int]) -> str:
    return str(version) if isinstance(version, Version) else ".".join(map(str, version))
