"""NVIDIA Apex: whether it is installed, and which of its kernels are, found without importing anything.

Nothing depends on it. Megatron-Core imports whatever goes by the name ``apex``, and the package of that name on PyPI is
somebody else's (a toolkit for the web framework Pyramid), so one is told from the other by what lies in its folder: an import
would run a stranger's code. This module imports no Megatron, because `doctor` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
"""Adds a linear layer's weight gradient to the buffer inside the matrix product (`gradient_accumulation_fusion`)."""
MULTI_TENSOR = "amp_C"
"""Adam, gradient norms and scaling over many tensors at once."""
LAYER_NORM = "fused_layer_norm_cuda"
KERNELS = {
    WEIGHT_GRADIENT: "fused gradient accumulation of linear layers that are not Transformer Engine's",
    MULTI_TENSOR: "fused Adam where Transformer Engine is absent",
    LAYER_NORM: "fused norms where Transformer Engine is absent",
}
"""Extension modules of Apex that this stack can use → what each adds. They are built only where Apex is told to
(``APEX_CUDA_EXT=1``), and lie beside the package, not in it."""


@dataclass(frozen=True)
class Apex:
    """A package that goes by the name ``apex``."""

    place: str
    """Its folder, or its file where it has none."""
    is_nvidias: bool
    kernels: frozenset[str]
    """Those of `KERNELS` that are installed; none for a stranger's package."""


def find_apex() -> Apex | None:
    """Return the package that ``import apex`` would import, or None where there is none."""
    spec = PathFinder.find_spec("apex")  # not by sys.modules, in which a host hides it from Megatron-Core (actor/__init__.py)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    is_nvidias = any((folder / "optimizers").is_dir() for folder in folders)
    kernels = frozenset(name for name in KERNELS if is_nvidias and PathFinder.find_spec(name) is not None)
    return Apex(str(folders[0] if folders else spec.origin), is_nvidias, kernels)


def has_apex_kernel(name: str) -> bool:
    """Return whether NVIDIA Apex is installed with one of `KERNELS`; called when the actor's model is configured."""
    found = find_apex()
    return found is not None and name in found.kernels
