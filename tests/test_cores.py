"""Who has which cores of a host: the assignment, what a run does with it, and what it says."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt import cores
from megatron_hpt.config import ActorConfig, Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_hpt.cores import Side, assign
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.engines.seeding import settled
from megatron_hpt.launch import supervisor, train
from megatron_hpt.launch.children import Child
from megatron_hpt.launch.launchers import LocalLauncher
from megatron_hpt.overrides import apply_overrides, dump_yaml, load_yaml
from megatron_hpt.process import CORES_VARIABLE
from megatron_hpt.run import create

MACHINES = st.sets(st.integers(0, 255), min_size=1, max_size=64).map(sorted)
SIDES = st.builds(Side, ranks=st.integers(1, 12), threads=st.none() | st.integers(1, 24))


def config(trainer: int | str = 1, engines: int | str = "all", data: int = 1, **rollout: object) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        parallel=ParallelConfig(data=data),
        actor=ActorConfig(threads=trainer),
        rollout=RolloutConfig(threads=engines, **rollout),
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of eight cores."""
    monkeypatch.setattr(cores, "cores_here", lambda: list(range(8)))
    return monkeypatch


@given(machine=MACHINES, trainer=SIDES, engines=SIDES, overlapped=st.booleans())
def test_all_cores_are_used_and_every_rank_has_one(machine: list[int], trainer: Side, engines: Side, overlapped: bool) -> None:
    found = assign(machine, trainer, engines, overlapped)
    for side, share in ((trainer, found.trainer), (engines, found.engines)):
        assert len(share.ranks) == side.ranks
        assert all(share.ranks)
        assert share.threads == (side.threads or share.threads) >= 1
        sizes = [len(rank) for rank in share.ranks]
        assert max(sizes) - min(sizes) <= 1
        if not overlapped:
            assert share.cores == tuple(machine)
    assert {*found.trainer.cores, *found.engines.cores} == set(machine)


@given(machine=MACHINES, side=SIDES, other=SIDES)
def test_a_side_that_has_its_turn_takes_all_that_its_ranks_can_have_equally(
    machine: list[int], side: Side, other: Side
) -> None:
    found = assign(machine, Side(side.ranks, None), other, overlapped=False).trainer
    if side.ranks <= len(machine):
        assert len(machine) - side.ranks < side.ranks * found.threads <= len(machine)
        assert sum(map(len, found.ranks)) == len(machine)  # none of them twice
    else:
        assert found.threads == 1
        assert found.cores == tuple(machine)
    assert found == assign(machine, other, Side(side.ranks, None), overlapped=False).engines


@given(machine=MACHINES, trainer=SIDES, engines=SIDES)
def test_sides_that_overlap_have_no_core_in_common_where_there_are_enough(
    machine: list[int], trainer: Side, engines: Side
) -> None:
    found = assign(machine, trainer, engines, overlapped=True)
    enough = trainer.least + engines.least <= len(machine)
    assert found.is_apart == enough
    threads = sum(side.ranks * share.threads for side, share in ((trainer, found.trainer), (engines, found.engines)))
    if enough:
        every = [core for share in (found.trainer, found.engines) for rank in share.ranks for core in rank]
        assert sorted(every) == machine
        assert threads <= len(machine)
    else:
        assert threads == trainer.least + engines.least  # not one more than has to be


@given(machine=MACHINES, trainer=SIDES, engines=SIDES, overlapped=st.booleans())
def test_what_was_decided_stays(machine: list[int], trainer: Side, engines: Side, overlapped: bool) -> None:
    """The numbers are in the run's configuration, and are what a resumed run is assigned by."""
    first = assign(machine, trainer, engines, overlapped)
    again = assign(machine, Side(trainer.ranks, first.trainer.threads), Side(engines.ranks, first.engines.threads), overlapped)
    assert (again.trainer.threads, again.engines.threads) == (first.trainer.threads, first.engines.threads)
    assert again.is_apart == first.is_apart


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (config(), "cores 0-7: trainer 1 rank × 1 thread, engines 1 rank × 8 threads, in turns"),
        (config("all", data=2, servers=3), "cores 0-7: trainer 2 ranks × 4 threads, engines 3 ranks × 2 threads, in turns"),
        (config(max_lag=1), "trainer 1 rank × 1 thread on core 0, engines 1 rank × 7 threads on cores 1-7"),
        (config("all", max_lag=2), "trainer 1 rank × 4 threads on cores 0-3, engines 1 rank × 4 threads on cores 4-7"),
        (config("all", 2, max_lag=1), "trainer 1 rank × 6 threads on cores 0-5, engines 1 rank × 2 threads on cores 6-7"),
        (config(8, max_lag=1), "cores 0-7: trainer 1 rank × 8 threads, engines 1 rank × 1 thread, at the same time"),
        (config("all", max_lag=1, urls=["http://a:1"]), "cores 0-7: trainer 1 rank × 8 threads"),
    ],
)
def test_what_was_chosen_is_said(machine: pytest.MonkeyPatch, wanted: Config, says: str) -> None:
    assert str(cores.assigned(wanted)) == says
    assert str(cores.assigned(cores.decided(wanted))) == says


