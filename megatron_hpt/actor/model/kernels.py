"""Which fused kernels and overlaps of Megatron-Core the actor uses: each a choice with a reason (table in docs/gpu.md).

A choice depends on what is installed and on the layout alone, so all ranks make the same one. `actor.kernels` switches single
ones; what cannot run is refused. This module imports no Megatron.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packaging.version import Version

from megatron_hpt.actor.model import apex
from megatron_hpt.actor.model.precision import this_machine
from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape


@dataclass(frozen=True)
class Situation:
    """What the choices depend on."""

    on_gpus: bool
    engine: Version | None
    """Transformer Engine whose layers the model has; None for our own layers."""
    has_apex: bool
    """Whether NVIDIA Apex has its kernel of weight gradients (`fused_weight_gradient_mlp_cuda`)."""
    has_deepep: bool
    has_experts: bool
    expert_ranks: int
    """Ranks that share a layer's experts."""
    replicas: int
    """Ranks that have the same parameters and add up their gradients: data times context parallel ones."""
    pipeline: int
    virtual_pipeline: int

    @classmethod
    def of(cls, config: Config, shape: ModelShape, on_gpus: bool, engine: Version | None) -> Situation:
        """Return the situation of a run on this machine."""
        parallel = config.parallel
        return cls(
            on_gpus=on_gpus,
            engine=engine,
            has_apex=apex.has_apex_kernel(apex.WEIGHT_GRADIENT),
            has_deepep=importlib.util.find_spec("deep_ep") is not None,
            has_experts=bool(shape.experts),
            expert_ranks=parallel.expert * parallel.expert_tensor_ranks,
            replicas=parallel.data * parallel.context,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
        )


@dataclass(frozen=True)
class Kernel:
    """One kernel or overlap."""

    flag: str
    """Megatron-Core's name of it, and its key in `actor.kernels`."""
    missing: Callable[[Situation], str]
    """What the kernel lacks to run; empty if nothing."""
    useless: Callable[[Situation], str] = lambda situation: ""
    """Why it is off although it could run; empty if it is on."""


def _no_gpu(situation: Situation) -> str:
    return "" if situation.on_gpus else "a GPU"


def _engine(least: str) -> Callable[[Situation], str]:
    def missing(situation: Situation) -> str:
        has = situation.engine is not None and situation.engine >= Version(least)
        return _no_gpu(situation) or ("" if has else f"layers of Transformer Engine {least} or newer")

    return missing


def _engine_or_apex(situation: Situation) -> str:
    if situation.on_gpus and situation.engine is None and not situation.has_apex:
        return "layers of Transformer Engine, or NVIDIA Apex with its CUDA extensions"
    return _no_gpu(situation)


def _experts(least: str) -> Callable[[Situation], str]:
    return lambda s: _engine(least)(s) or ("" if s.has_experts else "a mixture of experts")


def _virtual(situation: Situation) -> str:
    return _no_gpu(situation) or ("" if situation.virtual_pipeline > 1 else "parallel.virtual_pipeline above 1")


def _plain_pipeline(situation: Situation) -> str:
    # An interleaved schedule posts its messages one by one, to compute between them; Megatron refuses both together.
    is_plain = situation.pipeline > 1 and situation.virtual_pipeline == 1
    return _no_gpu(situation) or ("" if is_plain else "a pipeline that is not interleaved")


KERNELS = {
    kernel.flag: kernel
    for kernel in (
        Kernel("bias_activation_fusion", _no_gpu),
        Kernel("bias_dropout_fusion", _no_gpu),
        Kernel("apply_rope_fusion", _engine("2.3")),
        Kernel("gradient_accumulation_fusion", _engine_or_apex),
        Kernel("moe_grouped_gemm", _experts("1.9")),
        Kernel("moe_permute_fusion", _experts("2.1")),
        Kernel(
            "overlap_grad_reduce",
            _no_gpu,
            lambda s: "" if s.replicas > 1 else "one data parallel rank has nothing to reduce",
        ),
        Kernel("overlap_p2p_comm", _virtual),
        Kernel("batch_p2p_comm", _plain_pipeline),
    )
}
"""By flag. Of Megatron's others, `moe_router_fusion` would pass by the routes of an engine, `overlap_param_gather` would hide
nothing, since a step's weights are read at once to be sent, and `tp_comm_overlap` wants micro-batches of one length."""


def choose(situation: Situation, asked: Mapping[str, bool]) -> dict[str, bool]:
    """Return which kernels are used, by flag.

    Args:
        asked: `actor.kernels`.

    Raises:
        ConfigError: a kernel is asked for that cannot run here; it says what is missing.
    """
    for flag in (flag for flag, on in asked.items() if on):
        if missing := KERNELS[flag].missing(situation):
            raise ConfigError(f"actor.kernels: {flag} needs {missing}; leave it out, or set it to false")
    runs = {flag: not kernel.missing(situation) and not kernel.useless(situation) for flag, kernel in KERNELS.items()}
    return {**runs, **asked}


def dispatcher(situation: Situation, name: str) -> dict[str, str]:
    """Return Megatron's settings of the dispatcher of tokens to experts.

    Args:
        name: `actor.expert_dispatcher`.

    Raises:
        ConfigError: DeepEP is asked for and cannot run here; it says what is missing.
    """
    if name == "alltoall":
        return {"moe_token_dispatcher_type": "alltoall"}  # Megatron's default refuses variable lengths, even in a dense model
    needs = {
        "a GPU": situation.on_gpus,
        "a mixture of experts": situation.has_experts,
        "experts on several ranks (parallel.expert, parallel.tensor)": situation.expert_ranks > 1,
        "the package deep_ep": situation.has_deepep,
    }
    if missing := [what for what, is_there in needs.items() if not is_there]:
        raise ConfigError(f"actor.expert_dispatcher: given {name!r}, which needs {', '.join(missing)}; or set it to alltoall")
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": name}


def check(config: Config, shape: ModelShape) -> None:
    """Refuse kernels and a dispatcher that are asked for and cannot run on this machine; called before a run starts.

    Raises:
        ConfigError: as of `choose` and `dispatcher`.
    """
    machine = this_machine()
    engine = machine.engine if machine.capability is not None and config.model.dtype != "float32" else None
    situation = Situation.of(config, shape, machine.capability is not None, engine)
    choose(situation, config.actor.kernels)
    dispatcher(situation, config.actor.expert_dispatcher)
