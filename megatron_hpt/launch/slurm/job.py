"""``megatron-hpt slurm``: the life of a batch job, from the check of its nodes to its requeue.

The command lines of a run, which need no Slurm to be made, are in `launch.slurm.launcher`.
"""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError, DeadlineError, HptError, RequeueRequested
from megatron_hpt.launch.slurm.attempts import Tries, Try
from megatron_hpt.launch.slurm.launcher import (
    SlurmJob,
    SlurmLauncher,
    describe,
    imagined,
    job_of,
    settings_on,
    step,
    topology_on,
)
from megatron_hpt.launch.supervisor import Interrupted, RunFailed
from megatron_hpt.launch.train import resume_point, resume_run, start_run
from megatron_hpt.run import RunDir, newest

HEALTH_S = 300
"""Most seconds that the health check of a node may take."""
_HEALTHY = "HEALTHY"
_KEPT = {
    "job-name": "SLURM_JOB_NAME",
    "nodes": "SLURM_JOB_NUM_NODES",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
}
"""Option of sbatch for a job that is submitted again → variable in which Slurm keeps its value."""


class Hopeless(HptError):
    """Raised when starting a job again would not help."""

    EXIT_CODE = 70
    """EX_SOFTWARE of sysexits.h."""


class HandedOver(RequeueRequested):
    """Raised when another job goes on with the run."""


@dataclass(frozen=True)
class Site:
    """Settings of a site for its jobs, from the batch script."""

    ranks_per_node: int
    python: str
    """Interpreter on the nodes."""
    srun: str
    """Additional arguments of every srun, as a shell would read them."""
    health: str
    """Shell command that fails on a sick node."""


def run_job(source: str, overrides: list[str], root: Path, site: Site) -> RunDir:
    """Start the run of this job, or continue the newest run with the recipe's name. Called by the batch script.

    Raises:
        HandedOver: another job was submitted that leaves sick nodes out.
        RequeueRequested: this job was requeued.
        Hopeless: several tries in a row brought no new checkpoint.
        Interrupted: Slurm is ending the job.
    """
    signal.signal(signal.SIGUSR1, _noticed_early)
    config = recipes.load(source, overrides).config
    folder, job = root / f"{config.name}.slurm", _job(site)
    tries = Tries(folder)
    if reason := tries.begin(job.number, job.attempt, job.nodes, _newest_checkpoint(config.name, root)):
        raise Hopeless(f"{reason}; see {tries.file}")
    try:
        job = _without_sick(config, job, site.health, folder, overrides)
        run = _train(source, [*overrides, *settings_on(config, job)], root, job)
    except HandedOver:
        tries.end()
        raise
    except (RunFailed, DeadlineError, RequeueRequested) as error:
        _start_again(error, job, _newest_checkpoint(config.name, root), tries)
    tries.end()
    return run


def plan_job(source: str, overrides: list[str], site: Site) -> str:
    """Describe what `run_job` would start, on this job's nodes or, outside a job, on imagined ones; starts nothing."""
    config = recipes.load(source, overrides).config
    if "SLURM_JOB_ID" in os.environ:
        return describe(config, _job(site))
    return describe(config, imagined(config, site.ranks_per_node, site.python, shlex.split(site.srun)))


def _job(site: Site) -> SlurmJob:
    given = os.environ.get("SLURM_JOB_NODELIST", "")
    nodes = _ask("scontrol", "show", "hostnames", given).split() if given else []
    return job_of(os.environ, nodes, site.ranks_per_node, site.python, shlex.split(site.srun))


def _train(source: str, settings: list[str], root: Path, job: SlurmJob) -> RunDir:
    def launch(config: Config) -> Callable[[RunDir], SlurmLauncher]:
        return functools.partial(SlurmLauncher, config, job=job)

    config = recipes.load(source, settings).config
    run = _existing(config.name, root)
    if run is None:
        return start_run(source, settings, root, launch)
    if resume_point(run, config) == config.trainer.steps:  # the try before ended after its last step
        return run
    put_logs_aside(run)
    return resume_run(source, settings, root, launch)


def _existing(name: str, root: Path) -> RunDir | None:
    try:
        return newest(name, root)
    except ConfigError:
        return None


def put_logs_aside(run: RunDir) -> None:
    """Move the logs of the try before into a folder of their own: ``logs/try0`` and so on."""
    folder = run.logs / f"try{len(list(run.logs.glob('try*')))}"
    folder.mkdir()
    for path in run.logs.glob("*.log"):
        path.rename(folder / path.name)


# Sick nodes.


