"""AdamW for hosts without Transformer Engine, in the state layout that Megatron-Core expects of a fused Adam.

megatron-core 0.16.1's distributed optimizer cannot restore torch's AdamW, which keeps a step count for every parameter
(KeyError 'step', or one shared count that is incremented once for each parameter). Transformer Engine's and Apex's Adam
keep it in the parameter group, and so does this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with the step count in the parameter group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True})

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        """Give a parameter moments of zero; Megatron-Core calls it before it loads a checkpoint."""
        self.state[parameter].update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient once."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                group["step"] = int(group.get("step") or 0) + 1
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.initialize_state(parameter)
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in parameters]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(parameters, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))


def offer_to_megatron() -> None:
    """Let Megatron-Core use this Adam where it found neither Transformer Engine nor Apex."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupStepAdamW, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_TE_OPTIMIZER = GroupStepAdamW, True, True
