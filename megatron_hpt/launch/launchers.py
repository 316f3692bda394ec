"""How the parts of a run are started and ended: what the supervisor expects of a launcher, and the launcher for one machine."""

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
from megatron_hpt.cores import WAITING, assigned
from megatron_hpt.engines.interface import Start
from megatron_hpt.environment import inherited_here
from megatron_hpt.errors import ConfigError, HptError
from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.launch.engine_fleet import start_engine
from megatron_hpt.launch.scratch import Scratch
from megatron_hpt.plan.topology import Device, Slots, Topology, place_nodes, visible
from megatron_hpt.process import CORES_VARIABLE
from megatron_hpt.run import RunDir

LOWEST_PORT = 10240
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nnodes=1", "--max-restarts=0"),
    # As --standalone does, but by address: ranks would wait for ever for a host name that does not resolve.
    *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=hpt", "--local-addr=127.0.0.1"),
)
"""Arguments of the Python interpreter that start trainer ranks on this machine."""


class Launcher(Protocol):
    """Starts and ends the parts of one run; called by its supervisor only.

    A part is a child of this process wherever it runs: a process here, or an srun whose tasks run elsewhere. A part that dies
    is noticed by its exit code, and an engine is started again by `Child.again`, without the launcher.
    """

    host: str
    """Address of this process that every part reaches; the blackboard listens there. Read before any part is started."""

    def trainer(self, arguments: Sequence[str]) -> Child:
        """Start all trainer ranks as one child, named ``trainer``. Called once, after every engine has been started.

        Args:
            arguments: command line of `megatron_hpt.actor.trainer` on each rank.
        """

    def coordinator(self, arguments: Sequence[str]) -> Child:
        """Start the coordinator, named ``coordinator``. Called once, after the trainer has been started.

        Args:
            arguments: command line of `megatron_hpt.rollout.coordinator`.
        """

    def engine(self, index: int) -> tuple[str, Child]:
        """Start one engine server, named ``engine <index>``, and return its URL and its child without waiting for it to answer.

        Called once for each of `rollout.servers`, before anything else is started; not where `rollout.urls` names servers.

        Raises:
            ConfigError: the engine's environment is missing, or it cannot listen at `rollout.host`.
            HptError: no port is free.
        """

    def stop(self, children: Sequence[Child]) -> None:
        """End the given children with all their processes, and return when none is left. Children that have ended are allowed.

        Called once by the supervisor, however the run ends, with signals ignored; a second call does nothing.
        """


def gpus_here() -> tuple[str, ...]:
    """Return names of the GPUs that this process may use: the entries of its CUDA_VISIBLE_DEVICES, else their numbers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(given.split(",") if given else map(str, range(count)))[:count]


def on_this_machine(config: Config) -> Callable[[RunDir], LocalLauncher]:
    """Find a place on this machine for every part, and return what makes the launcher of a run.

    Raises:
        ConfigError: the machine has too few GPUs.
    """
    names = gpus_here()
    topology = place_nodes(config, Slots("this machine", 1, len(names))) if names else None
    return lambda run: LocalLauncher(config, run, topology, names)


class LocalLauncher:
    """Runs every part on this machine, on GPUs of its own or, colocated, on those of trainer ranks.

    Args:
        topology: which GPUs each part gets; None on a machine without GPUs.
        gpus: names of the GPUs, as `gpus_here` returns them.
    """

    host = "127.0.0.1"

    def __init__(self, config: Config, run: RunDir, topology: Topology | None = None, gpus: Sequence[str] = ()) -> None:
        self._config, self._run, self._topology, self._gpus = config, run, topology, gpus
        self._scratch: Scratch | None = None

    def trainer(self, arguments: Sequence[str]) -> Child:
        ranks = f"--nproc-per-node={self._config.parallel.ranks}"
        command = [sys.executable, *TORCHRUN, ranks, "-m", "megatron_hpt.actor.trainer", *arguments]
        # torchrun numbers the ranks of this machine as `place_nodes` does: rank r takes the r-th GPU that it sees.
        own = self._on(self._topology.trainer) if self._topology else self._keeping_to(assigned(self._config).trainer.cores)
        return Child.start("trainer", command, self._run.log("torchrun"), {**inherited_here(), **WAITING, **self._own, **own})

    def coordinator(self, arguments: Sequence[str]) -> Child:
        command = [sys.executable, "-m", "megatron_hpt.rollout.coordinator", *arguments]
        return Child.start("coordinator", command, self._run.log("coordinator"), {**coordinators(self._config), **self._own})

    def engine(self, index: int) -> tuple[str, Child]:
        config, port = self._config, free_port(self._config.rollout.host)
        start = Start(self._run.engine_model(config), port, self._run.path, on_gpus=self._topology is not None)
        if self._topology:
            own = self._on(self._topology.engines[index])
        else:
            own = self._keeping_to(assigned(config).of_server(index, config.rollout.tensor_parallel))
        return start_engine(config, index, start, self._run.log(f"engine_{index}"), {**self._own, **own})

    @property
    def _own(self) -> dict[str, str]:
        """Environment variables of every part: temporary files go to a folder that is made with the first part."""
        self._scratch = self._scratch or Scratch()
        return self._scratch.environment

    def _on(self, places: Sequence[Device]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": visible(places, self._gpus)}

    def _keeping_to(self, cores: Sequence[int]) -> dict[str, str]:
        """Environment variables of a part on a host: its cores, where generation and training overlap on cores of their own.

        Parts that take turns are not bound: whoever works may run wherever nobody else does.
        """
        return {CORES_VARIABLE: ",".join(map(str, cores))} if assigned(self._config).is_apart else {}

    def stop(self, children: Sequence[Child]) -> None:
        stop_all(children)
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None


def coordinators(config: Config) -> dict[str, str]:
    """Return the coordinator's environment: what every part inherits, and the API key of the recipe's reward model."""
    return inherited_here(config.reward.http.key_variable)


def free_port(host: str) -> int:
    """Return a free port below the range that the kernel gives to outgoing connections.

    An engine binds its port only seconds later; a port of that range may by then belong to somebody's request.

    Raises:
        ConfigError: this machine has no such address.
        HptError: no port was found.
    """
    _require_own(host)
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(first_outgoing, LOWEST_PORT + 1000)), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise HptError(f"no free port for an engine on {host} (rollout.host); 100 were tried")


def _require_own(host: str) -> None:
    """Raise ConfigError unless a server can listen at `host`."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"rollout.host: given {host!r}; engines cannot listen there ({error.strerror}): 127.0.0.1, or an address of this "
            "machine"
        ) from None
