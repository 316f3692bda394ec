"""Rows at any place, in constant memory; files that are damaged, empty, or repeat themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from megatron_hpt.data import problem_set
from megatron_hpt.data.order import BlockLayout
from megatron_hpt.data.problem_set import ProblemSet
from megatron_hpt.data.scan import scan
from megatron_hpt.data.storage import lines
from megatron_hpt.data.storage.blocks import Block
from megatron_hpt.data.storage.locations import Location
from megatron_hpt.errors import DataError

from .problems import row, write

ROWS = [row(number) for number in range(57)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three files: two of parquet with row groups of 10 and of 100 rows, one of lines."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "0.parquet", ROWS[:25], group=10)
    write(folder / "1.parquet", ROWS[25:40], group=100)
    (folder / "2.jsonl").write_text("\n\n".join(map(json.dumps, ROWS[40:])))
    return folder


@given(order=st.permutations(range(57)), large=st.booleans())
def test_rows_are_the_same_in_any_order_of_asking(files: Path, order: list[int], large: bool) -> None:
    """Also those of blocks that are read only as far as they are needed."""
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(problem_set, "LARGE_BYTES", 0)
            patch.setattr(problem_set, "_OPEN_BLOCKS", 1)
            patch.setattr(lines, "BLOCK_BYTES", 1000)
        problems = ProblemSet(str(files))
        found = {index: problems.row(index) for index in order}
    for index, expected in enumerate(ROWS):
        fields = found[index].fields
        assert {name: fields[name] for name in ("prompt", "target", "data_source")} == {
            name: expected[name] for name in ("prompt", "target", "data_source")
        }
        assert fields["reward_model"]["ground_truth"] == expected["reward_model"]["ground_truth"]
        assert found[index].prompt_id == f"p{index}"
    assert found[24].where == f"{files}/0.parquet, row 24"
    assert found[25].where == f"{files}/1.parquet, row 0"


def test_a_set_larger_than_a_window_has_several(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [range(0, 10), range(10, 20), range(20, 25), range(25, 40), range(40, 57)]
    assert ProblemSet(str(files)).layout == BlockLayout(blocks, [], 1)
    sizes = [block.bytes for block in ProblemSet(str(files)).blocks]
    monkeypatch.setattr(problem_set, "WINDOW_BYTES", sum(sizes) // 2 + 1)
    assert ProblemSet(str(files)).layout == BlockLayout(blocks, [], 2)
    monkeypatch.setattr(problem_set, "LARGE_BYTES", sizes[-1] - 1)
    assert ProblemSet(str(files)).layout == BlockLayout(blocks[:-1], blocks[-1:], 2)
    monkeypatch.setattr(problem_set, "WINDOW_BYTES", 1)
    assert ProblemSet(str(files)).layout.windows == 57


def test_rows_without_an_id_have_one_of_their_own(tmp_path: Path) -> None:
    bare = [{name: each[name] for name in ("prompt", "reward_model")} for each in ROWS[:3]]
    one, two = (write(tmp_path / f"{name}.parquet", bare, group=2) for name in "ab")
    assert [ProblemSet(one).row(index).prompt_id for index in range(3)] == ["0", "1", "2"]
    both = ProblemSet([one, two], prefix="1/")
    assert [both.row(index).prompt_id for index in range(6)] == ["1/0:0", "1/0:1", "1/0:2", "1/1:0", "1/1:1", "1/1:2"]
    assert scan([both]).rows == 6


def test_numbers_are_ids_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [row(number, extra_info={"index": number}) for number in range(3)])
    assert ProblemSet(path).row(2).prompt_id == "2"
    write(tmp_path / "b.parquet", [row(2, extra_info={"index": "2"})])
    with pytest.raises(DataError, match=r"b\.parquet, row 0, extra_info\.index: '2' is also the id of .*a\.parquet, row 2"):
        scan([ProblemSet(str(tmp_path))])


def test_an_id_that_a_row_without_one_has_already_is_found(tmp_path: Path) -> None:
    rows = [row(0, extra_info={"index": None}), row(1, extra_info={"index": "0"})]
    with pytest.raises(DataError, match=r"row 1, extra_info\.index: '0' is also the id of row 0"):
        scan([ProblemSet(write(tmp_path / "a.parquet", rows))])


def test_the_same_file_twice_is_named_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", ROWS)
    sets = [ProblemSet(str(tmp_path / f"{name}.parquet")) for name in ("a", "b")]
    with pytest.raises(DataError, match=r"b\.parquet, row 0, extra_info\.index: 'p0' is also the id of .*a\.parquet, row 0"):
        scan(sets)


def test_a_scan_tells_what_there_is(files: Path) -> None:
    looked: list[str] = []
    advanced: list[int] = []
    found = scan([ProblemSet(str(files))], lambda each: looked.append(each.where.rpartition("/")[2]), 4, advanced.append)
    assert (found.rows, found.demonstrations, found.data_sources) == (57, 57, {"even", "odd"})
    assert sum(advanced) == 57
    assert looked == ["0.parquet, row 0", "0.parquet, row 15", "1.parquet, row 5", "2.jsonl, row 5"]


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    rows[17] = row(17, prompt=None)
    rows[30] = row(30, reward_model=None)
    rows[31] = row(31, target=[{"role": "assistant", "content": None}])
    path = write(tmp_path / "a.parquet", rows, group=10)
    with pytest.raises(DataError, match=r"a\.parquet, row 17, prompt: given None; .* \(2 more rows cannot be used either\)"):
        scan([ProblemSet(path)])


BLANK = st.sampled_from(["", " ", "\n\t", "\u2003", "\x1c", "\x85", "\u200b", "a", "é", " x ", None])
CHAT = st.none() | st.lists(st.fixed_dictionaries({"role": BLANK, "content": BLANK}), max_size=2)


@given(
    prompt=CHAT,
    target=CHAT,
    several=st.none() | st.lists(CHAT.filter(lambda chat: chat is not None), max_size=2),
    truth=BLANK,
)
def test_a_scan_finds_what_taking_a_row_would_refuse(tmp_path_factory, prompt, target, several, truth) -> None:
    """So nothing that is wrong with a row is left for the middle of a run."""
    from megatron_hpt.data.fields import check_row
    from megatron_hpt.data.storage.columns import doubtful
    from megatron_hpt.data.storage.formats import MESSAGES

    each = {"prompt": prompt, "target": target, "target_lst": several, "reward_model": {"ground_truth": truth}}
    types = {"prompt": MESSAGES, "target": MESSAGES, "target_lst": pa.list_(MESSAGES)}
    schema = pa.schema([*types.items(), ("reward_model", pa.struct([("ground_truth", pa.string())]))])
    good = {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}}
    batch = pa.RecordBatch.from_pylist([good, each, good], schema=schema)
    try:
        check_row(each, "x")
    except DataError:
        assert list(doubtful(batch)) == [1]
        assert list(doubtful(batch.slice(1))) == [0]


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([row(number) for number in range(3000)])
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    expected = r"a\.parquet, row 1000 \(in row group 1, rows 1000 to 1999\): cannot be read: .*CRC"
    problems = ProblemSet(str(path))
    assert problems.row(999).prompt_id == "p999"
    with pytest.raises(DataError, match=expected):
        problems.row(1500)
    with pytest.raises(DataError, match=expected):
        scan([problems])


DEEP = json.loads("[" * 900 + "]" * 900)
GOOD = b'{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"null\n", r"a\.jsonl, row 0: null, expected a record"),
        (GOOD + b"\n\nnull", r"row 1: null, expected a record of named fields"),
        (GOOD + b"\n[1]", "row 1: a list, expected a record"),
        (GOOD + b'\n"x"', "row 1: a str, expected a record"),
        (b'{"prompt": 1, "prompt": 2}\n', "row 0: the key 'prompt' stands twice in one object"),
        (GOOD + GOOD, "row 0: two objects on one line; each needs a line of its own"),
        (b'{\n  "prompt": [],\n', r"row 0: not JSON: the object does not end on its line: .* pretty-printed \(jq -c"),
        (GOOD + b"\n" + GOOD[:40], "row 1: not JSON: the object does not end on its line: the file is cut off"),
        (b"[" + GOOD + b"]", r"row 0: a JSON array; expected one object a line: jq -c '\.\[\]' FILE"),
        (b"\xef\xbb\xbf [\n" + GOOD + b"]", "row 0: a JSON array"),
        (GOOD + b"\n" + b'{"prompt":' + b"[" * 200_000, "row 1: .*nested too deeply"),
        (GOOD + b"\n" + b'{"x":' * 200_000, "row 1: .*nested too deeply"),
        (GOOD + b'\n{"prompt": "\xff"}', "row 1: not UTF-8: invalid start byte at byte 12 of the line"),
        (GOOD + b'\n{"x": ' + b"9" * 5000 + b"}", "row 1: not JSON that can be read: Exceeds the limit"),
        (GOOD.replace(b'"q"', b'"\\ud800"'), "row 0, prompt: not Unicode: half of a surrogate pair"),
        (GOOD + b"\n{'prompt': 1}", "row 1: not JSON: Expecting property name enclosed in double quotes at character 2"),
        (GOOD + b"\n" + b"\0" * 100, "row 1: not JSON: Expecting value at character 1"),
        (("\ufeff" + GOOD.decode()).encode("utf-16"), "row 0: text in UTF-16; iconv"),
        (b"\x1f\x8b\x08\0", "row 0: compressed with gzip"),
        (b"PAR1\0", "row 0: a parquet file"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan([ProblemSet(str(tmp_path / "a.jsonl"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reward_model": {"ground_truth": 7}},
            r"row 1, reward_model\.ground_truth: given 7; expected text \(in q",
        ),
        ({"reward_model": "7"}, "row 1, reward_model: given '7'; expected a record with the text ground_truth"),
        ({"prompt": "text"}, "row 1, prompt: given 'text'; expected a list of messages"),
        ({"prompt": [{"role": "user", "content": [1]}]}, r"row 1, prompt: given \[1\]; expected a list of messages"),
        (
            {"prompt": [{"role": "user", "content": "q", "x": DEEP}]},
            "row 1, prompt: a message has fields that are nested more th",
        ),
        ({"prompt": None}, "row 1, prompt: given None; expected a non-empty list"),
        ({"target": {"content": "x"}}, r"row 1, target: given \{'content': 'x'\}; expected a list of messages"),
        ({"target_lst": ["x", None]}, r"row 1, target_lst\[1\]: given None"),
        ({"data_source": 3}, "row 1, data_source: given 3; expected text"),
        ({"extra_info": {"index": 0.5}}, r"row 1, extra_info: given \{'index': 0\.5\}; expected a record with index"),
        ({"extra_info": 1}, "row 1, extra_info: given 1; expected a record with index"),
    ],
)
def test_a_field_of_a_line_that_has_another_type_is_named(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(each) for each in (row(0), row(1, **change))))
    with pytest.raises(DataError, match=message):
        scan([ProblemSet(str(tmp_path / "a.jsonl"))])


def test_lines_are_typed_by_nothing_that_they_look_like(tmp_path: Path) -> None:
    """Dates stay text, lines are as long as they are, fields come and go, and a message keeps what it has besides."""
    rows = [
        row(0, reward_model={"ground_truth": "2024-05-01"}, data_source="2024-05-01T00:00:00", extra_info={"index": 7}),
        row(1, target=[{"role": "assistant", "content": "x" * (9 << 20)}], extra_info={"index": "007", "level": 3}),
        row(2, target_lst=["a", [{"role": "assistant", "content": "b"}]], other=float("nan"), level="2024-05-01"),
        row(3, prompt=[{"role": "user", "content": "q", "name": None, "calls": [{"a": [1]}]}], extra_info=None),
        {name: row(4)[name] for name in ("prompt", "reward_model")},
    ]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\n \n")
    problems = ProblemSet(str(tmp_path / "a.json"))
    found = [problems.row(index) for index in range(problems.rows)]
    assert (scan([problems]).rows, len(problems.blocks)) == (5, 2)
    assert [each.prompt_id for each in found] == ["7", "007", "p2", "3", "4"]
    assert found[1].level == "3"
    assert [each.fields["data_source"] for each in found] == ["2024-05-01T00:00:00", "odd", "even", "odd", None]
    for each, written in zip(found, rows, strict=True):
        assert each.fields["prompt"] == written["prompt"]
        assert each.fields["target"] == written.get("target")
        assert each.fields["reward_model"]["ground_truth"] == written["reward_model"]["ground_truth"]
    assert found[2].fields["target_lst"] == [[{"role": "assistant", "content": text}] for text in "ab"]


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "index", "level", "ground_truth", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(lines.COLUMNS)), value=ODD)
@settings(max_examples=300)
def test_arrow_reads_a_field_as_we_do_or_leaves_it_to_us(tmp_path_factory, name: str, value) -> None:
    """The way that is ten times faster takes nothing that the other refuses, and makes the same of what it takes."""
    location = Location(LocalFileSystem(), "a", "a", 0)
    block = Block(location, 0, 0, 1, 0, "")
    results = []
    for read in (lambda: lines.arrow_value(value, name, "a, row 0"), lambda: lines.arrow_column([{name: value}], name, block)):
        try:
            results.append(read().to_pylist())
        except DataError as refused:
            results.append(str(refused))
    assert results[0] == results[1]


def test_ground_truths_that_are_none_are_counted(tmp_path: Path) -> None:
    truths = ["1", "proof", "proof", "\\text{Not Found}", "None", "Unknown", "-", "4"]
    rows = [row(number, reward_model={"ground_truth": truth}) for number, truth in enumerate(truths)]
    found = scan([ProblemSet(write(tmp_path / "a.parquet", rows))]).placeholders
    assert found == {"proof": 2, "\\text{Not Found}": 1, "None": 1}


def test_columns_that_the_first_line_has_not_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"column prompt, reward_model missing; it has question, answer, .*tools/prepare_data"):
        ProblemSet(str(tmp_path / "a.jsonl"))


def test_files_without_rows_are_passed_over_but_not_all_of_them(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has no rows"):
        ProblemSet(str(tmp_path / "a.parquet"))
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"b\.jsonl: .*"):
        ProblemSet(str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").unlink()
    write(tmp_path / "c.parquet", ROWS[:2])
    assert ProblemSet(str(tmp_path)).rows == 2


MEMORY = """
import sys
from megatron_hpt.data.order import Shuffle
from megatron_hpt.data.problem_set import ProblemSet
from megatron_hpt.data.scan import scan
import pyarrow.parquet

