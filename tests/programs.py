"""The project's programs, run in the test's own process: what they import is imported once, which is most of their time."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from megatron_hpt import cli

ROOT = Path(__file__).parents[1]


def megatron_hpt(*arguments: object, cwd: Path | None = None) -> CompletedProcess:
    """``megatron-hpt ARGUMENTS`` in a folder."""
    return _done(cli.main, ["megatron-hpt", *map(str, arguments)], cwd)


def tool(name: str, *arguments: object, cwd: Path | None = None) -> CompletedProcess:
    """``python tools/NAME ARGUMENTS`` in a folder."""
    script = str(ROOT / "tools" / name)
    with mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):  # as Python does for a script
        return _done(lambda: runpy.run_path(script, run_name="__main__"), [script, *map(str, arguments)], cwd)


def _done(program, arguments: list[str], cwd: Path | None) -> CompletedProcess:
    out, err, code = io.StringIO(), io.StringIO(), 0
    there = contextlib.chdir(cwd) if cwd else contextlib.nullcontext()
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), there:
        try:
            program()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
