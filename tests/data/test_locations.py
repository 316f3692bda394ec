"""Which files a data set's paths mean, on real filesystems."""

from pathlib import Path

import fsspec
import pytest

from megatron_hpt.data.problem_set import ProblemSet
from megatron_hpt.data.storage.locations import find
from megatron_hpt.errors import DataError

from .problems import row, write

FILES = (
    "b.parquet",
    "a.parquet",
    "deep/er/c.jsonl",
    "deep/d.parquet",
    "_SUCCESS",
    ".hidden.parquet",
    "notes.txt",
    "_tmp/e.parquet",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", ["a.parquet", "b.parquet", "deep/d.parquet", "deep/er/c.jsonl"]),
        ("/a.parquet", ["a.parquet"]),
        ("/*.parquet", ["a.parquet", "b.parquet"]),
        ("/**/*.parquet", ["_tmp/e.parquet", "a.parquet", "b.parquet", "deep/d.parquet"]),
        ("/d*/*.parquet", ["deep/d.parquet"]),
        ("/notes.txt", ["notes.txt"]),  # named, so meant
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_a_folder_or_a_pattern(folder: Path, path: str, found: list[str], scheme: str) -> None:
    base = f"{scheme}{folder}"
    assert [location.name for location in find(base + path)] == [f"{base}/{name}" for name in found]


def test_relative_paths_mean_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert [location.name for location in find("data/*.parquet")] == [f"data/{name}" for name in ("a.parquet", "b.parquet")]
    monkeypatch.chdir(folder)
    assert [location.name for location in find(["b.parquet", "*.txt"])] == ["b.parquet", "notes.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.parquet", "no such file; expected a parquet or JSONL file of prompts, a folder or a pattern"),
        ("data/*.json", "no such file"),
        ("nowhere/*.parquet", "no such file"),
        ("nosuch://bucket/a.parquet", "no filesystem for nosuch://: Protocol not known"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError, match=message):
        find(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without any"):
        find(str(tmp_path))


def test_a_filesystem_of_fsspec_is_read(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for part in range(2):
        write(tmp_path / f"{part}.parquet", [row(number) for number in range(10 * part, 10 * part + 10)], group=4)
        filesystem.pipe(f"/bucket/{part}.parquet", (tmp_path / f"{part}.parquet").read_bytes())
    try:
        for path in (
            "memory://bucket",
            "memory://bucket/*.parquet",
            ["memory://bucket/0.parquet", "memory://bucket/1.parquet"],
        ):
            problems = ProblemSet(path)
            assert [problems.row(index).prompt_id for index in range(20)] == [f"p{number}" for number in range(20)]
            assert problems.row(13).where == "memory://bucket/1.parquet, row 3"
    finally:
        filesystem.rm("/bucket", recursive=True)
