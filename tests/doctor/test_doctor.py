"""megatron-hpt doctor on this machine as it is, and with parts of it broken."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hpt.actor.model.apex import KERNELS, MULTI_TENSOR, WEIGHT_GRADIENT, Apex, find_apex, has_apex_kernel
from megatron_hpt.doctor import doctor, health
from megatron_hpt.doctor.health import Check, CheckContext, HealthFinding, examine
from megatron_hpt.engines.registry import ENGINES

ROOT = Path(__file__).parents[2]
HEALTHY = """
case "$1" in
    --query-gpu=name) printf 'NVIDIA H100 80GB HBM3\\nNVIDIA H100 80GB HBM3\\n' ;;
    --query-gpu=index,*) printf '0, 0\\n1, 0\\n' ;;
    --query-remapped-rows=*) printf '00000000:19:00.0, No\\n00000000:3B:00.0, No\\n' ;;
esac
"""
"""A shell script in place of nvidia-smi, for two GPUs."""
Fake = Callable[[str, str], Path]


@pytest.fixture
def asked(tmp_path: Path) -> CheckContext:
    return CheckContext(tmp_path / "runs")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a program first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return write


def command(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    shell = f'{before} exec "$0" -m megatron_hpt.cli doctor "$@"'
    return subprocess.run(["bash", "-c", shell, sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_this_machine_as_it_is(tmp_path: Path) -> None:
    done = command("--json", "--folder", str(tmp_path))
    report = json.loads(done.stdout)
    states = {finding["check"]: finding["state"] for finding in report["findings"]}
    assert list(states) == list(doctor.MACHINE)
    broken = {check for check, state in states.items() if state == "broken"}
    assert broken <= {"disk", "/dev/shm"}, report  # what a small machine may lack
    assert (report["sick"], done.returncode) == (bool(broken), int(bool(broken)))
    assert states["computation"] == states["vLLM"] == states["megatron-core"] == "ok"
    table = command("--folder", str(tmp_path)).stdout
    assert "Transformer Engine" in table
    assert torch.__version__ in table


@pytest.mark.slow
def test_a_sick_node_says_why_on_one_line_and_fails(tmp_path: Path) -> None:
    done = command("--node", "--folder", str(tmp_path))
    assert done.stdout.count("\n") == 1
    if shutil.disk_usage(tmp_path).free > health.LEAST_DISK:
        assert done.returncode == 0
        assert ": healthy: " in done.stdout
    done = command("--node", "--folder", "/proc", before="ulimit -n 512;")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert ": sick: " in done.stdout
    assert "run folder: /proc cannot be written: " in done.stdout
    assert "open files: at most 512" in done.stdout
    assert "clock" not in done.stdout


@pytest.mark.parametrize(
    ("script", "check", "gpus", "state", "found"),
    [
        (HEALTHY, health.gpus, 2, "ok", "2 × NVIDIA H100 80GB HBM3"),
        (HEALTHY, health.gpus, None, "ok", "2 × NVIDIA H100 80GB HBM3"),
        (HEALTHY, health.gpus, 8, "broken", "2 GPUs, 8 expected"),
        (HEALTHY, health.gpu_memory, 2, "ok", "no uncorrectable error"),
        (HEALTHY.replace("1, 0", "1, 3"), health.gpu_memory, 2, "broken", "GPU 1: 3 uncorrectable memory errors"),
        (HEALTHY.replace("1, 0", "1, [N/A]"), health.gpu_memory, 2, "ok", "no uncorrectable error"),
        (
            HEALTHY.replace("3B:00.0, No", "3B:00.0, Yes"),
            health.gpu_memory,
            2,
            "broken",
            "GPU 00000000:3B:00.0: a memory row could not be remapped",
        ),
        (
            "echo 'Unable to determine the device handle for GPU0: 0000:3B:00.0: Unknown Error'; exit 15",
            health.gpus,
            2,
            "broken",
            "RuntimeError: nvidia-smi: Unable to determine the device handle for GPU0: 0000:3B:00.0: Unknown Error",
        ),
        ("sleep 60", health.gpus, 2, "broken", "nvidia-smi did not answer within 1 s"),
    ],
)
def test_gpus_by_what_nvidia_smi_says(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, script: str, check: Check, gpus: int | None, state: str, found: str
) -> None:
    monkeypatch.setattr(health, "ANSWER_S", 1.0)
    fake("nvidia-smi", script.replace("sleep", "exec sleep"))
    finding = examine(check, CheckContext(Path(), gpus))
    assert (finding.state, finding.found) == (state, found)


def test_gpus_that_are_expected_and_not_there(fake: Fake) -> None:
    if Path("/usr/bin/nvidia-smi").exists():
        pytest.skip("there is a real nvidia-smi")
    assert examine(health.gpus, CheckContext(Path(), 8)).found == "no nvidia-smi, 8 GPUs expected"
    assert examine(health.gpus, CheckContext(Path())).state == "missing"


@pytest.mark.parametrize(
    ("age", "xid", "state"), [(10, 79, "broken"), (7200, 79, "ok"), (10, 31, "ok")], ids=["now", "long ago", "of a program"]
)
def test_the_kernels_messages(fake: Fake, age: float, xid: int, state: str) -> None:
    stamp = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - age
    fake("dmesg", f"echo '[{stamp:12.6f}] NVRM: Xid (PCI:0000:3b:00): {xid}, pid=7194, GPU has fallen off the bus.'")
    finding = examine(health.kernel_log, CheckContext(Path()))
    assert finding.state == state
    if state == "broken":
        assert finding.found == "GPU 0000:3b:00: Xid 79 (fell off the bus)"


def test_a_kernel_log_that_may_not_be_read_is_not_an_illness(fake: Fake) -> None:
    fake("dmesg", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1")
    assert examine(health.kernel_log, CheckContext(Path())).state == "missing"


def test_a_clock_apart_from_the_file_systems(asked: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(health.clock, asked).state == "ok"
    now = time.time
    for offset in (-90, 90):
        monkeypatch.setattr(health.time, "time", lambda offset=offset: now() + offset)
        finding = examine(health.clock, asked)
        assert (finding.state, finding.found) == ("broken", "90 s apart from the file system's")


def test_no_room(asked: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(health.disk, asked).state == examine(health.shared_memory, asked).state == "ok"
    monkeypatch.setattr(health, "LEAST_DISK", 2**60)
    assert examine(health.disk, asked).state == "broken"
    for folder in (Path("/proc"), Path("/nowhere")):
        monkeypatch.setattr(health, "SHARED_MEMORY", folder)
        assert examine(health.shared_memory, asked).state == "broken"


def test_the_folder_of_runs_need_not_be_there_yet(asked: CheckContext) -> None:
    assert examine(health.run_folder, asked) == HealthFinding("ok", f"{asked.folder.parent} can be written")
    assert not asked.folder.exists()


def test_a_torch_that_cannot_be_imported_or_sees_no_gpu(
    asked: CheckContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    finding = examine(health.computation, asked)
    assert (finding.state, finding.found) == ("broken", "ImportError: libcudart.so.13: cannot open shared object file")
    stand_in = "cuda = type('cuda', (), {'device_count': staticmethod(lambda: 0)})"
    (tmp_path / "torch.py").write_text(stand_in)
    assert examine(health.computation, CheckContext(Path(), 8)).found == "torch sees 0 CUDA devices, 8 expected"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an empty module, or a package's file that must not be run, where imports find it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("raise SystemExit('it was run')")
        importlib.invalidate_caches()

    return install


def test_the_unrelated_apex_is_told_from_nvidias_without_running_it(
    asked: CheckContext, installed: Callable[[str], None], tmp_path: Path
) -> None:
    finding = examine(doctor.apex, asked)
    assert (finding.state, "fused gradient accumulation" in finding.found) == ("ok", True)
    assert find_apex() is None
    installed("apex/__init__.py")
    installed(f"{WEIGHT_GRADIENT}.py")
    finding = examine(doctor.apex, asked)
    assert (finding.state, finding.remedy) == ("broken", "pip uninstall apex")
    assert not has_apex_kernel(WEIGHT_GRADIENT)  # somebody else's, beside a stranger's package
    installed("apex/optimizers/__init__.py")
    assert find_apex() == Apex(str(tmp_path / "apex"), True, frozenset({WEIGHT_GRADIENT}))
    assert has_apex_kernel(WEIGHT_GRADIENT)
    assert not has_apex_kernel(MULTI_TENSOR)


def test_nvidias_apex_by_the_kernels_that_it_was_built_with(asked: CheckContext, installed: Callable[[str], None]) -> None:
    installed("apex/optimizers/__init__.py")
    finding = examine(doctor.apex, asked)  # its FusedAdam can be imported and not be made
    assert (finding.state, "Megatron-Core would choose its Adam" in finding.found) == ("broken", True)
    installed("transformer_engine/__init__.py")
    finding = examine(doctor.apex, asked)
    assert (finding.state, "fused Adam" in finding.remedy) == ("missing", True)
    for kernel in KERNELS:
        installed(f"{kernel}.py")
    finding = examine(doctor.apex, asked)
    assert finding.state == "ok", finding
    assert finding.found.endswith("fused norms where Transformer Engine is absent")


def test_versions_of_the_trainers_packages(asked: CheckContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.VERSIONS:
        assert examine(doctor.package(name), asked).state == "ok"
    info = tmp_path / "transformers-4.46.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.46.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert examine(doctor.package("transformers"), asked).found == "4.46.3; known to work: >=5.10,<5.20"
    monkeypatch.setitem(doctor.VERSIONS, "nothing-of-this-name", ">=1")
    assert examine(doctor.package("nothing-of-this-name"), asked).state == "broken"


PROBED = {
    "found": {
        "torch": {"version": "2.13.0+cu130", "requires": []},
        "vllm": {"version": "0.32.0", "requires": ["torch==2.13.0", "torchaudio"]},
    },
    "hooks": ["megatron_hpt"],
}


@pytest.mark.parametrize(
    ("change", "state", "found"),
    [
        ({}, "ok", "vllm 0.32.0, torch 2.13.0+cu130"),
        ({"hooks": []}, "broken", "cannot receive weights: megatron_hpt is not installed beside it"),
        ({"found": {"torch": {"version": "2.14.1"}}}, "missing", "not installed in "),
        ({"found": {**PROBED["found"], "torch": {"version": "2.14.1"}}}, "broken", "it was built for torch==2.13.0"),
        ({"found": {**PROBED["found"], "torch": {"version": "2.14.1+cpu"}}}, "ok", "(built for torch==2.13.0)"),
    ],
)
def test_an_engines_environment(
    asked: CheckContext, fake: Fake, monkeypatch: pytest.MonkeyPatch, change: dict, state: str, found: str
) -> None:
    python = fake("python-of-engine", f"echo '{json.dumps(PROBED | change)}'")
    monkeypatch.setitem(ENGINES, "vllm", replace(ENGINES["vllm"], python=lambda: str(python)))
    finding = examine(doctor.MACHINE["vLLM"], asked)
    assert finding.state == state, finding
    assert found in finding.found
    python.write_text("#!/bin/sh\necho 'error while loading shared libraries' >&2; exit 127\n")
    assert "does not run: error while loading shared libraries" in examine(doctor.MACHINE["vLLM"], asked).found
    python.unlink()
    assert examine(doctor.MACHINE["vLLM"], asked).state == "missing"


def test_a_driver_without_a_torch_that_can_use_it(asked: CheckContext, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    fake("nvidia-smi", HEALTHY)
    assert examine(doctor.cuda, asked).found == "the driver is there, torch is a build without CUDA"


def test_a_host_name_that_does_not_resolve_matters_between_nodes(asked: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.socket, "gethostname", lambda: "nowhere.invalid")
    assert health.host_name(asked).state == "missing"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    finding = health.host_name(asked)
    assert (finding.state, "nowhere.invalid does not resolve" in finding.found) == ("broken", True)


def test_a_check_that_fails_itself_is_a_finding(asked: CheckContext) -> None:
    def check(_: CheckContext) -> HealthFinding:
        raise OSError("two\nlines")

    assert examine(check, asked).found == "OSError: two"
    report = doctor.examined({"a check": check, "GPUs": health.gpus, "computation": check}, asked)
    assert report.sick
    assert report.as_line() == f"{report.node}: sick: a check: OSError: two; computation: OSError: two"
