"""`megatron-hpt launch` with a real NeMo-Run, in its own environment: what it would submit, and runs on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
NEMO = ROOT / ".venv-nemo"
GOLDEN = Path(__file__).parent / "nemo_70b.txt"

pytestmark = pytest.mark.skipif(not (NEMO / ".ready").is_file(), reason="no NeMo-Run: make nemo-env")


def hpt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in NeMo-Run's environment; experiments are kept in a folder."""
    return subprocess.run(
        [NEMO / "bin" / "python", "-m", "megatron_hpt.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def here(folder: Path, **settings: object) -> str:
    """A file of this machine, with the environment of the tests."""
    program = str(Path(sys.executable).parent / "megatron-hpt")
    file = folder / "here.yaml"
    file.write_text(
        yaml.safe_dump(
            {"kind": "local", "checkout": str(folder), "program": program, "environment": {"PYTHONPATH": str(ROOT)}, **settings}
        )
    )
    return str(file)


@pytest.mark.slow
def test_what_would_be_submitted_for_the_70b(tmp_path: Path) -> None:
    """Write the file anew where NeMo-Run or the site's example changes: HPT_GOLDEN=1 pytest …"""
    done = hpt(tmp_path, "launch", "recipes/llama_3_1.py", "size=70B", "method=hpt", "--site", "login_node", "--dry-run")
    assert done.returncode == 0, done.stderr
    found = done.stdout.replace(str(tmp_path), "HOME").replace(str(ROOT), "CHECKOUT")
    found = re.sub(r"cluster_\d{19}", "cluster_ID", found)
    if "HPT_GOLDEN" in os.environ:
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


@pytest.mark.slow
def test_a_tunnel_is_not_opened_to_show_what_it_would_carry(tmp_path: Path) -> None:
    done = hpt(tmp_path, "launch", "recipes/llama_3_1.py", "size=70B", "--site", "over_ssh", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--chdir /lustre/me/nemo/" in done.stdout
    assert "cd /lustre/me/megatron_hpt\n" in done.stdout
    assert "model.path=/lustre/staged/Llama-3.1-70B" in done.stdout


@pytest.mark.slow
def test_a_recipe_is_a_script_and_an_executor_to_compose(tmp_path: Path) -> None:
    program = (
        "from megatron_hpt.launch.nemo import task\n"
        "script, executor = task('recipes/llama_3_1.py', ['size=70B'], 'login_node')\n"
        "print(type(script).__name__, type(executor).__name__, executor.nodes)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([NEMO / "bin" / "python", "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "Script SlurmExecutor 17\n", done.stderr


@pytest.mark.slow
def test_an_experiment_that_nobody_launched(tmp_path: Path) -> None:
    done = hpt(tmp_path, "status", "quickstart_1")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"quickstart_1: no such experiment in {tmp_path / 'nemo'}" in done.stderr


@pytest.mark.slow
def test_a_job_that_fails_here_is_an_error_and_says_why(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "quickstart.py")
    done = hpt(tmp_path, "launch", recipe, "parallel.tensor=3", "--site", here(tmp_path), "--logs")
    assert done.returncode == 1, done.stdout
    assert "parallel.tensor: given 3" in done.stdout + done.stderr
    assert "quickstart: FAILED" in done.stderr


@pytest.mark.thorough
def test_a_run_here_with_two_ranks_and_its_output(tmp_path: Path) -> None:
    """Adds NeMo-Run's local executor, to the end of a run, to the runs that tests/slurm/test_nemo.py sends to Slurm."""
    settings = ["trainer.steps=2", "trainer.prompts_per_step=8", "rollout.samples_per_prompt=4", "optimizer.warmup_steps=0"]
    recipe = str(ROOT / "recipes" / "quickstart.py")
    done = hpt(tmp_path, "launch", recipe, "--site", here(tmp_path, settings=settings), "--logs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^launched  quickstart_\d+$", done.stdout, re.MULTILINE)
    assert "done" in done.stdout + done.stderr
    assert len(list(tmp_path.glob("runs/quickstart-*/metrics.jsonl"))) == 1
