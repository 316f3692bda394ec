"""Where `megatron-hpt launch` sends a recipe: small typed files, and the script that runs there. Knows nothing of NeMo-Run.

The script is the last line of an sbatch of slurm/: `megatron-hpt slurm` inside the allocation, `megatron-hpt train` on this
machine. Code, environment, weights and data are staged there by path; a site's `settings` say where, where a recipe does not.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_hpt.config import Config
from megatron_hpt.environment import PASS
from megatron_hpt.errors import ConfigError, did_you_mean
from megatron_hpt.plan.cluster import GpusOfNode, read_tree
from megatron_hpt.plan.topology import least_nodes
from megatron_hpt.settings.sections import Int, Name, Section, validated_section

SITES = Path("recipes/sites")
"""Where a cluster is looked up by name."""
MARGIN_S = 60
"""Seconds of a notice that are not the trainer's: to stop what runs and to requeue the job."""

ONE_LOG = ('[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exec >>"$(echo ../log-*_"$SLURM_JOB_ID"_0.out)" 2>&1',)
"""NeMo-Run starts a task below the folder of its output, a file for each try, and shows the first alone: all write to that."""


class SshConfig(Section):
    host: Name
    """Login node."""
    user: Name
    """There."""
    job_dir: Name
    """Folder there, on the file system that all nodes see, for scripts and output."""
    identity: str | None = None
    """Private key on this machine; default: what ssh would take."""


