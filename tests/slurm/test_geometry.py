"""slurm/hpt_70b.sbatch as it is, in its full geometry: 17 nodes of 8 GPUs, stand-ins for what runs on them."""

import re
import sys
import time
from pathlib import Path

import pytest

from megatron_hpt.examples import arithmetic, tiny_llama

from .cluster import Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RECIPE = """
from megatron_hpt.config import *

def recipe(size: str, method: str):
    return Config(
        name="stand-in",
        model=ModelConfig(path="model"),
        data=DataConfig(train="train.parquet", max_prompt_length=8, max_response_length=24),
        algorithm=AlgorithmConfig(name=method),
        rollout=RolloutConfig(servers=4, tensor_parallel=8, python=@STAND_IN@),
        transfer=TransferConfig(transport="gloo"),
        parallel=ParallelConfig(tensor=8, pipeline=4, data=3),
        trainer=TrainerConfig(steps=2),
    )
"""
"""Twelve nodes of trainers and four of engines, as a large model may have them, with a model that is there."""


def submit(cluster: Cluster, folder: Path, health: str, **environment: str) -> Job:
    """The script as it is, from a folder with a model, data and the site's settings."""
    stand_in = str(Path(__file__).parent / "stand_in.sh")
    (folder / "records").mkdir()
    tiny_llama.write(folder / "model", layers=4, heads=8, kv_heads=8, head_dim=32)
    arithmetic.write(folder, held_out=8)
    (folder / "recipe.py").write_text(RECIPE.replace("@STAND_IN@", repr(stand_in)))
    (folder / "slurm").mkdir()
    site = {
        "HPT_BIN": Path(sys.executable).parent / "megatron-hpt",
        "HPT_RECIPE": folder / "recipe.py",
        "HPT_PYTHON": stand_in,
        "HPT_HEALTH": f"'{health}'",
        "HPT_STAND_IN": folder / "records",
        "HPT_REAL": sys.executable,
        "PYTHONPATH": ROOT,
    }
    (folder / "slurm" / "site.env").write_text("".join(f"{name}={value}\n" for name, value in site.items()))
    return cluster.submit(folder, "--nodes=17", str(ROOT / "slurm" / "hpt_70b.sbatch"), **environment)


def test_96_ranks_and_four_engines_of_eight_beside_a_sick_node(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "test $(hostname) != n5")
    assert job.end(500) == "COMPLETED", job.output
    assert "left out: n5" in job.output
    found = [path.read_text().split() for path in (tmp_path / "records").glob("*-n*")]
    trainer = sorted((int(line[2].split("/")[0]), line[1], line[3]) for line in found if line[0] == "actor.trainer")
    nodes = [f"n{index}" for index in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13)]
    assert trainer == [(rank, nodes[rank // 8], f"local={rank % 8}") for rank in range(96)]
    assert {line[2].split("/")[1] for line in found if line[0] == "actor.trainer"} == {"96"}
    engines = sorted(line[1] for line in found if line[0] == "vllm.entrypoints")
    assert engines == ["n14", "n15", "n16", "n17"]
    assert {tuple(line[4:6]) for line in found if line[0] == "vllm.entrypoints"} == {
        ("gpus=0,1,2,3,4,5,6,7", "of=0,1,2,3,4,5,6,7")
    }
    assert [line[1] for line in found if line[0] == "rollout.coordinator"] == ["n1"]
    assert len(re.findall(r"http://", (tmp_path / "records" / "engines").read_text())) == 4
    assert "gres/gpu=136" in cluster.call("sacct", "-n", "-P", "-j", job.number, "-o", "alloctres")


@pytest.mark.thorough
def test_a_rank_that_always_dies_is_named_and_given_up_after_three_tries(cluster: Cluster, tmp_path: Path) -> None:
    """Adds Slurm's own requeues to the count of tries, which tests/launch/slurm/test_launcher.py follows without Slurm."""
    job = submit(cluster, tmp_path, "true", HPT_DIES="42")
    deadline = time.monotonic() + 300
    while "the job is not started again" not in job.output:
        assert time.monotonic() < deadline, job.output
        time.sleep(1)
    assert job.end(60) == "FAILED"
    assert job.output.count("trainer rank 42 died (exit code 9)") == 3
    assert (job.show("ExitCode"), job.show("Restarts")) == ("70:0", "2")