def _without_sick(config: Config, job: SlurmJob, health: str, folder: Path, overrides: list[str]) -> SlurmJob:
    """Return the job with as many healthy nodes as the run takes; other healthy nodes are spares.

    Raises:
        HandedOver: too few nodes are healthy; another job was submitted that excludes the sick ones.
        RunFailed: no node is healthy.
    """
    needed, logs = topology_on(config, job).nodes, folder / f"health-{job.number}-{job.attempt}"
    logs.mkdir(parents=True, exist_ok=True)
    healthy = check_nodes(job, health, logs)
    sick = [node for node in job.nodes if node not in healthy]
    if sick:
        say(job, f"left out: {', '.join(sick)}; see {logs}")
    if not healthy:
        raise RunFailed(f"no node passed the health check ({health}); see {logs}")
    if len(healthy) < needed:
        other = _submit_without(sick, config.name, job, folder, overrides)
        raise HandedOver(f"{len(healthy)} nodes are healthy and the run takes {needed}: job {other} goes on without {sick}")
    say(job, f"nodes: {', '.join(healthy[:needed])}; spare: {', '.join(healthy[needed:]) or 'none'}")
    return job.only(healthy[:needed])


def check_nodes(job: SlurmJob, command: str, logs: Path) -> list[str]:
    """Run the health check on every node at once, and return those where it succeeded."""
    check = f"timeout {HEALTH_S} bash -c {shlex.quote(command)} && echo {_HEALTHY}"
    on_each = [*step(job, "health", job.nodes, 1), "--kill-on-bad-exit=0", f"--output={logs}/%N.log", "bash", "-c", check]
    try:
        subprocess.run(on_each, timeout=HEALTH_S + 60, check=False)
    except subprocess.TimeoutExpired:  # some node does not even start the check
        say(job, f"the health check did not end within {HEALTH_S + 60} s")
    texts = {node: logs / f"{node}.log" for node in job.nodes}
    return [
        node for node, log in texts.items() if log.is_file() and log.read_text(encoding="utf-8").rstrip().endswith(_HEALTHY)
    ]


def _submit_without(sick: Sequence[str], name: str, job: SlurmJob, folder: Path, overrides: list[str]) -> str:
    """Submit this job's script as a new job that excludes sick nodes, which Slurm does not allow for a job that runs.

    Returns:
        Number of the new job.
    """
    excluded = ",".join(sorted({*filter(None, os.environ.get("HPT_EXCLUDED", "").split(",")), *sick}))
    script = folder / "script.sbatch"
    script.unlink(missing_ok=True)
    _ask("scontrol", "write", "batch_script", str(job.number), str(script))
    options = [f"--{option}={os.environ[variable]}" for option, variable in _KEPT.items() if variable in os.environ]
    limit = _ask("squeue", "-h", "-j", str(job.number), "-o", "%l")
    inherited = {**os.environ, "HPT_NAME": name, "HPT_EXCLUDED": excluded}
    again = ["sbatch", "--parsable", "--export=ALL", *options, f"--time={limit}", f"--exclude={excluded}", str(script)]
    return _ask(*again, *overrides, environment=inherited)


# Once more, or not.


def _start_again(error: HptError, job: SlurmJob, checkpoint: int, tries: Tries) -> NoReturn:
    """Requeue the job, unless Slurm is ending it or it is hopeless; raises as `run_job` does.

    Args:
        error: what ended the run.
        checkpoint: step of the newest checkpoint; 0 if there is none.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    state = _ask("squeue", "-h", "-j", str(job.number), "-o", "%T")
    if state != "RUNNING":  # scancel and lost nodes end parts before this process hears of it
        raise Interrupted(f"Slurm is ending job {job.number} ({state}); what was seen of it: {str(error).partition(';')[0]}")
    failed = Try(job.number, job.attempt, tuple(job.nodes), str(error).splitlines()[0], checkpoint)
    if reason := tries.fail(failed):
        raise Hopeless(f"{error}\n{reason}; see {tries.file}") from error
    say(job, str(error))  # now: the requeue ends this process, which may then have said nothing yet
    _ask("scontrol", "requeue", str(job.number))
    raise RequeueRequested(f"job {job.number} is requeued, checkpoint {checkpoint}") from error


def _newest_checkpoint(name: str, root: Path) -> int:
    run = _existing(name, root)
    return max(run.checkpoint_steps(), default=0) if run else 0


def _noticed_early(*_: object) -> NoReturn:
    raise RequeueRequested("ended by SIGUSR1 before the run was started")


def _ask(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the output of one of Slurm's commands.

    Raises:
        HptError: the command fails, or is not on this machine.
    """
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise HptError(f"{command[0]}: not found; the batch script must run where Slurm's commands are") from None
    if result.returncode != 0:
        raise HptError(f"{shlex.join(command)}: {result.stderr.strip()}")
    return result.stdout.strip()


def say(job: SlurmJob, what: str) -> None:
    """Write a line to the job's output."""
    sys.stdout.write(f"try {job.attempt}: {what}\n")
    sys.stdout.flush()
