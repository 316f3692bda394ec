"""A run on the nodes of one Slurm allocation: its command lines, and the launcher that starts them.

The supervisor runs on the batch host and starts every part by an srun of its own. Trainer ranks have no torchrun, which would
die of SIGUSR1 and leave its workers behind. `plan.topology` decides which part runs on which node.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.environment import inherited_here
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch.children import GRACE_S, Child, stop_all
from megatron_hpt.launch.engine_fleet import start_engine
from megatron_hpt.launch.launchers import LOWEST_PORT, coordinators
from megatron_hpt.plan.topology import Device, Slots, Topology, least_nodes, place_nodes
from megatron_hpt.run import RunDir

BETWEEN_GPUS = ("nccl", "cuda_ipc")
"""Transports of weights that need GPUs."""
PORTS, BLOCKS = 64, 350
"""Ports of one job, and the number of jobs that have ports of their own below the kernel's range for outgoing connections."""


@dataclass(frozen=True)
class SlurmJob:
    """One try of a Slurm job, and the settings of its site."""

    number: int
    attempt: int
    """Number of times that Slurm has requeued the job."""
    host: str
    """Node of the batch script."""
    nodes: tuple[str, ...]
    """Nodes in Slurm's order, without those that are left out."""
    ranks_per_node: int
    has_gpus: bool
    srun: tuple[str, ...] = ()
    """Additional arguments of every srun, e.g. --container-image of pyxis."""
    python: str = "python"
    """Interpreter on the nodes."""

    def port(self, index: int) -> int:
        """Return port `index` of this try; it differs from try to try and, nearly always, from job to job."""
        block = (self.number + 97 * self.attempt) % BLOCKS
        return LOWEST_PORT + PORTS * block + index % PORTS

    def address(self, node: str) -> str:
        """Return the address at which other nodes reach a node. The name of this host may resolve to its loopback here."""
        others = [other for other in self.nodes if other != self.host]
        if node != self.host or not others:
            return _resolved(node)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((others[0], 9))  # sends nothing; the kernel chooses the interface
            return probe.getsockname()[0]

    def only(self, nodes: Sequence[str]) -> SlurmJob:
        """Return the same job with some of its nodes."""
        return replace(self, nodes=tuple(nodes))


def _resolved(node: str) -> str:
    """Return the address of a node's name.

    Raises:
        ConfigError: the name does not resolve.
    """
    try:
        return socket.gethostbyname(node)
    except OSError as error:
        raise ConfigError(
            f"node {node}: its name does not resolve here ({error.strerror}), and the run's parts reach each other by it; "
            f"put it into DNS or /etc/hosts of all nodes, or leave the node out (sbatch --exclude={node})"
        ) from None


def job_of(
    environment: Mapping[str, str], nodes: Sequence[str], ranks_per_node: int, python: str, srun: Sequence[str]
) -> SlurmJob:
    """Return the job whose batch script runs this process.

    Raises:
        ConfigError: this process is in no Slurm job.
    """
    try:
        return SlurmJob(
            number=int(environment["SLURM_JOB_ID"]),
            attempt=int(environment.get("SLURM_RESTART_COUNT", "0")),
            host=environment["SLURMD_NODENAME"],
            nodes=tuple(nodes),
            ranks_per_node=ranks_per_node,
            has_gpus=int(environment.get("SLURM_GPUS_ON_NODE", "0")) > 0,
            srun=tuple(srun),
            python=python,
        )
    except KeyError as error:
        raise ConfigError(f"not inside a Slurm job ({error} is not set); submit it: sbatch slurm/hpt_smoke.sbatch") from None


def topology_on(config: Config, job: SlurmJob) -> Topology:
    """Place the parts of a run on a job's nodes.

    Raises:
        ConfigError: the nodes do not suffice, or weights could not leave the trainer's nodes.
    """
    return place_nodes(config, Slots(f"job {job.number}", len(job.nodes), job.ranks_per_node))


def settings_on(config: Config, job: SlurmJob) -> list[str]:
    """Return the overrides that a configuration needs on a job's nodes."""
    return [f"transfer.host={job.address(job.nodes[topology_on(config, job).trainer_nodes[0]])}"]


