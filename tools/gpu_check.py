"""Run the whole actor on one GPU and print what it gives beside what was expected.

    python tools/gpu_check.py build/gpu_check              # needs a GPU; under 8 minutes
    python tools/gpu_check.py build/gpu_check --rehearse   # the same code, small, on the host: its numbers say nothing

Every check is a process of its own, so that a failure of one costs only that one, and the table says what was left out.
The table, OUT/gpu_check.md, is written again as each check ends: a visit that is cut short leaves what it has measured.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_checks import actor, hardware, logprobs, quickstart, transfer
from gpu_checks.measurement import Measurement, markdown, read, write
from gpu_checks.sizes import Sizes, on_gpu, on_host

from megatron_hpt import command
from megatron_hpt.files import check_folder

BUDGET_S = 460.0
REHEARSAL_S = 3600.0
"""Seconds of all checks together; a host may be as slow as it is."""


def _ceiling() -> float | None:
    """Return the measured TFLOP/s of a bfloat16 matrix product, or None where that check has not come so far."""
    measured = [m.value for m in read(Path("ceilings.jsonl")) if m.what == hardware.BF16_CEILING]
    return measured[0] if measured else None


class Check(NamedTuple):
    """One check, and the seconds after which it is ended on a GPU, so that one that hangs leaves time to the others."""

    measure: Callable[[Sizes], Iterator[Measurement]]
    longest: float


CHECKS = {
    "parity": Check(actor.parity, 120),
    "ceilings": Check(hardware.ceilings, 30),
    "transformer_engine": Check(hardware.transformer_engine, 45),
    "steps": Check(lambda sizes: actor.steps(sizes, _ceiling()), 200),
    "log_probabilities": Check(logprobs.log_probabilities, 60),
    "quickstart": Check(quickstart.quickstart, 150),
    "weights": Check(transfer.weights, 30),
    "ipc": Check(hardware.shared_memory, 30),
    "memory": Check(actor.memory, 60),
    "supervised": Check(lambda sizes: actor.supervised(sizes, _ceiling()), 60),
}
"""By name, in the order of what one would most like to know should time run out: what may be wrong, then what may be slow."""


def run_all(out: Path, rehearse: bool) -> str:
    """Run every check in a process of its own until the time is spent, and return the table, which is on disk after each."""
    ends, found, table = time.monotonic() + (REHEARSAL_S if rehearse else BUDGET_S), [], ""
    for name, check in CHECKS.items():
        left = ends - time.monotonic()
        print(f"{name} … ({left:.0f} s left)", file=sys.stderr, flush=True)
        lines = run_one(out, name, rehearse, left if rehearse else min(left, check.longest))
        # A rehearsal's values are beside no expectation.
        found += [Measurement(m.check, m.what, m.value, m.unit, note=m.note) for m in lines] if rehearse else lines
        table = f"{about()}\n\n{markdown(found)}\n"
        (out / "gpu_check.md").write_text(table, encoding="utf-8")
    return table


def run_one(out: Path, name: str, rehearse: bool, seconds: float) -> list[Measurement]:
    """Return one check's lines; what it had measured before it failed or its time was spent stands."""
    log, lines = out / f"{name}.log", out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    if seconds < 5:
        return [Measurement(name, "all", note=f"the {BUDGET_S:.0f} s of a visit were spent")]
    command = [sys.executable, str(Path(__file__).resolve()), ".", "--only", name, *(["--rehearse"] if rehearse else [])]
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, cwd=out, stdout=sink, stderr=sink, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return [*read(lines), Measurement(name, "the rest", note=f"ended after its {seconds:.0f} s")]
    if code:
        text = log.read_text(encoding="utf-8").strip().splitlines()
        return [*read(lines), Measurement(name, "the rest", note=f"failed: {text[-1] if text else code}; see {log}")]
    return read(lines)


def run_here(name: str, sizes: Sizes) -> None:
    """Run one check in this process; every line is on disk as soon as it is measured."""
    found = []
    for measurement in CHECKS[name].measure(sizes):
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
    print(run_all(arguments.out, arguments.rehearse))


if __name__ == "__main__":
    command.run(main)
