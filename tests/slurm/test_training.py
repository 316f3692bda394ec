"""slurm/hpt_smoke.sbatch on a real Slurm: real Megatron ranks and a real vLLM on nodes that see each other by network alone."""

import sys
from pathlib import Path

import pytest

from megatron_hpt.telemetry import metrics

from .cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.end_to_end, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SMALL = (
    *("trainer.prompts_per_step=8", "rollout.samples_per_prompt=4", "optimizer.warmup_steps=0"),
    *("evaluation.sets={}", "trainer.steps=6", "trainer.save_every=2"),
)
SITE = {
    "HPT_BIN": str(Path(sys.executable).parent / "megatron-hpt"),
    "HPT_RECIPE": str(ROOT / "recipes" / "quickstart.py"),
    "PYTHONPATH": str(ROOT),
}


def smoke(cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = (), **environment: str) -> Job:
    """Submit the script from a folder of its own."""
    folder.mkdir(exist_ok=True)
    script = str(ROOT / "slurm" / "hpt_smoke.sbatch")
    return cluster.submit(folder, *options, script, *SMALL, *overrides, **SITE, **environment)


def run_of(job: Job) -> Path:
    """The run directory of a job."""
    (path,) = (job.folder / "runs").glob(f"hpt-smoke-{job.number}-*/")
    return path


def test_hpt_trains_on_two_nodes_with_an_engine_on_a_third(cluster: Cluster, tmp_path: Path) -> None:
    job = smoke(cluster, tmp_path)
    assert job.end(300) == "COMPLETED", job.output
    run = run_of(job)
    lines = metrics.read(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert (run / "export" / "model.safetensors").is_file()
    assert not [process for node in cluster.names() for process in cluster.processes(node)]
