"""Batches on disk."""

from pathlib import Path

import pyarrow as pa
import pytest

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
]
BATCH = Batch(12, ROWS, [{"prompt_id": "a", "solved": 1}], {"rollout/accuracy": 0.5})


def test_a_batch_reads_back_equal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.has(12)
    ledger.write(BATCH)
    assert ledger.read(12) == BATCH


def test_decisions_and_metrics_are_read_without_the_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(BATCH)
    assert ledger.read_meta(12) == (list(BATCH.decisions), BATCH.metrics)
    assert ledger.steps() == [12]


def test_a_row_has_the_role_that_the_gate_gave_it() -> None:
    roles = ["ROLLOUT", "ROLLOUT", "DEMONSTRATION", "OFF_POLICY", "ROLLOUT"]
    assert [row.role.name for row in ROWS] == roles


def test_the_file_is_plain_arrow(tmp_path: Path) -> None:
    Ledger(tmp_path).write(BATCH)
    with pa.memory_map(str(tmp_path / "step_000012.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("reward").to_pylist() == [1.0, None, None, 1.0, 1.0]
    assert table.column("policy_version").to_pylist() == [3, 3, None, None, 3]


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
