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
    """What a router of Megatron-Core asks for its choices (the interface of its ``moe/router_replay.py``)."""

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        """[tokens, top-k] experts, -1 where routing is live; None: it is everywhere."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of each token's experts.

        Args:
            scores: [tokens, experts].
        """
        values, live = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.chosen is None:
            return values, live
        chosen = torch.where(self.chosen >= 0, self.chosen, live)
        return scores.gather(1, chosen), chosen


def install(chunks: Sequence[GPTModel], ranks: Ranks) -> None:
    """Let every router of these chunks follow the routes that come with a micro-batch.

    A hook of the layer sets them, so they are the right ones in whatever order a pipeline schedule runs its
    micro-batches, and again when a layer is computed a second time for its backward pass.
    """
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        routers = [module for module in layer.modules() if isinstance(module, Router)]
        for router in routers:
            router.router_replay = RouterReplay()
        if routers:
            layer.register_forward_pre_hook(_setter(routers, layer.layer_number - 1, ranks), with_kwargs=True)


def _setter(routers: Sequence[Router], layer: int, ranks: Ranks) -> Callable[..., None]:
    def set_routes(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        packing: RowPacking = named["packed_seq_params"]
        for router in routers:
            router.router_replay.chosen = _of_rank(packing.routes, layer, module.config.sequence_parallel, ranks)

    return set_routes


def _of_rank(routes: Tensor | None, layer: int, is_sequence_parallel: bool, ranks: Ranks) -> Tensor | None:
    """[tokens of this rank's router, top-k]."""
    if routes is None:
        return None
    chosen = routes[layer]
    return chosen.chunk(ranks.tensor.size)[ranks.tensor.rank] if is_sequence_parallel else chosen
