"""How commands end, whatever becomes of their files and of their output."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt import command
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import HptError, Interrupted, RequeueRequested
from megatron_hpt.launch.train import _logged
from megatron_hpt.run import create
from tests import programs

ROOT = Path(__file__).parents[1]
CONFIG = [sys.executable, "-m", "megatron_hpt.cli", "config", str(ROOT / "recipes" / "quickstart.py")]
LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
]


def ended(program, code: int = 1) -> int:
    with pytest.raises(SystemExit) as end:
        command.run(program, code)
    return end.value.code


def raising(error: BaseException):
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (HptError("no [such] thing"), 2, "error: no [such] thing\n"),
        (Interrupted("Ctrl-C"), 130, "Ctrl-C\n"),
        (RequeueRequested("later"), 75, "later\n"),
        (FileNotFoundError(errno.ENOENT, "x", "/a/b"), 2, "error: /a/b: No such file or directory; check the path\n"),
        (OSError(errno.ENAMETOOLONG, "x", "nnn"), 2, "error: nnn: File name too long; choose a shorter name\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; make room on the file system"),
        (FileExistsError(errno.EEXIST, "out exists: another process has written it"), 2, "error: out exists: another process"),
    ],
)
def test_an_end_is_in_words(error: Exception, code: int, message: str, capsys: pytest.CaptureFixture) -> None:
    assert ended(raising(error), 2) == code
    assert message in (said := capsys.readouterr().err)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("contents", "read", "message"),
    [
        (b"\xff", lambda path: path.read_text(encoding="utf-8"), "not UTF-8 text: write it again as UTF-8"),
        (b"{", lambda path: json.loads(path.read_bytes()), "not JSON: check that it is whole"),
        (b"[" * 100_000, lambda path: json.loads(path.read_bytes()), "nested too deep to be read"),
    ],
)
def test_the_file_that_cannot_be_read_is_named(
    tmp_path: Path, contents: bytes, read, message: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.json").write_bytes(contents)
    assert ended(lambda: read(tmp_path / "a.json")) == 1
    assert f"error: {tmp_path / 'a.json'}: {message}" in capsys.readouterr().err


def test_a_fault_of_ours_is_a_traceback_and_says_where_to_report_it(capsys: pytest.CaptureFixture) -> None:
    assert ended(lambda: {}["key"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "KeyError: 'key'" in said
    assert said.endswith("report this to the maintainers with the text above\n")


LONG = "n" * 300
WRONG = [
    (["config", LONG], "File name too long"),
    (["train", str(ROOT / "recipes" / "quickstart.py"), f"name={LONG}"], "name: a name of 300 bytes; at most 200"),
    (["plan", str(ROOT / "recipes" / "quickstart.py"), "--cluster", LONG], "File name too long"),
    (["plan", str(ROOT / "recipes" / "quickstart.py"), "--fill", "nan"], "Invalid value for '--fill'"),
    (["compare", "nothing", "--output", "folder.md"], "folder.md: is a folder; give the name of a file"),
    (["compare", "nothing", "--output", "file/x.md"], "file/x.md: cannot be written"),
    (["compare", LONG], "File name too long"),
    (["report", "folder.md"], "not a run directory"),
    (["regrade", "binary"], "not the folder of an evaluation"),
    (["replay", LONG, "--gate", "threshold=2"], "File name too long"),
    (["config", "binary/config.yaml"], "not a YAML file that can be read"),
    (["config", "deep.yaml"], "nested too deep"),
    (["config", "latin.yaml"], "latin.yaml: not a YAML file that can be read"),
    (["config", "."], "no such recipe"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda given: " ".join(given)[:40] if isinstance(given, list) else ""
)
def test_what_is_wrong_with_a_path_is_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "config.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "binary" / "evaluation.json").write_bytes(bytes(range(256)))
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    done = programs.megatron_hpt(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.replace("│", "").split()), done.stderr
    assert "Traceback" not in done.stderr


# Streams of real processes.


def shell(words: list[str], redirection: str, **environment: str) -> subprocess.CompletedProcess:
    line = f'"$@" {redirection}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="latin-1",
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("unbuffered", "writes"),
    [pytest.param("", CONFIG, marks=pytest.mark.slow, id=""), pytest.param("1", [*CONFIG[:3], "--help"], id="unbuffered")],
)
def test_output_that_nobody_reads_ends_a_command_as_it_ends_others(unbuffered: str, writes: list[str]) -> None:
    closed = shell(writes, "| true", PYTHONUNBUFFERED=unbuffered)
    assert (closed.returncode in (0, 141), closed.stderr) == (True, "")  # 0: all of it was written before `true` ended
    full = shell(writes, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (full.returncode, full.stderr) == (1, "error: standard output: No space left on device\n")
    none = shell(writes, ">&- 2>&- <&-", PYTHONUNBUFFERED=unbuffered)
    assert (none.returncode, none.stderr) == (0, "")


GOING_ON = """
import sys
from pathlib import Path
from megatron_hpt import command
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.launch.train import _logged
from megatron_hpt.run import create
from rich.console import Console

def train():
    run = create(Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t")), Path(sys.argv[1]))
    command.goes_on_without_output()
    with _logged(run):
        for step in range(1000):
            Console().print("step", step, "x" * 100)
    (run.path / "trained").touch()

command.run(train)
"""


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&1 | head -1 >/dev/null", ">/dev/full", ">&-"])
def test_training_goes_on_without_its_output(tmp_path: Path, redirection: str) -> None:
    done = shell([sys.executable, "-c", GOING_ON, str(tmp_path)], redirection)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    assert (run / "trained").exists()
    if redirection != ">&-":
        log = (run / "logs" / "supervisor.log").read_text(encoding="utf-8")
        assert (log.count("\n"), log.count("standard output cannot be written any more")) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES, ids=["C", "latin-1"])
def test_in_any_locale_files_are_utf_8_and_the_terminal_gets_what_it_shows(tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "é.yaml").write_text("name: é\nmodel: {path: 数}\ndata: {train: t}\n", encoding="utf-8")
    done = shell([*CONFIG[:4], str(tmp_path / "é.yaml"), "data.chat_template=ü"], "", **locale)
    assert done.returncode == 0, done.stderr
    assert "\\xE9" in done.stdout
    assert "\\u6570" in done.stdout
    formula = shell([*CONFIG[:3], "algorithms", "grpo"], "", **locale)
    assert (formula.returncode, formula.stderr) == (0, "")
    assert "\\u03c0_ref" in formula.stdout


def test_children_read_files_as_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "0")
    command.prepare()
    code = "import sys; sys.exit(not sys.flags.utf8_mode)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "LC_ALL": "C"}).returncode == 0


def test_warnings_of_a_run_are_in_its_log(tmp_path: Path) -> None:
    run = create(Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t")), tmp_path)
    with _logged(run):
        pass
    assert not run.log("supervisor").exists()
    with _logged(run):
        logging.getLogger("megatron_hpt.launch.train").warning("é happened")
    assert "é happened" in run.log("supervisor").read_text(encoding="utf-8")
