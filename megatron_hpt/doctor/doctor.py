"""``megatron-hpt doctor``: what this machine can run, what is missing, and what to do about it.

A check is a function that returns a finding, and a row of a table; what it needs may be missing or broken, so it imports
that itself, and nothing is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_hpt.doctor.health import NODE, Check, CheckContext, HealthFinding, broken, examine, last_line, missing, ok
from megatron_hpt.engines.registry import ENGINES

IMPORT_S = 180.0
"""Deadline of an import in a process of its own, from a slow file system."""
VERSIONS = {"torch": ">=2.11,<2.16", "megatron-core": ">=0.16.1,<0.20", "transformers": ">=5.10,<5.20"}
"""Packages of the trainer, and the versions that are known to go together."""
_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}
_PROBE = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[2:]:
    try:
        one = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    found[name] = {"version": one.version, "requires": one.requires or []}
hooks = [hook.name for hook in metadata.entry_points(group=sys.argv[1])]
print(json.dumps({"found": found, "hooks": hooks}))
"""


@dataclass(frozen=True)
class Report:
    """All findings on one machine."""

    node: str
    findings: Mapping[str, HealthFinding]

    @property
    def sick(self) -> bool:
        """Something is broken."""
        return any(finding.state == "broken" for finding in self.findings.values())

    def as_json(self) -> str:
        """One object: node, sick, findings (check, state, found, remedy)."""
        findings = [{"check": name, **asdict(finding)} for name, finding in self.findings.items()]
        return json.dumps({"node": self.node, "sick": self.sick, "findings": findings}, indent=2)

    def as_line(self) -> str:
        """One line for the log of a batch job: healthy, or every reason why not."""
        reasons = [f"{name}: {finding.found}" for name, finding in self.findings.items() if finding.state == "broken"]
        if reasons:
            return f"{self.node}: sick: {'; '.join(reasons)}"
        return f"{self.node}: healthy: {self.findings['GPUs'].found}; {self.findings['computation'].found}"

    def print_table(self, console: Console) -> None:
        """For people."""
        table = Table("check", "", "found", "what to do", box=box.SIMPLE)
        for name, finding in self.findings.items():
            state = "OK" if finding.state == "ok" else finding.state
            table.add_row(name, Text(state, style=_STYLES[finding.state]), Text(finding.found), Text(finding.remedy))
        console.print(table)


def examined(checks: Mapping[str, Check], asked: CheckContext) -> Report:
    """Ask every check."""
    return Report(socket.gethostname(), {name: examine(check, asked) for name, check in checks.items()})


def python(_: CheckContext) -> HealthFinding:
    """New enough, and of this environment."""
    found = f"{platform.python_version()} ({sys.executable})"
    return ok(found) if sys.version_info >= (3, 11) else broken(found, "use Python 3.11 or newer")


def package(name: str) -> Check:
    """A package of the trainer is there, in a version that is known to work."""

    def check(_: CheckContext) -> HealthFinding:
        from packaging.specifiers import SpecifierSet

        remedy = f"make .venv/.ready, or: pip install '{name}{VERSIONS[name]}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return broken("not installed", remedy)
        if not SpecifierSet(VERSIONS[name], prereleases=True).contains(version):
            return broken(f"{version}; known to work: {VERSIONS[name]}", remedy)
        return ok(version)

    return check


def engine(name: str) -> Check:
    """The environment of an engine (`rollout.engine`) has it, with our receiver of weights, and with the torch that it was
    built for."""

    def check(_: CheckContext) -> HealthFinding:
        kind = ENGINES[name]
        interpreter, install, packages = kind.python(), kind.install, kind.packages
        if shutil.which(interpreter) is None:
            return missing(f"no environment at {interpreter}", f"{install}, or set rollout.python")
        command = [interpreter, "-c", _PROBE, kind.plugin_group, "torch", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, encoding="utf-8", errors="replace")
        if done.returncode:
            return broken(f"{interpreter} does not run: {last_line(done.stderr)}", install)
        probed = json.loads(done.stdout)
        there = [one for one in packages if one in probed["found"]]
        if not there:
            return missing(f"not installed in {interpreter}", f"{install}, or set rollout.python")
        found = probed["found"]
        torch = found.get("torch", {"version": "none"})["version"]
        text = f"{there[0]} {found[there[0]]['version']}, torch {torch}"
        if "megatron_hpt" not in probed["hooks"]:
            return broken(f"{text}; it cannot receive weights: megatron_hpt is not installed beside it", install)
        asked_for = unmet(found[there[0]]["requires"], torch)
        if asked_for and not torch.endswith("+cpu"):  # kernels that are built against it; the host's need none
            return broken(f"{text}; it was built for {asked_for}", f"{install}, or install that torch in {interpreter}")
        return ok(f"{text} (built for {asked_for})" if asked_for else text)

    return check


