"""slurm/hpt_smoke.sbatch on a real Slurm: real Megatron ranks and a real vLLM on nodes that see each other by network alone.

Whatever happens to a run, it ends with the weights of one that was left alone, bit for bit.
"""

import hashlib
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_hpt.telemetry import metrics

from .cluster import Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS = 10
SMALL = (
    *("trainer.prompts_per_step=8", "rollout.samples_per_prompt=4", "optimizer.warmup_steps=0", "rollout.threads=1"),
    *("evaluation.sets={}", f"trainer.steps={STEPS}", "trainer.save_every=2"),
)
SITE = {
    "HPT_BIN": str(Path(sys.executable).parent / "megatron-hpt"),
    "HPT_RECIPE": str(ROOT / "recipes" / "quickstart.py"),
    "PYTHONPATH": str(ROOT),
}
MINUTES_5 = 300.0


def smoke(cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = (), **environment: str) -> Job:
    """Submit the script from a folder of its own."""
    folder.mkdir(exist_ok=True)
    script = str(ROOT / "slurm" / "hpt_smoke.sbatch")
    return cluster.submit(folder, *options, script, *SMALL, *overrides, **{**SITE, **environment})


def run_of(job: Job) -> Path | None:
    """The run directory of a job; None: not yet there."""
    return next((job.folder / "runs").glob(f"hpt-smoke-{job.number}-*/"), None)


def lines(job: Job) -> int:
    """Finished steps."""
    run = run_of(job)
    return len(metrics.read(run / "metrics.jsonl")) if run and (run / "metrics.jsonl").is_file() else 0


def placed(job: Job) -> list[list[str]]:
    """Nodes of each try."""
    return [nodes.split(", ") for nodes in re.findall(r"nodes: ([n\d, ]+)", job.output)]


def weights(job: Job) -> str:
    """Hash of the final model."""
    return hashlib.sha256((run_of(job) / "export" / "model.safetensors").read_bytes()).hexdigest()


def left(cluster: Cluster, seconds: float = 20) -> list[str]:
    """What still runs on nodes after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [f"{node}: {p.name()} {p.pid}" for node in cluster.names() for p in cluster.processes(node)]
        if not found:
            return []
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that was left alone, but for a sick node among those that it got."""
    job = smoke(cluster, tmp_path_factory.mktemp("alone"), options=("--nodes=4",), HPT_HEALTH="test $(hostname) != n2")
    assert job.end(MINUTES_5) == "COMPLETED", job.output
    return job


def test_hpt_trains_on_two_nodes_with_an_engine_on_a_third(cluster: Cluster, alone: Job) -> None:
    found = metrics.read(run_of(alone) / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(STEPS))
    assert "left out: n2" in alone.output
    assert "nodes: n1, n3, n4; spare: none" in alone.output
    assert (run_of(alone) / "logs" / "trainer_rank1.log").is_file()
    assert left(cluster) == []


def test_a_notice_requeues_a_cut_off_node_is_left_and_the_run_goes_on(cluster: Cluster, alone: Job, tmp_path: Path) -> None:
    """Three tries of one job: one ended by a notice, one by a node that is gone, one left alone."""
    job = smoke(cluster, tmp_path)
    job.wait(lambda: lines(job) >= 2, MINUTES_5)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does before the time limit
    job.wait(lambda: job.show("Restarts") == "1", 60)
    job.wait(lambda: "which is saved" in job.output, 60)
    saved = int(re.search(r"ended by SIGUSR1 after step (\d+), which is saved", job.output)[1])
    assert 2 <= saved < STEPS - 2
    job.wait(lambda: lines(job) > saved, MINUTES_5)
    assert (run_of(job) / "logs" / "try0" / "trainer_rank0.log").is_file()
    cluster.cut("n2")
    try:
        job.wait(lambda: len(placed(job)) == 3, 180)
    finally:
        cluster.mend("n2")
    assert job.end(MINUTES_5) == "COMPLETED", job.output
    assert f"step {saved + 1}/{STEPS}" in job.output
    assert "n2" in placed(job)[1]
    assert "n2" not in placed(job)[2]
    assert [line["step"] for line in metrics.read(run_of(job) / "metrics.jsonl")] == list(range(STEPS))
    assert weights(job) == weights(alone)


@pytest.mark.thorough
def test_a_dead_engine_is_replaced(cluster: Cluster, alone: Job, tmp_path: Path) -> None:
    """Adds an engine on a node of its own to those that tests/end_to_end kills beside their supervisor."""
    job = smoke(cluster, tmp_path)
    job.wait(lambda: lines(job) >= 3, MINUTES_5)
    server = next(p for p in cluster.processes("n3") if "vllm.entrypoints" in " ".join(p.cmdline()))
    # A cgroup ends the rest of a step; this Slurm has none, and loses sight of the children of a process that was killed.
    for process in (server, *server.children(recursive=True)):
        process.kill()
    assert job.end(MINUTES_5) == "COMPLETED", job.output
    assert "engine 0 died" in job.output
    assert job.show("Restarts") == "0"
    assert weights(job) == weights(alone)


def test_too_few_healthy_nodes_hand_the_run_over_to_a_job_without_them(cluster: Cluster, tmp_path: Path) -> None:
    job = smoke(cluster, tmp_path, HPT_HEALTH="test $(hostname) != n2")
    assert job.end(120) == "FAILED"
    other = re.search(r"job (\d+) goes on without", job.output)[1]
    shown = cluster.call("scontrol", "show", "job", other)
    cluster.call("scancel", other)
    assert "ExcNodeList=n2" in shown
    assert job.show("ExitCode") == "75:0"
    assert left(cluster) == []


@pytest.mark.thorough
def test_the_time_limit_requeues_and_scancel_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    """Adds the limit itself to the notice that is sent by hand; NeMo-Run's test cancels too."""
    job = smoke(cluster, tmp_path, "trainer.steps=2000", options=("--time=3", "--signal=B:USR1@60"))
    job.wait(lambda: job.show("Restarts") == "1", MINUTES_5)
    before = lines(job)
    assert re.search(r"ended by SIGUSR1 after step \d+, which is saved", job.output)
    job.wait(lambda: lines(job) > before, MINUTES_5)
    cluster.call("scancel", job.number)
    assert job.end(60) == "CANCELLED"
    assert f"Slurm is ending job {job.number}" in job.output
    assert left(cluster) == []
