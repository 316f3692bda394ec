"""tools/gpu_bundle.sh and tools/gpu_visit.sh, as far as a machine without GPU and network goes: Python is a stand-in."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .test_tools import ROOT

BUNDLE, VISIT = ROOT / "tools" / "gpu_bundle.sh", ROOT / "tools" / "gpu_visit.sh"
PYTHON = """#!/bin/sh
echo "$PYTHONPATH|$*" >> "$CALLS"
case "$*" in
    *gpu_check.py*)
        cd "$2"
        echo '| a table |' > gpu_check.md
        touch parity.log model.safetensors
        exit 3 ;;
esac
"""


def bash(script: str, **variables: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one package, made by the bundling script's own function."""
    package = tmp_path / "site" / "somepackage"
    (package / "tests").mkdir(parents=True)
    for name in ("__init__.py", "tests/test.py"):
        (package / name).write_text("there = True\n")
    done = bash(f"source {BUNDLE}; archive {tmp_path}/site {tmp_path}/bundle")
    assert done.stdout == f"{tmp_path}/bundle: 0 MiB\n", done.stderr
    return tmp_path / "bundle"


def test_the_visit_is_short_enough_to_be_sent_as_a_command() -> None:
    assert len(VISIT.read_text()) < 2000
    for script in (BUNDLE, VISIT):
        assert bash(f"bash -n {script}").returncode == 0
        assert os.access(script, os.X_OK)


def test_a_visit_unpacks_installs_checks_and_leaves_what_there_is(bundle: Path, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls, out, site, work = (tmp_path / name for name in ("calls", "out", "gpu_site", "gpu_check"))
    path = f"{python.parent}:{os.environ['PATH']}"
    done = bash(f"{VISIT} {bundle}", PATH=path, CALLS=calls, OUT=os.path.relpath(out, ROOT), TMPDIR=tmp_path)
    assert done.returncode == 3, done.stderr  # of the check that went wrong
    assert (site / "somepackage" / "__init__.py").is_file()
    install, check, doctor = calls.read_text().splitlines()
    assert install == f"{site}|-m pip install -q --no-deps --no-index --no-build-isolation --upgrade --target {site} ."
    assert check == f"{site}|tools/gpu_check.py {work}"
    assert doctor == f"{site}|-m megatron_hpt.cli doctor"
    assert (out / "gpu_check.md").read_text() == "| a table |\n"
    assert not (out / "gpu_check.md").is_symlink()
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "./parity.log" in logs.getnames()
        assert "./model.safetensors" not in logs.getnames()


def test_a_damaged_bundle_ends_the_visit(bundle: Path, tmp_path: Path) -> None:
    with (bundle / "site.tar.xz").open("ab") as file:
        file.write(b"x")
    done = bash(f"{VISIT} {bundle}", OUT=tmp_path / "out", TMPDIR=tmp_path)
    assert done.returncode != 0
    assert "site.tar.xz: FAILED" in done.stdout
    assert not any((tmp_path / "gpu_site").iterdir())


def test_the_same_files_are_the_same_bundle_and_tests_stay_behind(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "somepackage" / "__init__.py").touch()
    bash(f"source {BUNDLE}; archive {tmp_path}/site {tmp_path}/again")
    assert (tmp_path / "again" / "SHA256").read_text() == (bundle / "SHA256").read_text()
    with tarfile.open(bundle / "site.tar.xz") as content:
        assert sorted(content.getnames()) == [".", "./somepackage", "./somepackage/__init__.py"]


def test_a_bundle_that_is_too_large_is_refused(bundle: Path, tmp_path: Path) -> None:
    done = bash(f"source {BUNDLE}; MOST_MIB=0; archive {tmp_path}/site {bundle}")
    assert (done.returncode, done.stderr) == (1, f"{bundle} is larger than 0 MiB\n")
    done = bash(f"{BUNDLE} {tmp_path} trainers")
    assert (done.returncode, done.stderr) == (1, "trainers: allowed are trainer and vllm\n")


def test_a_bundle_that_cannot_be_downloaded_is_not_made(tmp_path: Path) -> None:
    assert bash(f"{BUNDLE} {tmp_path}/made trainer", PYTHON="false").returncode == 1
    assert not (tmp_path / "made" / "trainer").exists()


def test_the_extension_is_built_once_a_version(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl").touch()
    for version, code in (("2.11.0", 0), ("2.12.0", 1)):  # the second would begin with an environment
        assert bash(f"source {BUNDLE}; extension {tmp_path} {version}", PYTHON="false").returncode == code


def test_what_the_bundles_bring_is_pinned_and_agrees() -> None:
    lists = {name: ROOT / "requirements" / f"{name}.txt" for name in ("host", "gpu_trainer", "gpu_vllm")}
    pins = {
        name: {
            re.sub("[-_.]+", "-", requirement.name.lower()): str(requirement.specifier)
            for line in path.read_text().splitlines()
            if line and not line.startswith("#")
            for requirement in [Requirement(line)]
        }
        for name, path in lists.items()
    }
    assert all(version.startswith("==") for versions in pins.values() for version in versions.values())
    assert not pins["gpu_trainer"].keys() & pins["gpu_vllm"].keys()  # both are unpacked into one folder
    assert pins["gpu_trainer"]["transformer-engine"] == pins["gpu_trainer"]["transformer-engine-cu13"]
    ours = ("megatron-core", "pydantic", "pydantic-core", "annotated-types", "typing-inspection")
    assert {name: pins["gpu_trainer"][name] for name in ours} == {name: pins["host"][name] for name in ours}
