"""Preparation of data beside plain pyarrow, which reads the same file and writes it again, in one run.

    .venv/bin/python benchmarks/prepare_data.py

Two files: 20,000 demonstrations of about R1's length, and a million short ones. Each way runs in a process of its own; memory
is its peak above what the imports take, and time is of the processor, since others use the machine too. The 1,744 test problems
are random words like the rest.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.parquet import ROW_GROUP, SCHEMA, Problem, write_problems
from megatron_hpt.preparation.formats import openr1
from megatron_hpt.preparation.overlap import WORDS, HeldOut
from megatron_hpt.preparation.pipeline import Preparation, PreparationPlan
from megatron_hpt.preparation.reading import local_files

FILES = {"R1's length": (20_000, 2_000), "short": (1_000_000, 60)}
"""Rows, and words of a demonstration."""
TEST_PROBLEMS, PROMPT_WORDS = 1_744, 50


def problems(rows: int, words: int) -> Iterator[Problem]:
    """Random ones, of words of the lengths of English."""
    draw = random.Random(rows)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    for _ in range(rows):
        question = " ".join(draw.choices(vocabulary, k=PROMPT_WORDS))
        yield Problem(question, "7", " ".join(draw.choices(vocabulary, k=words)) + " \\boxed{7}")


def plain(source: Path, out: Path) -> None:
    """What pyarrow alone does, streaming and with the same row groups."""
    with pq.ParquetWriter(out, SCHEMA, write_page_checksum=True) as writer:
        for batch in pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False).iter_batches(ROW_GROUP):
            writer.write_batch(batch)


def as_python(source: Path, out: Path) -> None:
    """The same with every row as Python objects in between."""
    with pq.ParquetWriter(out, SCHEMA, write_page_checksum=True) as writer:
        for batch in pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False).iter_batches(ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(batch.to_pylist(), schema=SCHEMA))


def prepare(source: Path, out: Path, tests: HeldOut | None = None) -> None:
    """The tool's work."""
    form = openr1(system_prompt=False)
    Preparation(PreparationPlan(form, tests=tests)).write(local_files(source).batches(form.columns), out)


def prepare_against_tests(source: Path, out: Path) -> None:
    """With test problems to compare with."""
    tests = HeldOut(WORDS)
    for row, problem in enumerate(problems(TEST_PROBLEMS, 0)):
        tests.add("tests", row, problem.question)
    prepare(source, out, tests)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "pyarrow, read and write": plain,
    "the same through Python objects": as_python,
    "preparation": prepare,
    "preparation against 1,744 test problems": prepare_against_tests,
}


def measured(way: str, source: Path, out: Path) -> tuple[float, float]:
    """Seconds of processor time, and MB of memory above what was there before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before, started = peak_kb(), time.process_time()
    WAYS[way](source, out)
    return time.process_time() - started, (peak_kb() - before) / 1024


def peak_kb() -> int:
    """Most memory that the process has had."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=".") as name:
        for kind, (rows, words) in FILES.items():
            source = Path(name) / "source.parquet"
            write_problems(source, problems(rows, words), "", "train")
            print(f"{kind}: {rows:,} rows, {source.stat().st_size / 1e6:.0f} MB")
            base = None
            for way in WAYS:
                with context.Pool(1) as pool:
                    seconds, memory = pool.apply(measured, (way, source, Path(name) / "out.parquet"))
                base = base or seconds
                print(
                    f"  {way:42}{rows / seconds:10,.0f} rows/s{seconds / base:8.2f} times pyarrow's time{memory:8.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
