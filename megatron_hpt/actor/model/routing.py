"""Router replay: a mixture of experts trains a rollout through the experts that the engine chose for it.

Engine and trainer compute in different kernels, and a router near a tie then chooses other experts, which changes a
token's log-probability far more than rounding does (arXiv 2510.11370). A row may carry the engine's choices; its tokens
are then routed by them, with this model's own probabilities of the chosen experts, so the router still learns. Tokens
of rows without choices, demonstrations above all, are routed live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron_hpt.actor.microbatch import RowPacking
from megatron_hpt.actor.parallel import Ranks

TopK = Callable[..., tuple[Tensor, Tensor]]


class RouterReplay:
    """What a router of Megatron-Core asks for its choices; it has the interface of Megatron's ``moe/router_replay.py``."""

    def __init__(self) -> None:
        self.recorded: Tensor | None = None
        """int64 [tokens, top-k]: the engine's experts, -1 where routing is live; None if it is live everywhere."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Return the scores and numbers of each token's experts, [tokens, top-k] each; called by the router.

        Args:
            scores: [tokens, experts].
            default_compute_topk: chooses experts by their scores, as the router would.
        """
        values, live = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.recorded is None:
            return values, live
        # Only the choice is the engine's: the scores stay this model's own, so that the router learns from these tokens too.
        experts = torch.where(self.recorded >= 0, self.recorded, live)
        return scores.gather(1, experts), experts


def install(chunks: Sequence[GPTModel], ranks: Ranks) -> None:
    """Let every router of these chunks follow the routes that come with a micro-batch.

    Called once, when the model has been built; without recorded routes it changes nothing.
    """
    # The routes are set before each forward pass of a layer, from that pass's own arguments. They are then the right ones
    # in whatever order a pipeline schedule runs its micro-batches, and when a layer is computed again for its backward pass.
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        routers = [module for module in layer.modules() if isinstance(module, Router)]
        for router in routers:
            router.router_replay = RouterReplay()
        if routers:
            layer.register_forward_pre_hook(_setter(routers, layer.layer_number - 1, ranks), with_kwargs=True)


def _setter(routers: Sequence[Router], layer: int, ranks: Ranks) -> Callable[..., None]:
    """Make the hook that gives a layer's routers their routes.

    Args:
        layer: number of the layer in the whole model, from 0.
    """

    def set_routes(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        packing: RowPacking = named["packed_seq_params"]
        for router in routers:
            router.router_replay.recorded = _of_rank(packing.routes, layer, module.config.sequence_parallel, ranks)

    return set_routes


def _of_rank(routes: Tensor | None, layer: int, is_sequence_parallel: bool, ranks: Ranks) -> Tensor | None:
    """Return a layer's routes of the tokens that this rank's router sees, [tokens, top-k]."""
    if routes is None:
        return None
    of_layer = routes[layer]
    return of_layer.chunk(ranks.tensor.size)[ranks.tensor.rank] if is_sequence_parallel else of_layer
