"""Loading a large data set: memory, time to the first batch, seconds of the check; beside pyarrow reading the same columns, and
for JSONL beside Python's json.

    .venv/bin/python benchmarks/stream_data.py [--rows 1000000] [--demonstration 500] [--folder DIR]

Each measurement is a process of its own. The tokenizer is one of bytes, so that reading is measured and not tokenising.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, BATCHES = 128, 400


def write(path: Path, rows: int, width: int, group: int) -> None:
    """A file of the project's schema with prompts of about 200 bytes and demonstrations of about `width`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megatron_hpt.data.storage.formats import MESSAGES

    random = np.random.default_rng(0)
    words = np.array([f"w{index:x}" for index in range(5000)])
    texts = [" ".join(words[random.integers(0, 5000, max(40, width // 4))]) for _ in range(64)]
    record = [("style", pa.string()), ("ground_truth", pa.string())], [("split", pa.string()), ("index", pa.string())]
    columns = [
        ("prompt", MESSAGES),
        ("target", MESSAGES),
        *zip(("reward_model", "extra_info"), map(pa.struct, record), strict=True),
    ]
    schema = pa.schema([("data_source", pa.string()), *columns])

    def part(first: int, last: int) -> pa.Table:
        numbers = range(first, last)

        def messages(role: str, contents: list[str]) -> pa.Array:
            each = pa.StructArray.from_arrays([pa.array([role] * len(contents)), pa.array(contents)], names=["role", "content"])
            return pa.ListArray.from_arrays(pa.array(np.arange(len(contents) + 1, dtype=np.int32)), each)

        arrays = [
            pa.array(["words"] * len(numbers)),
            messages("user", [f"{number} {texts[number % 64][:200]}" for number in numbers]),
            messages("assistant", [f"{number} {texts[number * 7 % 64][:width]}" for number in numbers]),
            pa.array([{"style": "rule", "ground_truth": str(number)} for number in numbers]),
            pa.array([{"split": "train", "index": f"words-{number}"} for number in numbers]),
        ]
        return pa.table(arrays, schema=schema)

    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, max(group, 10_000)):
            last = min(rows, first + max(group, 10_000))
            parts = [part(start, min(last, start + 10_000)) for start in range(first, last, 10_000)]
            writer.write_table(pa.concat_tables(parts), row_group_size=group)


def write_lines(source: Path, path: Path) -> None:
    """The rows of a parquet file as JSONL."""
    import pyarrow.parquet as pq

    with path.open("w", encoding="utf-8") as out:
        for batch in pq.ParquetFile(source).iter_batches(4096):
            out.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


class Bytes:
    """A tokenizer that costs nothing."""

    eos_token_id = 0

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return conversation[-1]["content"]

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


def mib(key: str) -> float:
    """Of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return int(dict(line.split(":", 1) for line in status)[key].split()[0]) / 1024


def take(path: str) -> dict[str, float]:
    """The coordinator's part: batches from the first one on."""
    from megatron_hpt.data.problem_set import ProblemSet
    from megatron_hpt.data.prompts import LengthLimits, PromptReader
    from megatron_hpt.data.source import PromptSource

    before, started, position, seconds = mib("VmRSS"), time.monotonic(), 0, []
    source = PromptSource([ProblemSet(path)], [1.0], PromptReader(Bytes(), LengthLimits(10**6, 10**6)), seed=0)
    for _ in range(BATCHES):
        position = source.take(position, BATCH).next_position
        seconds.append(time.monotonic() - started)
    later = sorted(b - a for a, b in itertools.pairwise(seconds))
    return {"first": seconds[0], "median": later[len(later) // 2], "worst": later[-1], "memory": mib("VmHWM") - before}


def check(path: str) -> dict[str, float]:
    """What is done before anything starts."""
    from megatron_hpt.data.problem_set import ProblemSet
    from megatron_hpt.data.scan import scan

    before, started = mib("VmRSS"), time.monotonic()
    scan([ProblemSet(path)])
    return {"seconds": time.monotonic() - started, "memory": mib("VmHWM") - before}


def stream(path: str) -> dict[str, float]:
    """The same columns decoded by pyarrow, batch by batch, or all lines by json, and nothing done with them."""
    import pyarrow.parquet as pq

    from megatron_hpt.data.storage.columns import READ

    before, started = mib("VmRSS"), time.monotonic()
    if path.endswith(".jsonl"):
        with open(path, "rb") as lines:
            for line in lines:
                json.loads(line)
        return {"seconds": time.monotonic() - started, "memory": mib("VmHWM") - before}
    file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    columns = [column for column in READ if column != "target_lst"]
    for _ in file.iter_batches(4096, columns=columns, use_threads=False):
        pass
    return {"seconds": time.monotonic() - started, "memory": mib("VmHWM") - before}


MEASURED = {"take": take, "check": check, "stream": stream}


def measured(what: str, path: Path) -> dict[str, float]:
    """One measurement in a new process, which has imported everything before it begins."""
    done = subprocess.run([sys.executable, __file__, "--measure", what, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--demonstration", type=int, default=500, help="bytes")
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary one")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        import megatron_hpt.data.source  # noqa: F401 (not part of the measurement)

        what, path = arguments.measure
        print(json.dumps(MEASURED[what](path)))
        return
    header = ("rows a group", "file MB", "first batch s", "batch ms (worst)", "MiB", "check s", "× decoding alone", "MiB")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        parquet, lines = (Path(folder) / f"data.{suffix}" for suffix in ("parquet", "jsonl"))
        for group in (1000, 10_000, arguments.rows, "JSONL"):
            path = lines if group == "JSONL" else parquet
            if group == "JSONL":
                write_lines(parquet, lines)
            else:
                write(parquet, arguments.rows, arguments.demonstration, group)
            taken, checked, alone = (measured(what, path) for what in MEASURED)
            print(
                f"| {group} | {path.stat().st_size / 1e6:.0f} | {taken['first']:.2f} | {1e3 * taken['median']:.0f} "
                f"({1e3 * taken['worst']:.0f}) | {taken['memory']:.0f} | {checked['seconds']:.1f} "
                f"| {checked['seconds'] / alone['seconds']:.1f} | {checked['memory']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
