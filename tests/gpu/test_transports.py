"""Weights between processes with GPUs: NCCL's messages and deadlines, CUDA IPC."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt.launch.launchers import free_port
from tests import fake_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def start(folder: Path, script: Path, *arguments: object, **variables: str) -> subprocess.Popen:
    environment = {**fake_gpu.with_devices(), "PYTHONPATH": str(ROOT), "FAKE_GPU_FOLDER": str(folder), **variables}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """What the processes wrote; all must end well."""
    try:
        texts = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return texts


def test_nccl_brings_versions_through_a_window_smaller_than_them(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    outputs([start(tmp_path, HERE / "messages.py", rank, port, "versions") for rank in range(2)])


@pytest.mark.skipif(not fake_gpu.IS_REHEARSAL, reason="only a stand-in for a GPU can be stopped")
def test_at_a_deadline_of_nccl_both_ends_get_an_error_and_live(tmp_path: Path) -> None:
    port, stop = free_port("127.0.0.1"), tmp_path / "stop"
    variables = {"FAKE_GPU_STUCK": str(stop)}
    processes = [start(tmp_path, HERE / "messages.py", rank, port, "stuck", stop, **variables) for rank in range(2)]
    assert ["alive" in text for text in outputs(processes)] == [True, True]


def test_cuda_ipc_brings_every_piece_to_another_process(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import json, torch\n"
        "from dataclasses import replace\n"
        "from tools.gpu_checks import hardware, transfer\n"
        "from tools.gpu_checks.sizes import on_host\n"
        "if __name__ == '__main__':\n"
        "    sizes = replace(on_host(), device=torch.device('cuda'))\n"
        "    print(json.dumps({m.what: m.value for m in (*transfer.weights(sizes), *hardware.shared_memory(sizes))}))\n"
    )
    process = start(tmp_path, script)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    found = json.loads(text.splitlines()[-1])
    assert found["cuda_ipc: pieces that arrived as they were sent"] == 1
