"""How the parts of a run are started and ended: what the supervisor asks for, and its form on one machine."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_hpt.config import Config
from megatron_hpt.errors import HptError
from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.rollout.engines import ENGINES, interpreter
from megatron_hpt.run import RunDir

LOWEST_PORT = 10240


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


class LocalLauncher:
    """Every part on this machine."""

    host = "127.0.0.1"

    def __init__(self, config: Config, run: RunDir) -> None:
        self._config, self._run = config, run

    def trainer(self, arguments: Sequence[str]) -> Child:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        ranks = f"--nproc-per-node={self._config.parallel.ranks}"
        command = [*torchrun, ranks, "-m", "megatron_hpt.actor.trainer", *arguments]
        return Child.start("trainer", command, self._run.log("torchrun"))

    def coordinator(self, arguments: Sequence[str]) -> Child:
        command = [sys.executable, "-m", "megatron_hpt.rollout.coordinator", *arguments]
        return Child.start("coordinator", command, self._run.log("coordinator"))

    def engine(self, index: int) -> tuple[str, Child]:
        config, kind = self._config, ENGINES[self._config.rollout.engine]
        port = free_port(config.rollout.host)
        command = kind.command(config, interpreter(config), self._run.engine_model(config), port, self._run.path)
        child = Child.start(f"engine {index}", command, self._run.log(f"engine_{index}"), kind.environment(config))
        return f"http://{config.rollout.host}:{port}", child

    def stop(self, children: Sequence[Child]) -> None:
        stop_all(children)


def free_port(host: str) -> int:
    """A free port below the range that the kernel gives to outgoing connections.

    The engine binds it only seconds later; a port of that range may by then belong to somebody's request.

    Raises:
        HptError: none found.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(first_outgoing, LOWEST_PORT + 1000)), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise HptError(f"no free port for an engine on {host} (rollout.host); 100 were tried")
