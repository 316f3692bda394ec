"""Who runs where: trainer ranks and engines on the GPUs of nodes, from the layout alone. Pure; no torch.

Rank r of the trainer is task r of srun, node by node, so tensor parallel neighbours share a node. A server's ranks never
leave their node. Engines that read the trainer's GPU memory (transfer.transport=cuda_ipc) share its GPUs; all others have
GPUs of their own: behind the trainer's where both fit one node, else on nodes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.plan.cluster import ClusterConfig

ONE_HOST = ("shared_memory", "cuda_ipc")
"""Transports that leave no host."""


class Device(NamedTuple):
    """One GPU, or the place of one rank on a node without GPUs."""

    node: int
    gpu: int


class Slots(NamedTuple):
    """What `place` has to know of nodes."""

    name: str
    nodes: int
    gpus_per_node: int


@dataclass(frozen=True)
class Topology:
    """The places of all ranks of a run, on nodes counted from 0."""

    trainer: tuple[Device, ...]
    """Of each trainer rank."""
    engines: tuple[tuple[Device, ...], ...]
    """Of each rank of each server; none for servers that run already (rollout.urls)."""

    @property
    def trainer_nodes(self) -> tuple[int, ...]:
        """Nodes with trainer ranks, in order."""
        return tuple(sorted({device.node for device in self.trainer}))

    @property
    def engine_nodes(self) -> tuple[int, ...]:
        """Nodes with engines, in order; the trainer's own where they share them."""
        return tuple(sorted({device.node for engine in self.engines for device in engine}))

    @property
    def nodes(self) -> int:
        """Nodes that the run takes."""
        return len({*self.trainer_nodes, *self.engine_nodes})

    @property
    def is_colocated(self) -> bool:
        """Engines are on the trainer's GPUs."""
        return any(device in self.trainer for engine in self.engines for device in engine)


def place(config: Config, cluster: ClusterConfig | Slots) -> Topology:
    """The places of a recipe's ranks on a cluster.

    Raises:
        ConfigError: a layout that does not fill whole nodes or leaves its node, or more nodes than there are.
    """
    size = cluster.gpus_per_node
    ranks, servers, width = config.parallel.ranks, config.rollout.servers, config.rollout.tensor_parallel
    if ranks > size and ranks % size:
        raise ConfigError(
            f"parallel: {ranks} trainer ranks do not fill nodes of {size} GPUs; the nearest that do: {ranks // size * size} "
            f"and {-(-ranks // size) * size} (tensor × pipeline × context × data)"
        )
    trainer = tuple(Device(rank // size, rank % size) for rank in range(ranks))
    if config.rollout.urls:
        return _checked(Topology(trainer, ()), cluster)
    if width > size:
        raise ConfigError(f"rollout.tensor_parallel: given {width}; a server's ranks are on one node, which has {size} GPUs")
    colocated = config.transfer.shares_gpus
    if colocated and (ranks > size or servers * width > ranks):
        raise ConfigError(
            f"transfer.transport={config.transfer.transport}: {servers} servers × {width} ranks read the memory of the "
            f"trainer's GPUs, of which one node has {min(ranks, size)} (the trainer has {ranks} ranks, a node {size} GPUs); "
            "servers on GPUs of their own take transfer.transport=nccl"
        )
    fits_one_node = ranks + servers * width <= size
    first = Device(0, 0) if colocated else Device(0, ranks) if fits_one_node else Device(-(-ranks // size), 0)
    return _checked(Topology(trainer, _engines(servers, width, first, size)), cluster)


def visible(places: Sequence[Device], names: Sequence[str]) -> str:
    """CUDA_VISIBLE_DEVICES of a process with these places.

    Args:
        names: what the GPUs of its node are called, in order: numbers, or UUIDs.
    """
    return ",".join(names[device.gpu] for device in places)


def place_nodes(config: Config, slots: Slots) -> Topology:
    """The places of a recipe's ranks on nodes that share no memory.

    Raises:
        ConfigError: not on these; or weights could not leave the trainer's nodes.
    """
    topology = place(config, slots)
    if config.transfer.transport in ONE_HOST and topology.nodes > 1:
        raise ConfigError(
            f"transfer.transport={config.transfer.transport} reaches engines of the trainer's own host, and this layout takes "
            f"{topology.nodes} nodes; between nodes: nccl (GPUs), gloo, or files on a file system that they share"
        )
    return topology


def least_nodes(config: Config, ranks_per_node: int) -> int:
    """Nodes that a run takes, however many there are; likewise."""
    return place_nodes(config, Slots("any cluster", config.parallel.ranks + config.rollout.servers, ranks_per_node)).nodes


def _engines(servers: int, width: int, first: Device, size: int) -> tuple[tuple[Device, ...], ...]:
    """Servers side by side from `first` on, as many a node as fit it whole."""
    a_node = (size - first.gpu) // width
    starts = (Device(first.node + i // a_node, first.gpu + i % a_node * width) for i in range(servers))
    return tuple(tuple(Device(start.node, start.gpu + rank) for rank in range(width)) for start in starts)


def _checked(topology: Topology, cluster: ClusterConfig | Slots) -> Topology:
    if topology.nodes > cluster.nodes:
        raise ConfigError(
            f"{cluster.name} has {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs; this layout takes {topology.nodes}: "
            f"{len(topology.trainer_nodes)} with {len(topology.trainer)} trainer ranks, {len(topology.engine_nodes)} with "
            f"{len(topology.engines)} servers (parallel.data and rollout.servers make it smaller)"
        )
    return topology
