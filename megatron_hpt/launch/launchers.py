"""How the parts of a run are started and ended: what the supervisor asks for, and its form on one machine."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.environment import inherited_here
from megatron_hpt.errors import ConfigError, HptError
from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.launch.scratch import Scratch
from megatron_hpt.plan.topology import Device, Slots, Topology, place_nodes, visible
from megatron_hpt.run import RunDir

LOWEST_PORT = 10240
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nnodes=1", "--max-restarts=0"),
    # What --standalone stands for, but by address: ranks would wait for ever for a host name that does not resolve.
    *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=hpt", "--local-addr=127.0.0.1"),
)
"""Arguments of Python that start ranks on this machine."""


class Launcher(Protocol):
    """Starts the parts of one run. A part is a child of this process, wherever it runs."""

    host: str
    """Address of this process that every part reaches."""

    def trainer(self, arguments: Sequence[str]) -> Child:
        """Start all ranks.

        Args:
            arguments: of `megatron_hpt.actor.trainer`.
        """

    def coordinator(self, arguments: Sequence[str]) -> Child:
        """Start the coordinator."""

    def engine(self, index: int) -> tuple[str, Child]:
        """Start one server; its URL comes first."""

    def stop(self, children: Sequence[Child]) -> None:
        """End what is left of the run; returns when nothing is."""


def gpus_here() -> tuple[str, ...]:
    """What the GPUs that this process may use are called: numbers, or what its own CUDA_VISIBLE_DEVICES says."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(given.split(",") if given else map(str, range(count)))[:count]


def on_this_machine(config: Config) -> Callable[[RunDir], LocalLauncher]:
    """Find every part its place on this machine.

    Raises:
        ConfigError: it has too few GPUs.
    """
    names = gpus_here()
    topology = place_nodes(config, Slots("this machine", 1, len(names))) if names else None
    return lambda run: LocalLauncher(config, run, topology, names)


class LocalLauncher:
    """Every part on this machine, on GPUs of its own or, colocated, on those of trainer ranks."""

    host = "127.0.0.1"

    def __init__(self, config: Config, run: RunDir, topology: Topology | None = None, gpus: Sequence[str] = ()) -> None:
        """
        Args:
            topology: None: there are no GPUs.
            gpus: what they are called.
        """
        self._config, self._run, self._topology, self._gpus = config, run, topology, gpus
        self._scratch: Scratch | None = None

    def trainer(self, arguments: Sequence[str]) -> Child:
        ranks = f"--nproc-per-node={self._config.parallel.ranks}"
        command = [sys.executable, *TORCHRUN, ranks, "-m", "megatron_hpt.actor.trainer", *arguments]
        # torchrun numbers the ranks of this machine as `place` does: rank r takes the r-th GPU that it sees.
        own = self._on(self._topology.trainer) if self._topology else {}
        return Child.start("trainer", command, self._run.log("torchrun"), {**inherited_here(), **self._own, **own})

    def coordinator(self, arguments: Sequence[str]) -> Child:
        command = [sys.executable, "-m", "megatron_hpt.rollout.coordinator", *arguments]
        return Child.start("coordinator", command, self._run.log("coordinator"), {**coordinators(self._config), **self._own})

    def engine(self, index: int) -> tuple[str, Child]:
        config, kind = self._config, engine_of(self._config)
        port = free_port(config.rollout.host)
        start = Start(self._run.engine_model(config), port, self._run.path, on_gpus=self._topology is not None)
        own = self._on(self._topology.engines[index]) if self._topology else {}
        inherited = {**kind.environment(config, start.on_gpus), **self._own, **own}
        command = kind.command(config, interpreter(config), start)
        child = Child.start(f"engine {index}", command, self._run.log(f"engine_{index}"), inherited)
        return f"http://{config.rollout.host}:{port}", child

    @property
    def _own(self) -> dict[str, str]:
        """What every part gets."""
        self._scratch = self._scratch or Scratch()
        return self._scratch.environment

    def _on(self, places: Sequence[Device]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": visible(places, self._gpus)}

    def stop(self, children: Sequence[Child]) -> None:
        stop_all(children)
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None


def coordinators(config: Config) -> dict[str, str]:
    """What the coordinator inherits: the API key too that the recipe's reward model wants."""
    return inherited_here(config.reward.http.key_variable)


def free_port(host: str) -> int:
    """A free port below the range that the kernel gives to outgoing connections.

    The engine binds it only seconds later; a port of that range may by then belong to somebody's request.

    Raises:
        ConfigError: this machine has no such address.
        HptError: none found.
    """
    _require_own(host)
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(first_outgoing, LOWEST_PORT + 1000)), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise HptError(f"no free port for an engine on {host} (rollout.host); 100 were tried")


def _require_own(host: str) -> None:
    """A server can listen there."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"rollout.host: given {host!r}; engines cannot listen there ({error.strerror}): 127.0.0.1, or an address of this "
            "machine"
        ) from None
