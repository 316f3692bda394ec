"""The ways in which the same step is computed, one process each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_hpt.actor.model.precision import check_fp8, this_machine
from megatron_hpt.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    name: str
    layers: str
    """"transformer engine" or "ours"."""
    dtype: str = "bfloat16"
    fp8: str = "none"

    def missing(self) -> str:
        """Return why the variant cannot run here; empty where it can."""
        machine = this_machine()
        if self.layers != "ours" and (machine.engine is None or not torch.cuda.is_available()):
            return "Transformer Engine is not installed here"
        try:
            check_fp8(self.fp8, self.dtype, machine)
        except ConfigError as error:
            return str(error)
        return ""


OURS = Variant("our layers, bfloat16", "ours")
FLOAT32 = Variant("our layers, float32", "ours", dtype="float32")
ENGINE = Variant("Transformer Engine, bfloat16", "transformer engine")
FP8 = [
    Variant(f"Transformer Engine, FP8 {name}", "transformer engine", fp8=name)
    for name in ("tensorwise", "delayed", "blockwise", "mxfp8")
]
