"""The ranks of tests end with who waits for them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
WAITS = """
import sys
from pathlib import Path
from tests.ranks import run_ranks

try:
    run_ranks(Path(sys.argv[1]), ranks=2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_an_interrupt_ends_ranks_that_it_does_not_reach_itself(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, time; open({str(tmp_path)!r} + f'/{{os.getpid()}}.pid', 'w').close(); time.sleep(600)")
    command = [sys.executable, "-c", WAITS, str(script)]
    run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        while len(ranks := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
            assert run.poll() is None
            time.sleep(0.1)
        os.kill(run.pid, signal.SIGINT)
        assert run.stdout.readline() == "interrupted\n"
        _, alive = psutil.wait_procs([psutil.Process(rank) for rank in ranks if psutil.pid_exists(rank)], timeout=60)
        assert not alive
    finally:
        run.communicate()


@pytest.mark.slow
def test_ranks_begin_with_what_an_actor_imports(tmp_path: Path) -> None:
    script, found = tmp_path / "rank.py", tmp_path / "found"
    script.write_text(
        f"""
import sys
before = set(sys.modules)
import torch
from megatron_hpt.actor import state, trainer
torch.optim.SGD([torch.zeros(1)])
open({str(found)!r}, "w").write("\\n".join(sorted(set(sys.modules) - before)))
"""
    )
    run_ranks(script, ranks=1)
    assert found.read_text() == ""
