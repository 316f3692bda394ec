"""What a run's processes inherit, and what they do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import Config, DataConfig, HttpRewardConfig, ModelConfig, RewardConfig
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.environment import PASS, inherited, say_what_is_withheld, withheld
from megatron_hpt.launch.children import Child
from megatron_hpt.launch.launchers import TORCHRUN, LocalLauncher
from megatron_hpt.run import create

LEFT_BY_OTHERS = {
    **{
        "PET_NNODES": "4",
        "TORCHELASTIC_RUN_ID": "x",
        "LOGLEVEL": "chatty",
        "MASTER_ADDR": "gone",
        "RANK": "3",
        "WORLD_SIZE": "8",
    },
    **{"WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCH_NCCL_BLOCKING_WAIT": "1", "NVTE_FLASH_ATTN": "0"},
    **{"VLLM_API_KEY": "k", "VLLM_PORT": "1"},
    **{"SGLANG_PLUGINS": "other", "SGL_FORCE_SHUTDOWN": "1", "NCCL_ALGO": "Ring", "NCCL_COMM_ID": "gone:1"},
}
THE_USERS = {
    **{"PATH": "/bin", "HF_HOME": "/hf", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "eth0"},
    **{"NCCL_IB_HCA": "mlx5", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_NET": "Socket", "NCCL_DEBUG": "INFO", "RANKING": "1"},
    **{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "WANDB_API_KEY": "w", "SLURM_JOB_ID": "7", "HPT_TOKEN": "t"},
}


def test_what_another_program_left_is_not_passed_on_and_what_describes_the_machine_is() -> None:
    shell = {**LEFT_BY_OTHERS, **THE_USERS}
    assert inherited(shell) == THE_USERS
    assert withheld(shell) == sorted(LEFT_BY_OTHERS)


def test_what_changes_numbers_or_servers_is_not_passed_on_either() -> None:
    names = ("NVIDIA_TF32_OVERRIDE", "PYTHONOPTIMIZE", "UVICORN_PORT", "RAY_ADDRESS", "TRITON_INTERPRET")
    assert inherited(dict.fromkeys((*names, "PATH", "PYTHONUTF8"), "1")) == {"PATH": "1", "PYTHONUTF8": "1"}


def test_the_user_may_choose_names_and_patterns() -> None:
    shell = {**LEFT_BY_OTHERS, PASS: "VLLM_PORT, NCCL_*"}
    assert set(inherited(shell)) == {PASS, "VLLM_PORT", "NCCL_ALGO", "NCCL_COMM_ID"}


@given(st.dictionaries(st.from_regex(r"(PET|VLLM|SGLANG|NCCL|NVTE|MY)_[A-Z_]{1,9}", fullmatch=True), st.text(max_size=3)))
def test_nothing_is_changed_and_every_variable_is_on_one_side(shell: dict[str, str]) -> None:
    kept = inherited(shell)
    assert kept.items() <= shell.items()
    assert sorted({*kept, *withheld(shell)}) == sorted(shell)
    assert len(kept) + len(withheld(shell)) == len(shell)


def test_no_prefix_of_an_engine_reaches_any_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer, coordinator and both engines; only the reward model's key goes to the coordinator, which needs it."""
    for name in LEFT_BY_OTHERS:
        monkeypatch.setenv(name, "of another program")
    reward = RewardConfig(http=HttpRewardConfig(key_variable="VLLM_API_KEY"))
    config = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), reward=reward)
    started: list[tuple] = []
    monkeypatch.setattr(Child, "start", lambda *arguments: started.append(arguments))
    launcher = LocalLauncher(config, create(config, tmp_path))
    launcher.trainer([])
    launcher.coordinator([])
    launcher.stop([])
    trainer, coordinator = (arguments[3] for arguments in started)
    engines = [kind.environment(config, False) for kind in ENGINES.values()]
    for environment in (trainer, coordinator, *engines):
        foreign = {name for name in LEFT_BY_OTHERS if environment.get(name) == "of another program"}
        assert foreign == ({"VLLM_API_KEY"} if environment is coordinator else set())


@pytest.mark.slow
def test_the_program_itself_is_not_ended_by_what_torch_reads(tmp_path: Path) -> None:
    shell = {**os.environ, "LOGLEVEL": "of another program", "PET_NNODES": "4"}
    command = [sys.executable, "-m", "megatron_hpt.cli", "train", str(tmp_path / "none.py")]
    done = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_what_is_withheld_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PET_NNODES", "4")
    say_what_is_withheld()
    assert "PET_NNODES" in caplog.text
    assert PASS in caplog.text


@pytest.mark.slow
def test_ranks_start_on_a_machine_whose_own_name_does_not_resolve(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import socket, torch.distributed as dist\n"
        "try: socket.gethostbyname(socket.gethostname()); print('resolves')\n"
        "except OSError: pass\n"
        "dist.init_process_group('gloo'); dist.barrier(); print('met', flush=True)"
    )
    command = f"hostname nowhere-{os.getpid()} && exec {sys.executable} {' '.join(TORCHRUN)} --nproc-per-node=2 {rank}"
    unshared = ["unshare", "--uts", "sh", "-c", command]
    if subprocess.run([*unshared[:2], "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not give this process a host name of its own (unshare --uts)")
    done = subprocess.run(unshared, env=inherited({}) | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("met"), done.stdout.count("resolves")) == (0, 2, 0), done.stderr[-2000:]
