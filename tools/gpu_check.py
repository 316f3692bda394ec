"""Run the whole actor on one GPU and print what it gives beside what was expected.

    python tools/gpu_check.py build/gpu_check              # needs a GPU; under 8 minutes
    python tools/gpu_check.py build/gpu_check --rehearse   # the same code, small, on the host: its numbers say nothing

Every check is a process of its own, so that a failure of one costs only that one, and the table says what was left out.
The table is also written to OUT/gpu_check.md.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_checks import actor, hardware, logprobs, transfer
from gpu_checks.measurement import Measurement, markdown, read, write
from gpu_checks.sizes import Sizes, on_gpu, on_host

from megatron_hpt import command
from megatron_hpt.files import check_folder

BUDGET_S = 460


def _steps(sizes: Sizes) -> Iterator[Measurement]:
    measured = [m.value for m in read(Path("ceilings.jsonl")) if m.what == hardware.BF16_CEILING]
    return actor.steps(sizes, measured[0] if measured else None)


CHECKS: dict[str, Callable[[Sizes], Iterator[Measurement]]] = {
    "ceilings": hardware.ceilings,
    "transformer_engine": hardware.transformer_engine,
    "parity": actor.parity,
    "steps": _steps,
    "memory": actor.memory,
    "log_probabilities": logprobs.log_probabilities,
    "ipc": hardware.shared_memory,
    "weights": transfer.weights,
}
"""By name, in the order of what one would most like to know should time run out."""


def run_all(out: Path, rehearse: bool) -> list[Measurement]:
    """Every check in a process of its own, until the time is spent."""
    started, found = time.monotonic(), []
    for name in CHECKS:
        left = BUDGET_S - (time.monotonic() - started)
        print(f"{name} … ({left:.0f} s left)", file=sys.stderr, flush=True)
        found += run_one(out, name, rehearse, left)
    return found


def run_one(out: Path, name: str, rehearse: bool, seconds: float) -> list[Measurement]:
    """One check's lines; what it had measured before it failed or the time was spent stands."""
    log, lines = out / f"{name}.log", out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    if seconds < 5:
        return [Measurement(name, "all", note=f"the {BUDGET_S} s of a visit were spent")]
    command = [sys.executable, str(Path(__file__).resolve()), ".", "--only", name, *(["--rehearse"] if rehearse else [])]
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, cwd=out, stdout=sink, stderr=sink, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return [*read(lines), Measurement(name, "the rest", note=f"the {BUDGET_S} s of a visit were spent")]
    if code:
        text = log.read_text(encoding="utf-8").strip().splitlines()
        return [*read(lines), Measurement(name, "the rest", note=f"failed: {text[-1] if text else code}; see {log}")]
    return read(lines)


def run_here(name: str, sizes: Sizes) -> None:
    """One check in this process; every line is on disk as soon as it is measured."""
    found = []
    for measurement in CHECKS[name](sizes):
        found.append(measurement)
        write(found, Path(f"{name}.jsonl"))


def about() -> str:
    """What was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "host"
    return f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="small, on the host")
    parser.add_argument("--only", choices=CHECKS, help="one check, in this process and folder")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.exit(
            2,
            "gpu_check: torch finds no CUDA device; run it on a GPU machine, or give --rehearse to run the code on the host\n",
        )
    if arguments.only:
        return run_here(arguments.only, on_host() if arguments.rehearse else on_gpu())
    check_folder(arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = run_all(arguments.out, arguments.rehearse)
    if arguments.rehearse:
        found = [Measurement(m.check, m.what, m.value, m.unit, note=m.note) for m in found]
    table = f"{about()}\n\n{markdown(found)}\n"
    (arguments.out / "gpu_check.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    command.run(main)