def mib(key):
    with open("/proc/self/status") as status:
        return int(dict(line.split(":") for line in status)[key].split()[0]) / 1024

before = mib("VmRSS")
problems = ProblemSet(sys.argv[1])
scan([problems])
shuffle = Shuffle(problems.layout, (0,))
for draw in range(500):
    problems.row(shuffle.at(draw))
print(mib("VmHWM") - before)
"""


def write_large(path: Path, rows: int, group: int) -> None:
    """Rows of about 700 bytes: the same texts again and again, each time with other ids."""
    number = 10_000
    texts = [f"{index} " + f"{index * 7919 % 10**9} " * 60 for index in range(number)]
    some = pa.Table.from_pylist([row(index) for index in range(number)])
    some = some.set_column(1, some.schema.field("target"), pa.array([[{"role": "assistant", "content": t}] for t in texts]))
    with pq.ParquetWriter(path, some.schema) as writer:
        pending: list[pa.Table] = []
        for first in range(0, rows, number):
            ids = pa.array([{"split": "train", "index": f"p{index}"} for index in range(first, first + number)])
            pending.append(some.set_column(3, some.schema.field("extra_info"), ids))
            if sum(map(len, pending)) >= group:
                writer.write_table(pa.concat_tables(pending), row_group_size=group)
                pending = []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "group", "most"),
    [
        (400_000, 1_000, 100),
        pytest.param(1_000_000, 1_000_000, 300, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, rows: int, group: int, most: int) -> None:
    """280 MB of rows in small row groups, 700 MB in one: everything is read, and 500 rows at random places."""
    path = tmp_path / "large.parquet"
    write_large(path, rows, group)
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    path.unlink()
    assert float(done.stdout) < most
