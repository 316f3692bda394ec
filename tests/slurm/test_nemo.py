"""`megatron-hpt launch` with a real NeMo-Run on a real Slurm: placed, noticed, requeued, cancelled, followed."""

import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_hpt.telemetry import metrics

from .cluster import Cluster, Job

ROOT = Path(__file__).parents[2]
NEMO = ROOT / ".venv-nemo"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (NEMO / ".ready").is_file(), reason="no NeMo-Run: make nemo-env"),
]

RECIPE = str(ROOT / "recipes" / "quickstart.py")
SMALL = (
    *(
        "trainer.prompts_per_step=8",
        "rollout.samples_per_prompt=4",
        "optimizer.warmup_steps=0",
        "evaluation.sets={}",
        "rollout.threads=1",
    ),
    *("trainer.steps=6", "trainer.save_every=2", "transfer.transport=gloo"),
)


def hpt(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """The command line in NeMo-Run's environment, on a login node."""
    command = (str(NEMO / "bin" / "python"), "-m", "megatron_hpt.cli", *arguments)
    return cluster.call(*command, cwd=folder, PYTHONPATH=str(ROOT), COLUMNS="200")


def launch(cluster: Cluster, folder: Path, *overrides: str, **site: object) -> tuple[str, Job]:
    """Send the quickstart to the cluster; its experiment and its job."""
    file = folder / "site.yaml"
    small = {"whole_nodes": False, "has_gpus": False, "ranks_per_node": 1, "sbatch": {"mem": "6G", "cpus_per_task": "2"}}
    program = str(Path(sys.executable).parent / "megatron-hpt")
    there = {"kind": "slurm", "checkout": str(folder), "program": program, "environment": {"PYTHONPATH": str(ROOT)}}
    file.write_text(yaml.safe_dump({**there, "account": "hpt", "partition": "batch", "time": "01:00:00", **small, **site}))
    told = hpt(cluster, folder, "launch", RECIPE, *overrides, "--site", str(file))
    experiment = re.search(r"^launched  (\S+)$", told, re.MULTILINE)[1]
    return experiment, Job(cluster, state(cluster, folder, experiment)[1], folder)


def state(cluster: Cluster, folder: Path, experiment: str) -> tuple[str, str]:
    """NeMo-Run's state of an experiment, and the number of its job."""
    return re.search(r"^quickstart  (\S+)  (\d+)$", hpt(cluster, folder, "status", experiment), re.MULTILINE).groups()


def lines(job: Job) -> int:
    """Finished steps."""
    return sum(len(metrics.read(path)) for path in job.folder.glob("runs/quickstart-*/metrics.jsonl"))


def until(condition, seconds: float) -> None:
    """Accounting is late."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(2)


@pytest.mark.thorough
def test_a_notice_saves_and_the_job_goes_on_from_there(cluster: Cluster, tmp_path: Path) -> None:
    """Adds NeMo-Run's script to the notice of tests/slurm/test_training.py, and an end to the job that is cancelled below."""
    experiment, job = launch(cluster, tmp_path, *SMALL)
    job.wait(lambda: lines(job) >= 2, 300)
    cluster.call("scancel", "--signal=USR1", job.number)  # as Slurm does before the time limit, without B: in --signal
    job.wait(lambda: job.show("Restarts") == "1", 60)
    assert job.end(300) == "COMPLETED", job.output
    (run,) = (tmp_path / "runs").glob("quickstart-*-*-*/")
    assert run.name.startswith(f"quickstart-{job.number}")
    assert [line["step"] for line in metrics.read(run / "metrics.jsonl")] == list(range(6))
    assert (run / "logs" / "try0" / "trainer_rank1.log").is_file()
    until(lambda: state(cluster, tmp_path, experiment)[0] == "SUCCEEDED", 30)
    shown = hpt(cluster, tmp_path, "logs", experiment)
    assert "which is saved" in shown  # both tries
    assert "done  runs/quickstart-" in shown


def test_cancel_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    experiment, job = launch(cluster, tmp_path, *SMALL)
    job.wait(lambda: lines(job) >= 1, 300)
    hpt(cluster, tmp_path, "cancel", experiment)
    assert job.end(60) == "CANCELLED"
    until(lambda: not [process for node in cluster.names() for process in cluster.processes(node)], 30)
    until(lambda: state(cluster, tmp_path, experiment)[0] == "CANCELLED", 30)


def test_a_job_that_fails_is_shown_as_failed(cluster: Cluster, tmp_path: Path) -> None:
    experiment, job = launch(cluster, tmp_path, *SMALL, program="/bin/false")
    assert job.end(60) == "FAILED"
    until(lambda: state(cluster, tmp_path, experiment)[0] == "FAILED", 30)
