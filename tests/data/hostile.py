"""Files as nobody should write them, by number, and the process that has the product read them.

    python -m tests.data.hostile FOLDER FIRST LAST

For every file it prints its number and what became of it. A traceback, an error that names no file, and ten seconds without an
end are failures.
"""

from __future__ import annotations

import datetime
import decimal
import faulthandler
import importlib.util
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.data.prompts import LengthLimits, PromptReader
from megatron_hpt.data.scan import scan
from megatron_hpt.data.source import files, open_sets
from megatron_hpt.errors import HptError
from megatron_hpt.evaluation.problems import load_problems

from .problems import row

DEADLINE_S = 10
"""Of the processor; six times as long by the clock, since others may have the machine too."""
MOST = 3000
"""Characters of a sentence."""
ROOT = Path(__file__).parents[2]
DEPTHS = (5, 100, 900, 990, 1100, 100_000)


class Letters:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return "\n".join(message["role"] + ":" + message["content"] for message in conversation)

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return bytes(tokens).decode()


def odd(draw: random.Random, depth: int = 0) -> Any:
    """A value of any kind that JSON has."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.choice([True, False, 0, -1, 2**63, 10**30, 1.5, float("nan"), float("inf"), 1e300]),
        lambda: draw.choice(["", " ", "x", "\u2003", "2024-01-01", "2024-01-01T00:00:00Z", "\ud800", "\0", "🙂" * 50, "proof"]),
        lambda: "y" * draw.choice([10, 10_000, 5_000_000 if draw.random() < 0.1 else 1000]),
        lambda: [odd(draw, depth + 1) for _ in range(draw.randint(0, 3))],
        lambda: {draw.choice(["role", "content", "index", "ground_truth", "a.b", ""]): odd(draw, depth + 1) for _ in range(2)},
    ]
    return draw.choice(kinds[: 4 if depth > 3 else None])()


def odd_row(draw: random.Random, number: int) -> dict[str, Any]:
    """A row of which some field is something else, on one level or another."""
    found = row(number)
    field = draw.choice([*found, "target_lst", "unknown"])
    inner = found.get(field)
    if isinstance(inner, list) and draw.random() < 0.5:
        inner[0][draw.choice(["role", "content", "more"])] = odd(draw)
    elif isinstance(inner, dict) and draw.random() < 0.5:
        inner[draw.choice([*inner, "level"])] = odd(draw)
    elif draw.random() < 0.1:
        del found[draw.choice(list(found))]
    else:
        found[field] = odd(draw)
    return found


def nested(draw: random.Random) -> bytes:
    """A line that goes deep."""
    depth, (opening, closing) = draw.choice(DEPTHS), draw.choice([("[", "]"), ('{"a":', "}")])
    deep = opening * depth + "1" + (closing * depth if draw.random() < 0.7 else "")
    text = json.dumps(row(0))
    where = draw.choice(['"0+1"', '"p0"', '"even"', '"1"', text])
    return text.replace(where, deep, 1).encode()


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, doubled, zeroed, exchanged, put behind."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 20])):
        start, length = draw.randrange(len(data) + 1), draw.choice([1, 4, 100, 5000])
        match draw.randrange(6):
            case 0:
                data[start : start + length] = bytes(draw.randrange(256) for _ in data[start : start + min(length, 8)])
            case 1:
                del data[start:]
            case 2:
                data[start:start] = data[start : start + length]
            case 3:
                data[start : start + length] = bytes(len(data[start : start + length]))
            case 4:
                del data[start : start + length]
            case 5:
                data += draw.choice([b"\0", b"\xff", b"{", b"[", b"}\n", b"PAR1"]) * draw.choice([1, 1000])
    return bytes(data)


def lines(draw: random.Random) -> bytes:
    """A file of lines, or what somebody took for one."""
    rows = [odd_row(draw, number) if draw.random() < 0.2 else row(number) for number in range(draw.choice([1, 3, 30, 500]))]
    indent, is_array = draw.choice([None, None, None, 1]), draw.random() < 0.2
    end = draw.choice(["\n", "\n", "\n\n", "\r\n", "", " ", "\r"])
    text = json.dumps(rows, indent=indent) if is_array else end.join(json.dumps(each, indent=indent) for each in rows)
    content = text.encode(draw.choice(["utf-8"] * 10 + ["utf-8-sig", "utf-16", "utf-32"]))
    if draw.random() < 0.3:
        content += b"\n" + nested(draw)
    if draw.random() < 0.2:
        content += b"\n" + draw.choice([b"null", b"[]", b"{}", b"1", b'"', b"\0" * 50, b"\xef\xbb\xbf{}", b"NaN", b"9" * 5000])
    return damaged(draw, content) if draw.random() < 0.5 else content


TEXTS = ["a", "", None, "\u2003", "proof", "b" * 1000]
EPOCH = datetime.datetime(2024, 1, 1)
COLUMNS: list[Callable[[], pa.Array]] = [
    lambda: pa.array(TEXTS),
    lambda: pa.array(TEXTS, pa.large_string()),
    lambda: pa.array(TEXTS, pa.string_view()),
    lambda: pa.array(TEXTS).dictionary_encode(),
    lambda: pa.array([text and text.encode() for text in TEXTS], pa.binary()),
    lambda: pa.Array.from_buffers(
        pa.string(), 6, pa.array([b"\xff", b"ok", b"\x80", b"", b"x", b"\xc3"], pa.binary()).buffers()
    ),
    lambda: pa.nulls(6),
    lambda: pa.array([1, None, -1, 2**62, 0, 5]),
    lambda: pa.array([1.0, float("nan"), None, float("inf"), -0.0, 2.5]),
    lambda: pa.array([1, 2, 3, 4, 5, None], pa.float16()),
    lambda: pa.array([True, None] * 3),
    lambda: pa.array([EPOCH] * 6, pa.timestamp("ns", "Europe/Berlin")),
    lambda: pa.array([2**62, -(2**62), 0, 1, None, 2], pa.int64()).cast(pa.timestamp("ms"), safe=False),
    lambda: pa.array([2**62, -(2**62), 0, 1, None, 2], pa.int64()).cast(pa.timestamp("us"), safe=False),
    lambda: pa.array([2**31 - 1, -(2**31), 0, 1, None, 2], pa.int32()).cast(pa.date32()),
    lambda: pa.array([1] * 6, pa.duration("ns")),
    lambda: pa.array([1, 2, 86399 * 10**9 + 7, 4, 5, None], pa.time64("ns")),
    lambda: pa.array([decimal.Decimal("1.5")] * 6, pa.decimal256(70, 5)),
    lambda: pa.array([[("k", 1), ("k", 2)], [], None] * 2, pa.map_(pa.string(), pa.int64())),
    lambda: pa.array([TEXTS, [], None] * 2),
    lambda: pa.array([TEXTS, [], None] * 2, pa.list_view(pa.string())),
    lambda: pa.array([["a", "b"], None] * 3, pa.list_(pa.string(), 2)),
    lambda: pa.array([[[]], [None], None] * 2, pa.list_(pa.list_(pa.list_(pa.string())))),
    lambda: pa.array([{"role": "user", "content": "x"}, None] * 3),
    lambda: pa.array([[{"role": "user", "content": text}] for text in TEXTS]),
    lambda: pa.array([[{"role": 1, "content": ["x"]}]] * 6),
    lambda: pa.array([[{"role": "user", "content": "x", "calls": [{"a": {"b": [1]}}]}, None], None] * 3),
    lambda: pa.array([[[{"role": "user", "content": "x"}], [], None], None] * 3),
    lambda: pa.array([{"ground_truth": "1", "index": "x", "level": 3}, None] * 3),
    lambda: pa.array([{"ground_truth": 1, "index": 1.5, "level": EPOCH}, None] * 3),
    lambda: pa.array([{"ground_truth": {"a": "1"}, "index": [1], "level": {"a": None}}] * 6),
    lambda: pa.array([[[[[[[[["x"]]]]]]]]] * 6),
]


def table(draw: random.Random) -> bytes:
    """A parquet file; of 6 rows where its columns are odd ones."""
    data = pa.Table.from_pylist([row(number) for number in range(draw.choice([0, 6, 6, 6, 3000]))])
    if data.num_rows == 6:
        for _ in range(draw.choice([0, 1, 1, 2])):
            name, column = draw.choice([*data.schema.names, "target_lst", "a.b"]), draw.choice(COLUMNS)()
            place = data.schema.get_field_index(name)
            is_new = place < 0 or draw.random() < 0.1  # twice of one name
            data = data.append_column(name, column) if is_new else data.set_column(place, name, column)
        if draw.random() < 0.1:
            data = data.select(draw.sample(range(data.num_columns), 2))
    sink = pa.BufferOutputStream()
    pq.write_table(
        data,
        sink,
        row_group_size=draw.choice([2, 1000]) if data.num_rows == 6 else 1000,
        compression=draw.choice(["none", "snappy", "zstd"]),
        use_dictionary=draw.random() < 0.5,
        write_page_checksum=draw.random() < 0.3,
        store_schema=draw.random() < 0.7,
    )
    content = sink.getvalue().to_pybytes()
    return damaged(draw, content) if draw.random() < 0.5 else content


def write(folder: Path, number: int) -> Path:
    """The file of a number."""
    draw = random.Random(f"hostile {number}")
    suffix = draw.choice([".parquet", ".parquet", ".jsonl", ".jsonl", ".json"])
    content = table if (suffix == ".parquet") != (draw.random() < 0.05) else lines
    path = folder / f"{number}{suffix}"
    path.write_bytes(content(draw))
    return path


def train(path: Path) -> str:
    """What is done with training data before the first step, and for it."""
    config = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train=str(path)))
    sets, reader, counts = open_sets(config), PromptReader(Letters(), LengthLimits(9999, 9999, "drop", "drop")), Counter[str]()
    found = scan(sets, lambda each: (reader.read(each, 0.5, counts), reader.texts(each)), 64)
    for index in range(min(5, found.rows)):
        reader.read(sets[0].row(index), 0.0, counts)
    json.dumps(files(config))
    return f"{found.rows} rows"


def evaluate(path: Path) -> str:
    """A test set."""
    return f"{len(load_problems(path, Letters()))} problems"


def prepared(tool: Any, *arguments: str) -> Callable[[Path], str]:
    """A command of tools/prepare_data.py."""

    def prepare(path: Path) -> str:
        command, *mapping = arguments
        result = CliRunner().invoke(tool.app, [command, str(path), str(path.parent / "out.parquet"), *mapping])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output.splitlines()[0]

    return prepare


def main(folder: Path, first: int, last: int) -> None:
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools" / "prepare_data.py")
    tool = sys.modules["prepare_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    roles = ("prompt=prompt", "answer=reward_model.ground_truth", "demonstration=target", "id=extra_info.index", "--box")
    uses = (
        train,
        evaluate,
        prepared(tool, "openr1"),
        prepared(tool, "columns", *roles),
        prepared(tool, "columns", "prompt=prompt", "answer=a.b"),
    )
    failed = 0
    for number in range(first, last):
        path = write(folder, number)
        for use in uses:
            faulthandler.dump_traceback_later(6 * DEADLINE_S, exit=True)
            started = time.process_time()
            try:
                became = use(path)
            except (HptError, OSError) as error:
                became = f"{type(error).__name__}: {error}"
                if str(path) not in became or len(became) > MOST:
                    failed = print(f"{number} {use.__name__}: no sentence with a path: {became[:MOST]}") or 1
            except Exception:
                became = "FAILED"
                failed = print(f"{number} {path.suffix} {use.__name__}: {traceback.format_exc()}") or 1
            faulthandler.cancel_dump_traceback_later()
            if (seconds := time.process_time() - started) > DEADLINE_S:
                failed = print(f"{number} {use.__name__}: took {seconds:.0f} s") or 1
            print(number, path.suffix, use.__name__, ascii(became), flush=True)
        path.unlink()
    sys.exit(failed)


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
