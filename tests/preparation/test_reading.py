"""Files as they are, and as they should not be: an error or a damaged record, with file and row."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hpt.data.storage import locations
from megatron_hpt.errors import DataError
from megatron_hpt.preparation import hub, reading
from megatron_hpt.preparation.reading import BATCH, Files, Record, local_files

ROWS = [{"question": f"{number}+1", "answer": number + 1} for number in range(BATCH + 7)]


def records(files: Files, columns: list[str] | None = None) -> list[Record]:
    return [record for batch in files.batches(columns) for record in batch.records]


def as_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=500, write_page_checksum=True)
    return path


def as_array(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def as_lines(path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("write", "name"), [(as_parquet, "a.parquet"), (as_array, "a.json"), (as_lines, "a.jsonl"), (as_lines, "a.json")]
)
def test_every_row_is_read_with_its_place(tmp_path: Path, write, name: str) -> None:
    path = write(tmp_path / name)
    found = records(local_files(path))
    assert [record.fields for record in found] == ROWS
    assert [(record.file, record.row) for record in found] == [(str(path), row) for row in range(len(ROWS))]
    done = sum(batch.nbytes for batch in local_files(path).batches())
    assert done == pytest.approx(path.stat().st_size, rel=0.01)


def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path) -> None:
    assert records(local_files(as_parquet(tmp_path / "a.parquet")), ["answer"])[0].fields == {"answer": 1}


def test_a_damaged_row_group_is_named_with_its_rows(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "a.parquet")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 60 : start + 64] = b"\xff\x00\xff\x00"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, row group 1 \(rows 500 to 999\): damaged: .*; fetch the file again"):
        records(local_files(path))


@pytest.mark.parametrize("name", ["a.parquet", "a.json"])
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    path = {"a.parquet": as_parquet, "a.json": as_array}[name](tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file|a\.json, row 51\d: damaged"):
        records(local_files(path))


@pytest.mark.parametrize("content", [b"", b"[]", b" \n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: has no rows"):
        records(local_files(tmp_path / "a.json"))


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has no rows"):
        records(local_files(tmp_path / "a.parquet"))


def test_a_broken_line_is_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n{}\n")
    found = records(local_files(tmp_path / "a.jsonl"))
    assert [record.row for record in found] == [0, 2, 3, 4, 5, 6]
    assert [record.damage.partition(":")[0] for record in found] == [
        "",
        "not JSON",
        "a list, expected a record of named fields",
        "not UTF-8",
        "not JSON that can be read",
        "",
    ]


NESTED = b"[" * 900 + b"]" * 900
LONG = b'{"a": "' + b"x" * (5 << 20) + b'"}'


@pytest.mark.parametrize(
    ("content", "damages", "end"),
    [
        (b'\xef\xbb\xbf [{"a": 1}, null, 2,\n' + NESTED + b"]", ["", "null,", "a int,", "a list,"], None),
        (b"[" + LONG + b"," + LONG + b', {"a": 1e5}]', ["", "", ""], None),
        (b'[{"a": "2024-01-01", "b": NaN}]\n \n', [""], None),
        (b'[{"a": 1}', [""], "row 1: damaged: the file is cut off"),
        (b'[{"a": 1}, {"a": "x', [""], "row 1: damaged: the file is cut off"),
        (b'[{"a": 1} {"a": 2}]', [""], "row 1: damaged: not JSON: no comma"),
        (b'[{"a": 1}]{"a": 2}', [""], "row 1: damaged: not JSON: something stands behind the array"),
        (b'[{"a": 1}, {a: 2}' + b" " * 100 + b"]", [""], "row 1: damaged: not JSON: Expecting property name"),
        (b'[{"a": 1}, {"a": "\xff"}]', [], "row 0: damaged: not UTF-8"),
        (b'[{"a": 1}, ' + b"[" * 10**6, [""], "row 1: damaged: .* nested too deeply"),
        (b'[{"a": 1}, {"a": ' + b"9" * 5000 + b"}]", [""], "row 1: damaged: not JSON that can be read: Exceeds"),
        (b"\x1f\x8b\x08", [], "compressed with gzip; gunzip"),
        (b"\xff\xfe{", [], "text in UTF-16; iconv"),
        (b'{"a": 1}\n{"a": 2}{"a": 3}\nnull', ["", "two objects on one line", "null,"], None),
        (b'{\n  "a": 1\n}', ["not JSON: the object does not end on its line: ", "not JSON", "not JSON"], None),
    ],
)
def test_no_content_of_a_json_file_is_more_than_a_sentence(
    tmp_path: Path, content: bytes, damages: list[str], end: str | None
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    found: list[Record] = []
    with pytest.raises(DataError, match=end) if end else contextlib.nullcontext():
        for record in _as_they_come(tmp_path / "a.json"):
            found.append(record)
    assert len(found) == len(damages)
    assert all(record.damage.startswith(damage) for record, damage in zip(found, damages, strict=True))


def _as_they_come(path: Path) -> Iterator[Record]:
    """One by one: a batch that breaks off is lost with the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BATCH", 1)
        for batch in local_files(path).batches():
            yield from batch.records