@pytest.mark.parametrize(
    ("gpus", "says"), [((), ["note: cores 0-7: trainer 1 rank × 1 thread, engines 1 rank × 8 threads, in turns"]), (("0",), [])]
)
def test_a_run_says_it_at_its_start(
    machine: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, gpus: tuple[str, ...], says: list[str]
) -> None:
    machine.setattr(supervisor, "Supervisor", lambda *_: SimpleNamespace(run=lambda: None))
    machine.setattr(train, "gpus_here", lambda: gpus)
    machine.setattr(train, "say_what_is_withheld", lambda: None)  # variables that Megatron has set in this process
    wanted = config()
    train._supervise(wanted, create(wanted, tmp_path), 0, launcher=None)
    assert [text.partition(" (")[0] for text in caplog.messages] == says


def test_a_run_on_a_host_says_in_its_configuration_how_many_threads_it_has(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = settled(config("all", data=2, servers=2), on_gpus=False)
    assert (found.actor.threads, found.rollout.threads) == (4, 4)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(found))
    machine.setattr(cores, "cores_here", lambda: [0])
    assert settled(load_yaml(saved), on_gpus=False) == found  # continued elsewhere: the same sums in the same order
    assert settled(apply_overrides(found, ["rollout.threads=all"]), on_gpus=False).rollout.threads == 1
    on_gpus = settled(config("all"), on_gpus=True)
    assert (on_gpus.actor.threads, on_gpus.rollout.threads) == ("all", "all")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_each_rank_of_an_engine_has_as_many_threads_as_the_configuration_says(machine: pytest.MonkeyPatch, engine: str) -> None:
    def environment(**rollout: object) -> dict[str, str]:
        return ENGINES[engine].environment(config(engine=engine, **rollout), False)

    assert environment()["OMP_NUM_THREADS"] == "8"
    assert environment()["OMP_WAIT_POLICY"] == "passive"
    assert environment(servers=2, tensor_parallel=2)["OMP_NUM_THREADS"] == "2"
    assert environment(engines=3)["OMP_NUM_THREADS"] == "3"
    assert environment(max_lag=1)["OMP_NUM_THREADS"] == "7"
    two = environment(tensor_parallel=2)
    if engine == "sglang":
        assert two["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1,2,3|4,5,6,7"
    else:
        assert two["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    machine.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in ENGINES[engine].environment(config(engine=engine), True)


def environments(wanted: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Return what the local launcher gives its parts: name → environment."""
    started: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(Child, "start", lambda name, command, log, environment: started.update({name: environment}))
    launcher = LocalLauncher(wanted, create(wanted, folder))
    for index in range(wanted.rollout.servers):
        launcher.engine(index)
    launcher.trainer([])
    launcher.coordinator([])
    launcher.stop([])
    return started


def test_parts_keep_to_their_cores_where_they_overlap_alone(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = config("all", data=2, servers=2, max_lag=1, python=sys.executable)
    found = environments(wanted, tmp_path, machine)
    assert {name: environment.get(CORES_VARIABLE) for name, environment in found.items()} == {
        "engine 0": "4,5",
        "engine 1": "6,7",
        "trainer": "0,1,2,3",
        "coordinator": None,
    }
    assert found["trainer"]["OMP_WAIT_POLICY"] == "passive"
    in_turns = environments(config("all", python=sys.executable), tmp_path / "in_turns", machine)
    assert not any(CORES_VARIABLE in environment for environment in in_turns.values())


def test_a_part_and_what_it_starts_keep_to_their_cores(tmp_path: Path) -> None:
    last = max(os.sched_getaffinity(0))
    program = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'])"
    command = [sys.executable, "-m", "megatron_hpt.process", str(tmp_path / "log"), sys.executable, "-c", program]
    subprocess.run(command, env={**os.environ, CORES_VARIABLE: str(last)}, check=True)
    assert (tmp_path / "log").read_text().split() == [f"{{{last}}}"]


def test_a_core_with_two_hardware_threads_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 5, 9})
    for number, siblings in {1: "1,5", 5: "1,5", 2: "2,6", 3: "3,7"}.items():
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cores.cores_here(tmp_path) == [1, 2, 3, 9]