def unmet(requires: Iterable[str], torch: str) -> str:
    """The requirement of a torch that this one does not meet; empty: none."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires):
        applies = requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        if applies and not requirement.specifier.contains(torch, prereleases=True):
            return f"torch{requirement.specifier}"
    return ""


def cuda(_: CheckContext) -> HealthFinding:
    """torch can be imported, and sees the devices that the driver has."""
    import torch

    remedy = "install a CUDA build of torch; without one everything runs on the host"
    driver = shutil.which("nvidia-smi") is not None
    if torch.version.cuda is None:
        return broken("the driver is there, torch is a build without CUDA", remedy) if driver else missing("none", remedy)
    if not torch.cuda.is_available():
        return broken(f"torch of CUDA {torch.version.cuda} sees none", "compare the driver's CUDA (nvidia-smi) with torch's")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = [f"{one.name}, {one.total_memory / 2**30:.0f} GiB, capability {one.major}.{one.minor}" for one in devices]
    counted = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return ok(f"{counted}; CUDA {torch.version.cuda}")


def transformer_engine(_: CheckContext) -> HealthFinding:
    """Installed, and its libraries load beside this torch."""
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return missing("not installed", "on GPUs: pip install --no-build-isolation 'transformer-engine[pytorch]'; docs/gpu.md")
    command = [sys.executable, "-c", "import torch, transformer_engine.pytorch"]  # it finds cuBLAS among torch's libraries
    done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, encoding="utf-8", errors="replace")
    if done.returncode:
        return broken(f"{version} cannot be imported: {last_line(done.stderr)}", "install the version built for this torch")
    return ok(version)


def fp8(_: CheckContext) -> HealthFinding:
    """Recipes of `actor.fp8` that would run here."""
    from megatron_hpt.actor.model.precision import FP8_RECIPES, check_fp8, this_machine
    from megatron_hpt.errors import ConfigError

    usable, machine = [], this_machine()
    for name in FP8_RECIPES:
        try:
            check_fp8(name, "bfloat16", machine)
        except ConfigError:
            continue
        usable.append(name)
    return ok(", ".join(usable)) if usable else missing("none", "needs a GPU, CUDA and Transformer Engine: docs/gpu.md")


def nccl(_: CheckContext) -> HealthFinding:
    """torch's NCCL, which must be an engine's to the last digit (`transfer.transport=nccl`)."""
    import torch

    if torch.version.cuda is None or not torch.distributed.is_nccl_available():
        return missing("none", "messages go by gloo on the host; for GPUs install a CUDA build of torch")
    return ok(".".join(map(str, torch.cuda.nccl.version())))


def apex(_: CheckContext) -> HealthFinding:
    """NVIDIA's, nobody's, or a stranger's, which Megatron-Core would import: what goes by this name is not imported here."""
    from megatron_hpt.actor.model.apex import KERNELS, MULTI_TENSOR, find_apex

    package = find_apex()
    if package is None:
        return ok(f"not installed, and not needed; on GPUs NVIDIA's would add {_added(KERNELS)}")
    if not package.is_nvidias:
        return broken(f"{package.place} is not NVIDIA Apex, and Megatron-Core would import it", "pip uninstall apex")
    lacking = [name for name in KERNELS if name not in package.kernels]
    build = "build it from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    if MULTI_TENSOR in lacking and PathFinder.find_spec("transformer_engine") is None:
        # Megatron-Core takes FusedAdam because it can be imported (optimizer/__init__.py); it raises when it is made.
        found = f"NVIDIA's, {package.place}, without {MULTI_TENSOR}: Megatron-Core would choose its Adam, which needs it"
        return broken(found, f"{build}, or pip uninstall apex")
    if lacking:
        return missing(f"NVIDIA's, {package.place}, without {', '.join(lacking)}", f"{build} for {_added(lacking)}")
    return ok(f"NVIDIA's, {package.place}: {_added(KERNELS)}")


def _added(kernels: Iterable[str]) -> str:
    """Return what kernels of Apex add."""
    from megatron_hpt.actor.model.apex import KERNELS

    return "; ".join(KERNELS[name] for name in kernels)


SOFTWARE: dict[str, Check] = {
    "Python": python,
    **{name: package(name) for name in VERSIONS},
    "CUDA": cuda,
    "NCCL": nccl,
    "Transformer Engine": transformer_engine,
    "FP8": fp8,
    "apex": apex,
    **{kind.title: engine(kind.name) for kind in ENGINES.values()},
}
"""What is installed."""
MACHINE: dict[str, Check] = {**SOFTWARE, **NODE}
"""Everything."""
