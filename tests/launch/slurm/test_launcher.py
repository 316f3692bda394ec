"""Jobs without Slurm: who goes where, by which command lines, and when a job is given up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, TransferConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch.children import Child, failure_of
from megatron_hpt.launch.slurm.attempts import LOST, Tries, Try, hopeless
from megatron_hpt.launch.slurm.job import put_logs_aside
from megatron_hpt.launch.slurm.launcher import (
    SlurmJob,
    coordinator_command,
    engine_command,
    imagined,
    job_of,
    other_steps,
    topology_on,
    trainer_command,
)
from megatron_hpt.launch.slurm.task import environment
from megatron_hpt.run import RunDir

ROOT = Path(__file__).parents[3]


def config(transport: str = "nccl", **parallel: int) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        rollout=RolloutConfig(servers=4, tensor_parallel=4),
        transfer=TransferConfig(transport=transport),
        parallel=ParallelConfig(**parallel),
    )


def job(*nodes: str, **settings: object) -> SlurmJob:
    return SlurmJob(
        **{"number": 7, "attempt": 0, "host": "a", "nodes": nodes, "ranks_per_node": 8, "has_gpus": True, **settings}
    )


def option(command: list[str], name: str) -> str:
    return next(argument.partition("=")[2] for argument in command if argument.startswith(f"--{name}="))


def test_trainers_come_first_and_engines_behind_them_each_on_gpus_of_its_own() -> None:
    on = job("a", "b", "c", "d", "e", srun=("--container-image=x",), python="p")
    topology = topology_on(config(tensor=8, data=2), on)
    trainer = trainer_command(on, topology, ["run"])
    assert (option(trainer, "nodelist"), option(trainer, "ntasks"), option(trainer, "ntasks-per-node")) == ("a,b", "16", "8")
    assert trainer[-8:] == [
        "p",
        "-m",
        "megatron_hpt.launch.slurm.task",
        "--rank",
        "p",
        "-m",
        "megatron_hpt.actor.trainer",
        "run",
    ]
    assert "--container-image=x" in trainer
    assert option(coordinator_command(on, topology, []), "nodelist") == "a"
    engines = [engine_command(on, "e", places, ["serve"]) for places in topology.engines]
    assert [option(engine, "nodelist") for engine in engines] == ["c", "c", "d", "d"]
    assert [engine[-3:] for engine in engines[:2]] == [["--gpus", "0,1,2,3", "serve"], ["--gpus", "4,5,6,7", "serve"]]


def test_a_node_whose_name_does_not_resolve_is_named() -> None:
    with pytest.raises(ConfigError, match=r"node nowhere\.invalid: its name does not resolve"):
        job("a", "nowhere.invalid").address("nowhere.invalid")


def test_without_gpus_nothing_asks_for_them() -> None:
    on = job("a", "b", "c", "d", "e", "f", has_gpus=False, ranks_per_node=4)
    topology = topology_on(config("gloo", tensor=8), on)
    commands = [trainer_command(on, topology, []), engine_command(on, "e", topology.engines[0], [])]
    assert not [argument for command in commands for argument in command if "gpu" in argument]


@pytest.mark.parametrize(("own", "others"), [({}, ["7.0", "7.1"]), ({"SLURM_STEP_ID": "0"}, ["7.1"])])
def test_steps_are_ended_but_the_one_that_ends_them(own: dict[str, str], others: list[str]) -> None:
    assert other_steps(["7.batch", "7.extern", "7.0", "7.1"], own) == others


@pytest.mark.parametrize(
    ("given", "nodes", "message"),
    [
        (config(tensor=8, data=3), "abcd", "job 7 has 4 nodes of 8 GPUs; this layout takes 5"),
        (
            config("shared_memory", tensor=8),
            "abc",
            "transfer.transport=shared_memory reaches engines of the trainer's own host",
        ),
    ],
)
def test_what_cannot_run_on_the_nodes_is_refused(given: Config, nodes: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        topology_on(given, job(*nodes))


def test_outside_a_job_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"not inside a Slurm job \('SLURM_JOB_ID' is not set\)"):
        job_of({}, [], 8, "python", [])


def test_tries_and_jobs_have_ports_of_their_own_below_the_outgoing_ones() -> None:
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    ports = [
        job("a", number=number, attempt=attempt).port(index) for number in (7, 8) for attempt in (0, 1) for index in (0, 5)
    ]
    assert len(set(ports)) == 8
    assert max(job("a", number=number).port(63) for number in range(400)) < first_outgoing


def test_a_task_learns_its_rank_and_its_gpus() -> None:
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert environment(slurm, True, None) == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert environment(slurm, False, "2,3") == {"CUDA_VISIBLE_DEVICES": "6,7"}


@pytest.mark.parametrize(
    ("checkpoints", "given_up"),
    [([], False), ([0, 0], False), ([0, 0, 0], True), ([2, 2, 2], False), ([2, 2, 2, 2], True), ([0, 0, 4, 4, 4, 6], False)],
)
def test_a_job_is_given_up_after_three_tries_that_saved_nothing(checkpoints: list[int], given_up: bool) -> None:
    tries = [Try(1, attempt, ("a",), "died", checkpoint) for attempt, checkpoint in enumerate(checkpoints)]
    assert (hopeless(tries) is not None) == given_up


def test_a_try_that_was_lost_with_its_node_counts_and_a_cancelled_job_does_not(tmp_path: Path) -> None:
    tries = Tries(tmp_path)
    assert tries.begin(job=7, attempt=0, nodes=["a", "b"], checkpoint=0) is None
    assert tries.begin(job=7, attempt=1, nodes=["b", "c"], checkpoint=4) is None
    assert tries.all() == [Try(7, 0, ("a", "b"), LOST, 4)]
    assert tries.begin(job=8, attempt=0, nodes=["a"], checkpoint=4) is None  # job 7 was cancelled
    assert len(tries.all()) == 1
    assert tries.fail(Try(8, 0, ("a",), "died", 4)) is None
    assert tries.begin(job=8, attempt=1, nodes=["a"], checkpoint=4) is None
    assert tries.begin(job=8, attempt=2, nodes=["a"], checkpoint=4) is None
    assert "3 tries in a row without a checkpoint after step 4" in tries.begin(job=8, attempt=3, nodes=["a"], checkpoint=4)
    tries.end()
    assert [each.reason for each in tries.all()] == [LOST, "died", LOST, LOST]


def test_logs_of_every_try_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    for attempt in range(2):
        run.log("srun").write_text(str(attempt))
        put_logs_aside(run)
    assert [(run.logs / f"try{attempt}" / "srun.log").read_text() for attempt in range(2)] == ["0", "1"]


@pytest.mark.parametrize(
    ("said", "rank", "code"),
    [
        ("srun: error: n2: task 1: Exited with exit code 7\nsrun: error: n1: tasks 0: Terminated\n", 1, 7),
        ("srun: error: n2: task 9: Killed\n", 9, -9),
        ("srun: error: n2: tasks 3-5: Segmentation fault (core dumped)\n", 3, -11),
    ],
)
def test_the_rank_that_srun_names_is_the_one_that_failed(tmp_path: Path, said: str, rank: int, code: int) -> None:
    child = Child.start("trainer", [sys.executable, "-c", f"print({said!r}); exit(143)"], tmp_path / "srun.log")
    child.process.wait(30)
    failure = failure_of(child, tmp_path)
    assert (failure.name, failure.exit_code) == (f"trainer rank {rank}", code)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["hpt_70b", "hpt_8gpu"])
def test_what_a_script_would_start_is_as_it_was(script: str) -> None:
    """After a change that is meant: HPT_DRY_RUN=1 HPT_PYTHON=python bash slurm/SCRIPT.sbatch >tests/launch/slurm/SCRIPT.txt."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HPT_"))}
    given = {"HPT_BIN": f"{Path(sys.executable).parent}/megatron-hpt", "HPT_PYTHON": "python", "HPT_DRY_RUN": "1"}
    result = subprocess.run(
        ["bash", f"slurm/{script}.sbatch"],
        cwd=ROOT,
        env={**clean, **given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == (Path(__file__).parent / f"{script}.txt").read_text()


def test_an_imagined_job_has_just_the_nodes_that_a_run_takes() -> None:
    assert imagined(config(tensor=8, data=12), 8, "python", []).nodes[-1] == "node14"
