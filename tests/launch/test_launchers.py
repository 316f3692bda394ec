"""Where the local launcher puts the parts of a run: real processes that say what they were given."""

import sys
from pathlib import Path

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, TransferConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch import launchers
from megatron_hpt.launch.children import Child
from megatron_hpt.launch.launchers import LocalLauncher, gpus_here, on_this_machine
from megatron_hpt.plan.topology import Slots, place
from megatron_hpt.run import RunDir, create

NAMES = tuple(f"GPU-{letter}" for letter in "abcdefgh")


@pytest.fixture
def says_what(tmp_path: Path) -> str:
    """An interpreter that prints its GPUs and arguments."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "GPUs ${CUDA_VISIBLE_DEVICES-none}: $*"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def given_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def config(python: str, transport: str, data: int, servers: int, width: int, **rollout: object) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        parallel=ParallelConfig(data=data),
        rollout=RolloutConfig(servers=servers, tensor_parallel=width, python=python, **rollout),
        transfer=TransferConfig(transport=transport),
    )


def said(launcher: LocalLauncher, run: RunDir, servers: int) -> list[str]:
    children = [launcher.engine(index)[1] for index in range(servers)]
    for child in children:
        assert child.process.wait(30) == 0
    launcher.stop(children)
    return [run.log(f"engine_{index}").read_text() for index in range(servers)]


def test_each_engine_sees_its_gpus_alone(tmp_path: Path, says_what: str, given_gpus: pytest.MonkeyPatch) -> None:
    apart = config(says_what, "nccl", 4, 2, 2)
    run = create(apart, tmp_path)
    found = said(LocalLauncher(apart, run, place(apart, Slots("x", 1, 8)), NAMES), run, 2)
    assert [text.split(":")[0] for text in found] == ["GPUs GPU-e,GPU-f", "GPUs GPU-g,GPU-h"]
    assert all(text.rstrip().endswith("--gpu-memory-utilization 0.92") for text in found)


def test_engines_on_the_trainers_gpus_get_a_share_and_sleep(
    tmp_path: Path, says_what: str, given_gpus: pytest.MonkeyPatch
) -> None:
    shared = config(says_what, "cuda_ipc", 8, 4, 2, sleep=True, gpu_memory_share=0.7)
    run = create(shared, tmp_path)
    found = said(LocalLauncher(shared, run, place(shared, Slots("x", 1, 8)), NAMES), run, 4)
    assert [text.split(":")[0].split()[1] for text in found] == ["GPU-a,GPU-b", "GPU-c,GPU-d", "GPU-e,GPU-f", "GPU-g,GPU-h"]
    assert all("--gpu-memory-utilization 0.7 --enable-sleep-mode" in text for text in found)


def test_the_trainer_sees_the_gpus_of_its_ranks(tmp_path: Path, given_gpus: pytest.MonkeyPatch) -> None:
    apart = config("", "nccl", 4, 2, 2)
    run, started = create(apart, tmp_path), []
    given_gpus.setattr(Child, "start", lambda *arguments: started.append(arguments))
    launcher = LocalLauncher(apart, run, place(apart, Slots("x", 1, 8)), NAMES)
    launcher.trainer([])
    launcher.stop([])
    assert started[0][3]["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b,GPU-c,GPU-d"


def test_without_gpus_nothing_is_placed(tmp_path: Path, says_what: str, given_gpus: pytest.MonkeyPatch) -> None:
    host = config(says_what, "shared_memory", 2, 1, 1)
    run = create(host, tmp_path)
    given_gpus.setattr(launchers, "gpus_here", tuple)
    (text,) = said(on_this_machine(host)(run), run, 1)
    assert text.startswith("GPUs none: ")
    assert "--gpu-memory-utilization" not in text


def test_a_layout_that_this_machine_is_too_small_for_is_refused(given_gpus: pytest.MonkeyPatch) -> None:
    given_gpus.setattr(launchers, "gpus_here", lambda: NAMES[:4])
    with pytest.raises(ConfigError, match="this machine has 1 nodes of 4 GPUs; this layout takes 2"):
        on_this_machine(config(sys.executable, "nccl", 4, 1, 1))


def test_gpus_are_called_what_the_environment_calls_them(given_gpus: pytest.MonkeyPatch) -> None:
    import torch

    given_gpus.setattr(torch.cuda, "is_available", lambda: True)
    given_gpus.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_here() == ("0", "1")
    given_gpus.setenv("CUDA_VISIBLE_DEVICES", "GPU-x,GPU-y")
    assert gpus_here() == ("GPU-x", "GPU-y")
    given_gpus.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus_here() == ()
