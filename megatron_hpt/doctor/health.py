"""Is this node well? Quick checks before it is trusted with a part of a run; nothing here needs a GPU or torch to be there."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken"]
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**30
"""Bytes; a container has 64 MiB unless it is told otherwise."""
LEAST_DISK = 20 * 2**30
LEAST_FILES = 4096
"""Open files: the coordinator holds hundreds of connections to every engine."""
MOST_SKEW_S = 2.0
ANSWER_S = 30.0
COMPUTE_S = 120.0
"""Deadlines: a sick GPU answers late or never."""
RECENT_S = 3600.0
"""Older messages of the kernel are of another job, or of a GPU that has been reset since."""
FATAL_XIDS = {
    48: "uncorrectable memory error",
    62: "internal halt of the micro-controller",
    64: "memory row could not be remapped",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered memory error",
}
"""NVIDIA's numbers of errors that outlive the process that met them; others (13, 31, 43 …) are of a program."""
_XID = re.compile(r"\[\s*(\d+\.\d+)\].*NVRM: Xid \(PCI:([\w:.]+).*?\): (\d+)")


@dataclass(frozen=True)
class HealthFinding:
    """What a check found."""

    state: State
    found: str
    remedy: str = ""
    """What to do."""


@dataclass(frozen=True)
class CheckContext:
    """What a check may depend on."""

    folder: Path
    """Of the runs: on a file system that all nodes see."""
    gpus: int | None = None
    """GPUs that there must be; None: as many as there are."""


Check = Callable[[CheckContext], HealthFinding]


def ok(found: str) -> HealthFinding:
    """Nothing to do."""
    return HealthFinding("ok", found)


def missing(found: str, remedy: str) -> HealthFinding:
    """Something that a run may do without."""
    return HealthFinding("missing", found, remedy)


def broken(found: str, remedy: str) -> HealthFinding:
    """Runs would fail."""
    return HealthFinding("broken", found, remedy)


def gpus(asked: CheckContext) -> HealthFinding:
    """As many as there must be, and each answers."""
    if shutil.which("nvidia-smi") is None:
        if asked.gpus:
            return broken(f"no nvidia-smi, {asked.gpus} GPUs expected", "install the driver, or leave the node out")
        return missing("no nvidia-smi", "on a node with GPUs: install the driver; without, everything runs on the host")
    listed = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    names = listed.splitlines()
    if asked.gpus is not None and len(names) != asked.gpus:
        return broken(f"{len(names)} GPUs, {asked.gpus} expected", "leave the node out; nvidia-smi -L shows which one is gone")
    return ok(", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none")


def gpu_memory(_: CheckContext) -> HealthFinding:
    """No uncorrectable memory error since the last reset, and no row that could not be remapped."""
    if shutil.which("nvidia-smi") is None:
        return missing("no nvidia-smi", "")
    counted = _output(["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"])
    remapped = _output(["nvidia-smi", "--query-remapped-rows=gpu_bus_id,remapped_rows.failure", "--format=csv,noheader"])
    errors = {gpu: count for gpu, count in _pairs(counted) if count != "0" and "N/A" not in count}
    failed = [gpu for gpu, state in _pairs(remapped) if state.lower() in ("yes", "1")]
    said = [f"GPU {gpu}: {count} uncorrectable memory errors" for gpu, count in errors.items()]
    said += [f"GPU {gpu}: a memory row could not be remapped" for gpu in failed]
    if said:
        return broken(", ".join(said), "leave the node out; drain it and reset the GPU, or replace it")
    return ok("no uncorrectable error")


def kernel_log(_: CheckContext) -> HealthFinding:
    """No error of a GPU in the last hour that outlives its process."""
    if shutil.which("dmesg") is None:
        return missing("no dmesg", "")
    done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=ANSWER_S, encoding="utf-8", errors="replace")
    if done.returncode:
        return missing("only root may read the kernel's log here", "")
    up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    matches = [match for line in done.stdout.splitlines() if (match := _XID.search(line)) and up - float(match[1]) < RECENT_S]
    fatal = {(match[2], int(match[3])) for match in matches if int(match[3]) in FATAL_XIDS}
    if fatal:
        said = ", ".join(f"GPU {bus}: Xid {xid} ({FATAL_XIDS[xid]})" for bus, xid in sorted(fatal))
        return broken(said, "leave the node out; drain it and reset the GPU")
    return ok("no Xid that outlives its process in the last hour")