def test_text_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    texts = [b"fine", b"ok", b"\xff\xfe", b"good"]
    column = pa.Array.from_buffers(pa.string(), 4, pa.array(texts, pa.binary()).buffers())
    pq.write_table(pa.table({"question": column}), tmp_path / "a.parquet")
    found = records(local_files(tmp_path / "a.parquet"))
    assert [record.damage.partition(":")[0] for record in found] == ["", "", "text that is not UTF-8", ""]
    assert [record.row for record in found] == [0, 1, 2, 3]


def test_a_folder_is_read_by_name_and_not_across_splits(tmp_path: Path) -> None:
    for name in ("train-1.parquet", "train-0.parquet", "_notes.jsonl"):
        as_parquet(tmp_path / name)
    assert [path.name for path in local_files(tmp_path).paths] == ["train-0.parquet", "train-1.parquet"]
    as_parquet(tmp_path / "test-0.parquet")
    with pytest.raises(DataError, match=r"several splits \(test: test-0\.parquet, train: train-0\.parquet\); name one"):
        local_files(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train/0.jsonl", "test/0.jsonl"),
        ("main/train/a.jsonl", "main/held_out/a.jsonl"),
        ("gsm8k-train.jsonl", "gsm8k_test.jsonl"),
        ("TRAIN.jsonl", "x/validation-00000-of-00001.jsonl"),
        ("train.jsonl", "heldout.jsonl"),
    ],
)
def test_folders_name_splits_too(tmp_path: Path, one: str, other: str) -> None:
    """Of what is prepared and of what is trained."""
    for name in (one, other):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        as_lines(tmp_path / name)
    for find in (local_files, lambda folder: locations.find(str(folder))):
        with pytest.raises(DataError, match=r"has files of several splits \(.*; name one"):
            find(tmp_path)
    assert len(locations.find(f"{tmp_path}/**/*.jsonl")) == 2  # a pattern says what it means


def test_what_only_sounds_like_a_split_is_none(tmp_path: Path) -> None:
    for name in ("train/latest-contest.jsonl", "train/test_of_time.jsonl", "evaluated.jsonl", "trainer.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        as_lines(tmp_path / name)
    assert len(local_files(tmp_path).paths) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", r"none\.parquet: no such file or folder$"),
        ("a.csv", r"a\.csv: not a kind of file that is read; allowed: \.parquet, \.json, \.jsonl"),
        ("empty", "empty: no file in it ends in"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.csv").write_text("question,answer")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        hub.find(str(tmp_path / name))


def test_a_missing_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    files = local_files(as_parquet(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: no column 'answers'; it has question, answer; did you mean 'answer'\?"):
        files.require(["question", "answers"])


def test_without_a_network_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"someone/something: no such file or folder here, and .*; fetch it on a machine with"):
        hub.find("someone/something")


def test_a_dataset_in_the_hubs_cache_is_found_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "datasets--someone--something"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for split in ("train", "test"):
        (folder / "snapshots" / ("0" * 40) / "main").mkdir(parents=True, exist_ok=True)
        as_parquet(folder / "snapshots" / ("0" * 40) / "main" / f"{split}-0.parquet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert [path.name for path in hub.find("someone/something/main/train*").paths] == ["train-0.parquet"]
    with pytest.raises(DataError, match="several splits"):
        hub.find("someone/something")