class SiteConfig(Section):
    """What every kind of cluster has."""

    called: ClassVar[str] = "a cluster to send recipes to"

    checkout: Name
    """Folder of this repository there, seen by all nodes; relative paths of a recipe start in it, and it in this folder."""
    program: str = ".venv/bin/megatron-hpt"
    """From the checkout."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default={})
    """Exported to everything that runs, whoever reads it."""
    settings: list[str] = Field(default=[])
    """Settings of every run there, e.g. model.path=/staged/Llama-3.1-70B; those of the command line come later and win."""


class LocalSite(SiteConfig):
    kind: Literal["local"]


class SlurmSite(SiteConfig):
    kind: Literal["slurm"]
    account: Name
    """That is charged."""
    partition: str | None = None
    """Default: Slurm's."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+:\d\d:\d\d$")] = "24:00:00"
    """Limit of one job: [days-]hours:minutes:seconds."""
    ranks_per_node: GpusOfNode = 8
    """Trainer ranks of a node: its GPUs."""
    has_gpus: bool = True
    """Ask for as many GPUs a node as ranks."""
    whole_nodes: bool = True
    """Nodes are not shared, and all of their memory is the job's."""
    spare_nodes: Annotated[Int, Field(ge=0, le=2**17)] = 0
    """Nodes beyond those that the layout takes, for sick ones."""
    notice_s: Annotated[Int, Field(ge=2 * MARGIN_S, le=366 * 86_400)] = 900
    """Seconds between the notice and the time limit: two checkpoints and a step."""
    health: str = "true"
    """Command that fails on a sick node."""
    python: str | None = None
    """Interpreter of trainer ranks and engines, e.g. inside the container; default: the program's."""
    container_image: str | None = None
    """For trainer ranks and engines (pyxis)."""
    container_mounts: list[str] = Field(default=[])
    """FROM:TO, each."""
    sbatch: dict[str, str] = Field(default={})
    """More options of sbatch, e.g. qos."""
    ssh: SshConfig | None = None
    """The way to sbatch; default: this machine is the login node."""

    @model_validator(mode="after")
    def _notice_comes_within_the_limit(self) -> SlurmSite:
        """Slurm would send it at once, and the job be requeued without end."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        limit = ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds
        if limit < 2 * self.notice_s:
            raise ValueError(f"time: given {self.time}; it must be at least twice notice_s, {self.notice_s} s")
        return self


Site = LocalSite | SlurmSite
KINDS: dict[str, type[LocalSite] | type[SlurmSite]] = {"local": LocalSite, "slurm": SlurmSite}


def load_site(given: str) -> Site:
    """Read the site of a file, or of a name in recipes/sites/.

    Raises:
        ConfigError: no such file, or not a site that a recipe can be sent to; one line for each problem.
    """
    path = Path(given) if given.endswith((".yaml", ".yml")) else SITES / f"{given}.yaml"
    tree = read_tree(path, "--site")
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise ConfigError(f"{path}: kind: given {kind!r}; a cluster to send recipes to is one of {', '.join(KINDS)}{hint}")
    return validated_section(KINDS[kind], tree, str(path), "not a site")


def nodes_of(site: SlurmSite, config: Config) -> int:
    """Nodes that sbatch is asked for.

    Raises:
        ConfigError: the layout, or the way of its weights, does not go with nodes of this size.
    """
    return least_nodes(config, site.ranks_per_node) + site.spare_nodes


def script_of(site: Site, recipe: str, overrides: Sequence[str], config: Config) -> str:
    """What bash runs there. A job that is started again, by Slurm or without its sick nodes, goes on with its run.

    A run is named by its first job, unless `overrides` name it: then a run of that name is continued.
    """
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _exported(site).items()]
    before = ONE_LOG if isinstance(site, SlurmSite) else ()
    there = f"cd {shlex.quote(str(Path(site.checkout).absolute()))}"
    return "\n".join(["set -euo pipefail", *before, there, *exports, _start(site, recipe, overrides, config), ""])


def _exported(site: Site) -> dict[str, str]:
    """The site's environment is somebody's choice, and no remains of another program."""
    given = site.environment
    return {**given, PASS: ",".join([*given, *filter(None, [given.get(PASS)])])} if given else {}


def _start(site: Site, recipe: str, overrides: Sequence[str], config: Config) -> str:
    given = shlex.join([recipe, *overrides])
    if isinstance(site, LocalSite):
        return f"exec {shlex.quote(site.program)} train {given}"
    named = any(override.startswith("name=") for override in overrides)
    name = [] if named else [f'"name=${{HPT_NAME:-{config.name}-$SLURM_JOB_ID}}"']
    own = [*name, f"deadlines.notice_s={site.notice_s - MARGIN_S}"]
    options = {
        "--ranks-per-node": str(site.ranks_per_node),
        "--python": site.python or str(Path(site.program).parent / "python"),
        "--health": site.health,
        "--srun": shlex.join(_container(site)),
    }
    flags = shlex.join([word for option in options.items() for word in option])
    # NeMo-Run asks for unbuffered steps, which Slurm makes by a terminal: no progress display there, none in steps of our own.
    plain = "unset SLURM_UNBUFFEREDIO\nexport TTY_COMPATIBLE=0"
    # Until the program listens to it, the notice would kill it.
    return f"{plain}\ntrap '' USR1\nexec {shlex.quote(site.program)} slurm {flags} {given} {' '.join(own)}"


def _container(site: SlurmSite) -> list[str]:
    """More arguments of every srun."""
    mounts = [f"--container-mounts={','.join(site.container_mounts)}"] if site.container_mounts else []
    return [f"--container-image={site.container_image}", *mounts] if site.container_image else []


def executor_arguments(site: SlurmSite, nodes: int) -> dict[str, Any]:
    """Those of NeMo-Run's SlurmExecutor, but for tunnel and packager.

    NeMo-Run starts one task on the first node, which shares what the job has with the steps that it starts itself. Its own
    containers are not used: in one, there would be no srun.
    """
    return {
        "account": site.account,
        "partition": site.partition,
        "time": site.time,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": site.ranks_per_node if site.has_gpus else None,
        "exclusive": True if site.whole_nodes else None,
        "mem": "0" if site.whole_nodes else None,
        "signal": f"USR1@{site.notice_s}",
        "srun_args": ["--nodes=1", "--ntasks=1", "--relative=0", "--overlap", "--cpu-bind=none"],
        "additional_parameters": dict(site.sbatch),
        "container_image": None,
        "poll_estimated_start_time": False,
        "job_name_prefix": "hpt-",
    }


def home() -> Path:
    """Where NeMo-Run keeps scripts, output and what it knows of experiments: on the file system of the checkout."""
    return Path(os.environ.get("NEMORUN_HOME", "runs/nemo")).absolute()