def run_folder(asked: CheckContext) -> HealthFinding:
    """A file can be written and read back where runs will be."""
    folder = existing(asked.folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpt-doctor-") as file:
            file.write(b"hpt")
            file.flush()
            os.fsync(file.fileno())
            if Path(file.name).read_bytes() != b"hpt":
                return broken(f"{folder}: what was written was not read back", "have the file system looked at")
    except OSError as error:
        return broken(f"{folder} cannot be written: {error.strerror}", "give --folder one that can, on all nodes")
    return ok(f"{folder} can be written")


def clock(asked: CheckContext) -> HealthFinding:
    """This node's clock agrees with that of the file system: ages of checkpoints and logs compare between nodes."""
    before = time.time()
    try:
        with tempfile.NamedTemporaryFile(dir=existing(asked.folder), prefix=".hpt-doctor-") as file:
            stamped, after = os.stat(file.name).st_mtime, time.time()
    except OSError:
        return missing("not compared: the run folder cannot be written", "")
    skew = max(before - stamped, stamped - after, 0.0)
    if skew > MOST_SKEW_S:
        return broken(f"{skew:.0f} s apart from the file system's", "synchronise the clocks (chrony), or leave the node out")
    return ok("agrees with the file system's")


def disk(asked: CheckContext) -> HealthFinding:
    """Room where runs and temporary files go."""
    folders = {existing(asked.folder), Path(tempfile.gettempdir())}
    free = {folder: shutil.disk_usage(folder).free for folder in sorted(folders)}
    text = ", ".join(f"{folder}: {size / 2**30:.0f} GiB free" for folder, size in free.items())
    if min(free.values()) < LEAST_DISK:
        return broken(text, f"make room for {LEAST_DISK // 2**30} GiB, or give --folder and TMPDIR others")
    return ok(text)


def shared_memory(_: CheckContext) -> HealthFinding:
    """Room for weights on their way to engines, and for the engines' own ranks."""
    if not SHARED_MEMORY.is_dir():
        return broken(f"no {SHARED_MEMORY}", "mount a tmpfs there")
    usage = shutil.disk_usage(SHARED_MEMORY)
    text = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    if usage.free < LEAST_SHARED_MEMORY:
        return broken(text, f"free it, or give it room (docker: --shm-size; else mount -o remount,size=… {SHARED_MEMORY})")
    return ok(text)


def host_name(_: CheckContext) -> HealthFinding:
    """This node's own name resolves: ranks on several nodes meet by it (gloo asks for the address of its own)."""
    name, several = socket.gethostname(), int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1
    try:
        return ok(f"{name}: {socket.gethostbyname(name)}")
    except OSError as error:
        found, remedy = f"{name} does not resolve ({error.strerror})", f"put {name} into DNS or /etc/hosts"
        return broken(found, remedy) if several else missing(found, f"runs on this machine alone need it not; else {remedy}")


def open_files(_: CheckContext) -> HealthFinding:
    """The hard limit, which the coordinator goes up to."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        return broken(f"at most {hard}", f"raise the hard limit to {LEAST_FILES} or more (ulimit -Hn, limits.conf)")
    return ok("no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def computation(asked: CheckContext) -> HealthFinding:
    """A product of whole numbers is exact on every device; in a process of its own, for a sick GPU may never answer."""
    command = [sys.executable, "-m", "megatron_hpt.doctor.health", str(asked.gpus or 0)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPUTE_S, encoding="utf-8", errors="replace")
    if done.returncode:
        return broken(last_line(done.stderr), "leave the node out; run `python -m megatron_hpt.doctor.health` to see all of it")
    return ok(done.stdout.strip())


NODE: dict[str, Check] = {
    "GPUs": gpus,
    "GPU memory": gpu_memory,
    "kernel log": kernel_log,
    "run folder": run_folder,
    "clock": clock,
    "disk": disk,
    "/dev/shm": shared_memory,
    "host name": host_name,
    "open files": open_files,
    "computation": computation,
}
"""What every node is asked before it is trusted."""


def examine(check: Check, asked: CheckContext) -> HealthFinding:
    """Its finding; a check that fails itself has found something broken."""
    try:
        return check(asked)
    except subprocess.TimeoutExpired as error:
        return broken(f"{Path(error.cmd[0]).name} did not answer within {error.timeout:.0f} s", "leave the node out")
    except Exception as error:  # whatever a broken installation raises
        first = (str(error).splitlines() or [""])[0]
        return broken(f"{type(error).__name__}: {first}", "repair what the message names")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _output(command: Sequence[str]) -> str:
    """What a command says.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {last_line(done.stdout + done.stderr)}")
    return done.stdout.strip()


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first.strip(), second.strip()) for first, _, second in (line.partition(",") for line in text.splitlines())]


def last_line(text: str) -> str:
    """What a failed command said last."""
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()


def main() -> None:
    """``python -m megatron_hpt.doctor.health [GPUS]``: multiply whole numbers on every device.

    Every sum is below 2^24, so float32 is exact.
    """
    import torch

    expected, seen = int(next(iter(sys.argv[1:]), 0)), torch.cuda.device_count()
    if expected and seen != expected:
        sys.exit(f"torch sees {seen} CUDA devices, {expected} expected")
    a, b = (torch.arange(512 * 512).remainder(modulus).sub(6).view(512, 512) for modulus in (17, 13))
    devices = [f"cuda:{index}" for index in range(seen)] or ["cpu"]
    for device in devices:
        product = a.to(device, torch.float32) @ b.to(device, torch.float32)
        if not torch.equal(product.cpu().long(), a @ b):
            sys.exit(f"{device}: a product of whole numbers is wrong")
    sys.stdout.write(f"exact on {', '.join(devices)}\n")


if __name__ == "__main__":
    main()