def step(job: SlurmJob, name: str, nodes: Sequence[str], tasks_per_node: int) -> list[str]:
    """Return an srun, up to its command, on some nodes. A task that fails ends its step; steps share the nodes' resources."""
    return [
        *("srun", "--quiet", f"--job-name={name}", "--overlap", "--kill-on-bad-exit=1", "--wait=0", "--input=none"),
        # Slurm would bind every task to a core or two; ranks and servers have more threads than that.
        "--cpu-bind=none",
        *(f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"),
        *(f"--nodelist={','.join(nodes)}", "--distribution=block"),
        *((f"--gpus-per-node={job.ranks_per_node}",) if job.has_gpus else ()),
        *job.srun,
    ]


def trainer_command(job: SlurmJob, topology: Topology, arguments: Sequence[str]) -> list[str]:
    """Return the command line that starts all trainer ranks, node by node."""
    nodes = [job.nodes[index] for index in topology.trainer_nodes]
    start = step(job, "trainer", nodes, len(topology.trainer) // len(nodes))
    return [*start, *_task(job, "--rank"), job.python, "-m", "megatron_hpt.actor.trainer", *arguments]


def coordinator_command(job: SlurmJob, topology: Topology, arguments: Sequence[str]) -> list[str]:
    """Return the command line that starts the coordinator on the trainer's first node."""
    start = step(job, "coordinator", [job.nodes[topology.trainer_nodes[0]]], 1)
    return [*start, *_task(job), job.python, "-m", "megatron_hpt.rollout.coordinator", *arguments]


def engine_command(job: SlurmJob, name: str, places: Sequence[Device], server: Sequence[str]) -> list[str]:
    """Return the command line that starts one server on its GPUs; a step of its own, so that it can be started again alone.

    Args:
        name: name of the step.
        server: command line of the engine.
    """
    gpus = ("--gpus", ",".join(str(device.gpu) for device in places)) if job.has_gpus else ()
    return [*step(job, name, [job.nodes[places[0].node]], 1), *_task(job, *gpus), *server]


def _task(job: SlurmJob, *flags: str) -> list[str]:
    return [job.python, "-m", "megatron_hpt.launch.slurm.task", *flags]


def imagined(config: Config, ranks_per_node: int, python: str, srun: Sequence[str]) -> SlurmJob:
    """Return a job with just the nodes that a run takes, for showing what would be started before there is a job."""
    nodes = least_nodes(config, ranks_per_node)
    names = tuple(f"node{index}" for index in range(1, nodes + 1))
    return SlurmJob(0, 0, names[0], names, ranks_per_node, config.transfer.transport in BETWEEN_GPUS, tuple(srun), python)


def describe(config: Config, job: SlurmJob) -> str:
    """Describe the nodes and command lines of a run, with names in place of addresses."""
    topology, kind = topology_on(config, job), engine_of(config)
    arguments = [f"runs/{config.name}-<time>", "--store", f"{job.host}:<port>", "--from-step", "<step>"]
    nodes = [job.nodes[index] for index in topology.trainer_nodes]
    lines = [
        f"trainer: {len(topology.trainer)} ranks on {', '.join(nodes)}; MASTER_ADDR={nodes[0]} MASTER_PORT={job.port(0)}",
        shlex.join(trainer_command(job, topology, arguments)),
        f"coordinator: on {nodes[0]}",
        shlex.join(coordinator_command(job, topology, arguments)),
    ]
    for index, places in enumerate(topology.engines):
        name, host = f"engine_{index}", job.nodes[places[0].node]
        start = Start(config.engine_model, job.port(1 + index), Path("runs"), job.has_gpus)
        server = kind.command(_at(config, host), job.python, start)
        lines += [f"engine {index}: on {host}", shlex.join(engine_command(job, name, places, server))]
    return "\n".join([*lines, ""])


def _at(config: Config, host: str) -> Config:
    """Return the configuration of a server that listens at `host`."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"host": host})})


def other_steps(steps: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the steps of a job (``7.0``, ``7.batch``) that srun has started, without the one that this process is in."""
    own = environment.get("SLURM_STEP_ID")
    return [name for name in steps if (number := name.rpartition(".")[2]).isdecimal() and number != own]


class SlurmLauncher:
    """Starts every part by an srun inside the allocation of this process."""

    def __init__(self, config: Config, run: RunDir, job: SlurmJob) -> None:
        self._config, self._run, self._job = config, run, job
        self._topology = topology_on(config, job)
        self.host = job.address(job.host)

    def trainer(self, arguments: Sequence[str]) -> Child:
        meeting = {"MASTER_ADDR": self._config.transfer.host, "MASTER_PORT": str(self._job.port(0))}
        command = trainer_command(self._job, self._topology, arguments)
        return Child.start("trainer", command, self._run.log("srun"), {**inherited_here(), **meeting})

    def coordinator(self, arguments: Sequence[str]) -> Child:
        command = coordinator_command(self._job, self._topology, arguments)
        return Child.start("coordinator", command, self._run.log("coordinator"), coordinators(self._config))

    def engine(self, index: int) -> tuple[str, Child]:
        name, places = f"engine_{index}", self._topology.engines[index]
        config = _at(self._config, self._job.address(self._job.nodes[places[0].node]))
        start = Start(self._run.engine_model(config), self._job.port(1 + index), self._run.path, self._job.has_gpus)
        around = partial(engine_command, self._job, name, places)
        return start_engine(config, index, start, self._run.log(name), {}, around)

    def _steps(self) -> list[str]:
        """Return the job's steps without the one that this process may be in, as a supervisor that NeMo-Run started is."""
        listed = ["squeue", "--noheader", "--steps", f"--jobs={self._job.number}", "--format=%i"]
        steps = subprocess.run(
            listed, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace"
        ).stdout.split()
        return other_steps(steps, os.environ)

    def stop(self, children: Sequence[Child]) -> None:
        # SIGTERM to an srun would kill its tasks at once. Slurm brings the tasks the signal, and they end within their time.
        if any(child.exit_code is None for child in children):
            # Slurm refuses this for a job that is ending; then it has sent the signal itself.
            subprocess.run(["scancel", "--signal=TERM", *self._steps()], capture_output=True, check=False)
        deadline = time.monotonic() + GRACE_S
        while any(child.exit_code is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        stop_all(children)
