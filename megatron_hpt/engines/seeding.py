"""Whether samples follow from seeds (`rollout.seeded`), and what a server's own random generator begins with."""

from __future__ import annotations

from megatron_hpt import cores
from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.types import SEEDS, seed_of


def settled(config: Config, on_gpus: bool) -> Config:
    """Return the configuration with `rollout.seeded` decided where it leaves that open, and on a host the numbers of threads.

    Called once by whoever starts a run or an evaluation, before anything is stored, so that config.yaml says what happened and
    the clients of the servers do the same as the servers.

    Args:
        on_gpus: whether servers will be started on GPUs.
    """
    rollout = config.rollout.model_copy(update={"seeded": is_seeded(config, on_gpus)})
    settled_config = config.model_copy(update={"rollout": rollout})
    return settled_config if on_gpus else cores.decided(settled_config)


def is_seeded(config: Config, on_gpus: bool = False) -> bool:
    """Return whether requests have seeds that the servers heed: `rollout.seeded`, or its default.

    Seeds are the default where they cost nothing, which is without GPUs, and for servers of the user's own (`rollout.urls`):
    two that were started with the same seed could otherwise draw the same samples of one prompt.
    """
    if config.rollout.seeded is not None:
        return config.rollout.seeded
    return not on_gpus or bool(config.rollout.urls)


def server_seed(config: Config, start: Start) -> int:
    """Return the seed of a server's own random generator.

    Servers that choose their own noise each begin with another seed, by their port: samples of one prompt may come from several
    servers, and must differ.
    """
    if is_seeded(config, start.on_gpus):
        return config.trainer.seed % SEEDS
    return seed_of(config.trainer.seed, "server", start.port)
