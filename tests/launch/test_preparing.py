"""Two runs at once from a fresh checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """
import shutil, time
from pathlib import Path
from megatron_hpt.config import Config, DataConfig, ModelConfig

def recipe():
    return Config(name="x", model=ModelConfig(path="inputs"), data=DataConfig(train="t"))

def prepare(config):
    # As the recipes do, slowly.
    target, temporary = Path("inputs"), Path(".inputs.partial")
    if not target.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for number in range(10):
            (temporary / str(number)).touch()
            time.sleep(0.2)
        temporary.rename(target)
        with open("prepared", "a") as log:
            log.write("once\\n")
"""
START = """
import sys
from pathlib import Path
from megatron_hpt.errors import HptError
from megatron_hpt.launch.train import start_run
try:
    start_run("recipe.py", [], Path("runs"))
except HptError as error:
    print(error)
"""


def test_the_second_waits_for_the_first_and_finds_the_inputs(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", START], cwd=tmp_path, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert ["config.json" in out for out, _ in said] == [True, True], said  # both came to what is behind it: no model
    assert not [err for _, err in said if "Traceback" in err]
    assert (tmp_path / "prepared").read_text() == "once\n"
    assert len(list((tmp_path / "inputs").iterdir())) == 10
