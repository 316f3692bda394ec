"""Batches on disk."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.batch import rows
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.errors import DataError
from megatron_hpt.files import whole, whole_folder

ROWS = [
    Row("a", 0, Source.ROLLOUT, [5, 6, 7], 1, [-0.5, -0.25], 1.0, 0.5, 1.0, 3, "stop"),
    Row("a", 0, Source.ROLLOUT, [5, 6], 1, [-0.5], None, None, 0.0, 3, "length"),
    Row("b", 1, Source.DEMONSTRATION, [5, 6, 1], 1, None, None, 1.0, 1.0, None),
    Row("c", 2, Source.DEMONSTRATION, [5, 6, 1], 1, None, 1.0, 1.0, 1.0, None, off_policy=True),
    Row("d", 3, Source.ROLLOUT, [5, 6, 7], 1, [-0.5, -0.25], 1.0, None, 1.0, 3, "stop", token_advantages=[0.5, -0.5]),
    Row("e", 4, Source.ROLLOUT, [5, 6, 7], 1, [-0.5, -0.25], 1.0, 0.5, 1.0, 3, "stop", versions=((3, 1), (4, 1))),
    Row("f", 5, Source.ROLLOUT, [5, 6, 7], 1, [-0.5, -0.25], 1.0, 0.5, 1.0, 3, "stop", routes=np.arange(8).reshape(2, 2, 2)),
]
BATCH = Batch(12, ROWS, [{"prompt_id": "a", "solved": 1}], {"rollout/accuracy": 0.5})


def test_a_batch_reads_back_equal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.has(12)
    ledger.write(BATCH)
    assert ledger.read(12) == as_read(BATCH)


def test_decisions_and_metrics_are_read_without_the_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(BATCH)
    assert ledger.read_meta(12) == (list(BATCH.decisions), BATCH.metrics)
    assert ledger.steps() == [12]


def test_a_row_has_the_role_that_the_gate_gave_it() -> None:
    roles = ["ROLLOUT", "ROLLOUT", "DEMONSTRATION", "OFF_POLICY", "ROLLOUT", "ROLLOUT", "ROLLOUT"]
    assert [row.role.name for row in ROWS] == roles


def test_the_file_is_plain_arrow(tmp_path: Path) -> None:
    Ledger(tmp_path).write(BATCH)
    with pa.memory_map(str(tmp_path / "step_000012.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("reward").to_pylist() == [1.0, None, None, 1.0, 1.0, 1.0, 1.0]
    assert table.column("policy_version").to_pylist() == [3, 3, None, None, 3, 3, 3]
    assert table.column("tokens").to_pylist() == [row.tokens.tolist() for row in ROWS]
    assert table.column("behaviour_logprobs").to_pylist()[1:3] == [[-0.5], None]
    assert table.column("versions").to_pylist()[5:7] == [[{"version": 3, "tokens": 1}, {"version": 4, "tokens": 1}], None]
    assert table.column("routes").to_pylist()[-1] == np.arange(8, dtype=np.int16).tobytes()


FORMER = pa.schema([field for field in rows.SCHEMA if field.name != "versions"])
"""The schema before rows had the versions of their tokens."""


def write_as_before(ledger: Ledger, batch: Batch, parts: int = 1) -> None:
    """Write a batch from lists, as it was done when the schema was `FORMER`."""
    records = []
    for row in batch.rows:
        values = {name: getattr(row, name) for name in FORMER.names}
        lists = {name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)}
        records.append({**values, **lists, "routes": None if row.routes is None else row.routes.tobytes()})
    table = pa.Table.from_pylist(records, schema=FORMER.with_metadata(rows.schema_of(batch).metadata))
    ledger.folder.mkdir(exist_ok=True)
    with pa.ipc.new_file(str(ledger.path(batch.step)), table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(records) // parts))


@pytest.mark.parametrize("parts", [1, 3])
def test_ledgers_without_versions_are_read(tmp_path: Path, parts: int) -> None:
    ledger = Ledger(tmp_path)
    write_as_before(ledger, BATCH, parts)
    former = [replace(row, versions=None) for row in ROWS]
    assert ledger.read(12) == as_read(replace(BATCH, rows=former))
    assert ledger.read_meta(12) == (list(BATCH.decisions), BATCH.metrics)


def test_a_table_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "step_000000.arrow"), pa.schema({"x": pa.int32()})):
        pass
    with pytest.raises(DataError, match="not a batch of this project: columns"):
        Ledger(tmp_path).read(0)


def test_a_batch_without_rows_reads_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for write in (ledger.write, lambda batch: write_as_before(ledger, batch)):
        write(Batch(3, [], [], {"x": 1}))
        assert ledger.read(3) == Batch(3, [], [], {"x": 1})


FLOATS = st.floats(width=32, allow_nan=False)


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    """A row with any of its arrays there or not, in the sizes that a batch has."""
    prompt, response = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    length = st.integers(response, response)
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=prompt + response, max_size=prompt + response))
    of_response = lambda each: st.none() | length.flatmap(lambda n: st.lists(each, min_size=n, max_size=n))  # noqa: E731
    experts = draw(st.none() | st.just(len(tokens) - 1))
    return Row(
        prompt_id=draw(st.text(max_size=5)),
        group=draw(st.integers(0, 1000)),
        source=draw(st.sampled_from(Source)),
        tokens=tokens,
        prompt_length=prompt,
        behaviour_logprobs=draw(of_response(FLOATS)),
        reward=draw(st.none() | st.floats(allow_nan=False)),
        advantage=draw(st.none() | st.floats(allow_nan=False)),
        weight=draw(st.floats(allow_nan=False)),
        policy_version=draw(st.none() | st.integers(0, 2**31 - 1)),
        finish_reason=draw(st.none() | st.sampled_from(["stop", "length"])),
        off_policy=draw(st.booleans()),
        token_advantages=draw(of_response(st.floats(allow_nan=False))),
        routes=None if experts is None else np.arange(experts * 6) % 4,
        versions=draw(st.none() | st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1).map(tuple)),
    )


@settings(max_examples=50)
@given(given_rows=st.lists(any_row(), max_size=7), part_bytes=st.sampled_from([1, 100, 2**28]))
def test_any_row_reads_back(tmp_path_factory: pytest.TempPathFactory, given_rows: list[Row], part_bytes: int) -> None:
    ledger, batch = Ledger(tmp_path_factory.mktemp("ledger")), Batch(0, given_rows)
    with mock.patch.object(rows, "PART_BYTES", part_bytes):
        ledger.write(batch)
    assert ledger.read(0) == as_read(batch)


def as_read(batch: Batch) -> Batch:
    """A batch as it comes from a ledger: lists for tuples, and flat routes."""
    flat = [replace(row, routes=None if row.routes is None else row.routes.reshape(-1)) for row in batch.rows]
    return Batch(batch.step, flat, list(batch.decisions), batch.metrics)


def test_rows_differ_in_any_field() -> None:
    row = ROWS[0]
    assert row == replace(row)
    other = {
        "tokens": [5, 6, 8],
        "behaviour_logprobs": None,
        "versions": ((3, 2),),
        "reward": 0.0,
        "token_advantages": [0.5, 1.0],
    }
    assert [name for name, value in other.items() if row == replace(row, **{name: value})] == []
    assert row != "a row"


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    sizes = [next(line for line in lines[start:] if line.startswith("Rss:")) for start in starts]
    return sum(int(size.split()[1]) * 1024 for size in sizes)


def test_only_rows_that_are_used_are_read_from_the_file(tmp_path: Path) -> None:
    """A rank knows lengths, weights and roles of all rows, and has the arrays of its own: those stay in the file until then."""
    tokens, routes = np.arange(4097), np.zeros((4096, 64), np.int16)
    row = Row("a", 0, Source.ROLLOUT, tokens, 1, np.zeros(4096), 1.0, None, 1.0, 3, "stop", False, np.zeros(4096), routes)
    ledger = Ledger(tmp_path)
    ledger.write(Batch(0, [row] * 64))
    size = ledger.path(0).stat().st_size
    assert size > 64 * routes.nbytes
    read = ledger.read(0).rows
    assert [(len(r.tokens), r.response_length, r.role, r.is_estimated, r.weight) for r in read] == [
        (4097, 4096, row.role, True, 1.0)
    ] * 64
    assert resident_bytes(ledger.path(0)) < 0.05 * size
    assert all(read[0].tokens == tokens)
    assert not read[0].routes.any()
    assert 0.01 * size < resident_bytes(ledger.path(0)) < 0.1 * size
    assert not read[0].tokens.flags.owndata
    assert not read[0].tokens.flags.writeable


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not arrow"])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(BATCH)
    path = ledger.path(12)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"step_000012\.arrow: cannot be read as a batch"):
        ledger.read(12)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_folder_leaves_nothing_and_an_existing_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as temporary:  # noqa: PT012
        (temporary / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "first").touch()
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "first"]
