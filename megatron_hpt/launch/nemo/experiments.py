"""`megatron-hpt launch`: a recipe as one NeMo-Run task on a site of recipes/sites/.

NeMo-Run places the script of `launch.nemo.site` and follows it: experiments, tunnels, status, output. It has an environment
of its own (`make nemo-env`), imported here when it is used: what it depends on does not go with the pins of the trainer's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.errors import HptError
from megatron_hpt.launch.nemo.site import (
    LocalSite,
    Site,
    SshConfig,
    executor_arguments,
    home,
    load_site,
    nodes_of,
    script_of,
)
from megatron_hpt.overrides import with_files

SUCCEEDED = "SUCCEEDED"
"""NeMo-Run's state of a task that ended well."""


class LaunchError(HptError):
    """NeMo-Run is not there, does not know an experiment, or the job failed."""


def nemo_run() -> ModuleType:
    """The library, which keeps its files on the checkout's file system.

    Raises:
        LaunchError: it cannot be imported; says what to install.
    """
    try:
        import nemo_run
    except ImportError as error:
        raise LaunchError(
            f"NeMo-Run cannot be imported ({error}); `make nemo-env` installs it, with the leptonai (<0.47) that it needs: "
            "then .venv-nemo/bin/megatron-hpt launch …"
        ) from None
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(home()))
    return nemo_run


def task(recipe: str, overrides: Sequence[str] = (), cluster: str = "local") -> tuple[Any, Any]:
    """A recipe as NeMo-Run knows tasks, to be composed with others: ``experiment.add(script, executor=executor)``.

    Returns:
        Its run.Script and its executor.

    Raises:
        ConfigError: of the recipe or the cluster; or the layout does not go with the cluster's nodes.
        LaunchError: no NeMo-Run.
    """
    _, script, executor = _task(recipe, overrides, cluster)
    return script, executor


def launch(recipe: str, overrides: Sequence[str], cluster: str, wait: bool, logs: bool) -> str:
    """Send a recipe to a cluster; on this machine, until it has ended.

    Returns:
        The experiment's id.

    Raises:
        LaunchError: it was waited for and failed.
    """
    follows = wait or logs or isinstance(load_site(cluster), LocalSite)
    with _experiment(recipe, overrides, cluster) as experiment:
        experiment.run(detach=not follows, tail_logs=logs)
    if follows:
        _require_success(experiment)
    return experiment._id


def dry_run(recipe: str, overrides: Sequence[str], cluster: str) -> str:
    """What would be submitted, and the script of its task; starts nothing."""
    with _experiment(recipe, overrides, cluster) as experiment:
        experiment.dryrun(log=False)
    (job,) = experiment.jobs
    submitted = "" if isinstance(load_site(cluster), LocalSite) else f"{job._dryrun_info}\n"
    return f"{submitted}# {job.id}.sh\n{job.task.inline}"


def status(experiment: str) -> dict[str, str]:
    """Of each task of an experiment: its state and its job's number.

    Raises:
        LaunchError: there is no such experiment.
    """
    found = _found(experiment).status(return_dict=True)
    return {name: f"{task['status']}  {task['job_id']}" for name, task in found.items()}


def cancel(experiment: str) -> None:
    """End all tasks of an experiment, without saving; likewise."""
    found = _found(experiment)
    for job in found.jobs:
        found.cancel(job.id)


def show_logs(experiment: str) -> None:
    """Print the output of all tasks of an experiment; likewise."""
    found = _found(experiment)
    with contextlib.redirect_stderr(sys.stdout):  # where NeMo-Run writes it
        for job in found.jobs:
            found.logs(job.id)


@contextlib.contextmanager
def _experiment(recipe: str, overrides: Sequence[str], cluster: str) -> Iterator[Any]:
    """An experiment with one task, named as the run; NeMo-Run waits where this is left, unless it was told to detach."""
    name, script, executor = _task(recipe, overrides, cluster)
    with nemo_run().Experiment(name, log_level="WARNING", clean_mode=True, skip_status_at_exit=True) as experiment:
        experiment.add(script, executor=executor, name=name)
        yield experiment


def _task(recipe: str, overrides: Sequence[str], cluster: str) -> tuple[str, Any, Any]:
    """Name of the run, run.Script and executor."""
    site, run = load_site(cluster), nemo_run()
    given = [*site.settings, *with_files(overrides)]  # a file here may not be there
    config = recipes.load(recipe, given).config
    return config.name, run.Script(inline=script_of(site, recipe, given, config)), _executor(run, site, config)


def _executor(run: ModuleType, site: Site, config: Config) -> Any:
    """The packager ships nothing: the checkout is there."""
    if isinstance(site, LocalSite):
        return run.LocalExecutor(packager=run.Packager())
    return run.SlurmExecutor(
        tunnel=_tunnel(run, site.ssh), packager=run.Packager(), **executor_arguments(site, nodes_of(site, config))
    )


def _tunnel(run: ModuleType, ssh: SshConfig | None) -> Any:
    """NeMo-Run copies nothing for a tunnel without a way, so that one's folder is that of the experiment."""
    return run.SSHTunnel(**ssh.model_dump()) if ssh else run.LocalTunnel(job_dir="")


def _found(experiment: str) -> Any:
    run = nemo_run()
    title = experiment.rpartition("_")[0]
    if not (home() / "experiments" / title / experiment).is_dir():
        raise LaunchError(f"{experiment}: no such experiment in {home()}; launch prints the id")
    return run.Experiment.from_id(experiment)


def _require_success(experiment: Any) -> None:
    failed = [f"{job.id}: {job.state.name}" for job in experiment.jobs if job.state.name != SUCCEEDED]
    if failed:
        raise LaunchError(f"{', '.join(failed)}; see megatron-hpt logs {experiment._id}")
