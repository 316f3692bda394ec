"""tools/prepare_data.py from files to files."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_hpt.data.prompts import LengthLimits, load_prompts
from megatron_hpt.errors import HptError

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
COUNTS = {"aime24": 30, "aime25": 30, "amc23": 40, "gpqa": 198, "math500": 500, "minerva": 272, "olympiadbench": 674}


@pytest.fixture(scope="module")
def tool():
    """Runs a command; returns what it prints, or raises what it refuses with."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools" / "prepare_data.py")
    module = sys.modules["prepare_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(module.app, list(map(str, arguments)))
        if isinstance(result.exception, HptError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    yield run
    del sys.modules["prepare_data"]


def openr1_row(number: int, **change: object) -> dict:
    return {
        "data_source": "",
        "prompt": [
            {"role": "system", "content": "Think first."},
            {"role": "user", "content": f"{number}+1"},
        ],
        "target": [{"role": "assistant", "content": f"{number}+1=\\boxed{{{number + 1}}}"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"split": "default", "index": -1},
        **change,
    }


def write(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def findings(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out.parent / f"_{out.stem}.rejects.jsonl").read_text().splitlines()]


def test_openr1_becomes_what_a_run_loads(tool, tmp_path: Path, tokenizer, tiny_model: Path) -> None:
    source = write(tmp_path / "source.parquet", [openr1_row(number) for number in range(40)])
    out = tmp_path / "data" / "openr1.parquet"
    said = tool("openr1", source, out, "--tokenizer", tiny_model)
    assert "40 of 40 rows, 40 with demonstrations" in said
    assert "prompt, tokens: 50 % within 4," in said
    prompts = load_prompts(str(out), tokenizer, LengthLimits(prompt=8, response=16))
    assert tokenizer.decode(prompts[12].tokens) == "12+1\n"
    assert tokenizer.decode(prompts[12].demonstration) == "12+1=\\boxed{13}<eos>"
    assert (prompts[12].prompt_id, prompts[12].data_source, prompts[12].ground_truth) == ("openr1-12", "openr1", "13")
    tool("openr1", source, out, "--system-prompt", "keep")
    assert [message["role"] for message in pq.read_table(out).to_pylist()[0]["prompt"]] == ["system", "user"]


def test_what_is_wrong_with_a_row_is_said_by_file_and_row(tool, tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    lines = [
        '{"q": "1+1", "a": 2, "n": "x"}',
        '{"q": null, "a": 2, "n": "y"}',
        '{"q": "1+2", "a": 3, "n": "x"}',
        "{broken",
        '{"q": "1 + 1", "a": 2, "n": "z"}',
        '{"q": "1+3", "answer": 4, "n": "w"}',
    ]
    source.write_text("\n".join(lines))
    out = tmp_path / "out.parquet"
    said = tool("columns", source, out, "prompt=q", "answer=a", "id=n", "--drop", "duplicate")
    assert f"wrote {out}: 1 of 6 rows, 0 with demonstrations" in said
    assert f"malformed: 3 rows, left out; the first: {source}, row 1: q: null" in said
    expected = [
        (1, True, "malformed", "q: null"),
        (2, True, "duplicate-id", f"'x' is also the id of {source}, row 0"),
        (3, True, "malformed", "not JSON: "),
        (4, True, "duplicate", f"the same prompt as {source}, row 0"),
        (5, True, "malformed", "a: missing; there is q, answer, n"),
    ]
    found = findings(out)
    assert [(one["row"], one["dropped"], one["reason"]) for one in found] == [one[:3] for one in expected]
    assert all(one["detail"].startswith(detail) for one, (*_, detail) in zip(found, expected, strict=True))
    assert {one["file"] for one in found} == {str(source)}
    tool("columns", source, out, "prompt=q", "answer=a", "id=n")
    assert [row["extra_info"]["index"] for row in pq.read_table(out).to_pylist()] == ["x", "z"]  # a duplicate is kept unasked


def test_nothing_is_written_when_no_row_is_left_or_a_file_is_damaged(tool, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    good, bad = write(source / "a.parquet", [{"q": "1+1", "a": "2"}]), source / "b.parquet"
    bad.write_bytes(good.read_bytes()[:-9])
    out = tmp_path / "new" / "out.parquet"
    message = r"none of 1 rows is left, nothing was written: 1 malformed \(the first: .*a\.parquet, row 0: a\.b: missing"
    with pytest.raises(HptError, match=message):
        tool("columns", good, out, "prompt=q", "answer=a.b")
    with pytest.raises(HptError, match=r"b\.parquet: not a readable parquet file"):
        tool("columns", source, out, "prompt=q", "answer=a")
    with pytest.raises(HptError, match=r"a\.parquet: no column 'question'; it has q, a"):
        tool("columns", good, out, "prompt=question", "answer=a")
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "split"),
    [
        ("test/a.jsonl", (), "test"),
        ("x/dev.jsonl", (), "validation"),
        ("x/a.jsonl", (), "train"),
        ("test/a.jsonl", ("--split", "s"), "s"),
    ],
)
def test_rows_are_marked_with_the_split_that_their_file_names(
    tool, tmp_path: Path, name: str, options: tuple, split: str
) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('{"q": "1+1", "a": 2}')
    tool("columns", (tmp_path / name).parent, tmp_path / "out.parquet", "prompt=q", "answer=a", *options)
    assert [row["extra_info"]["split"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()] == [split]


def test_a_column_whose_name_has_a_dot_can_be_named(tool, tmp_path: Path) -> None:
    rows = [{"q.text": f"{number}+1", "a": {"b": "no"}, "a.b": str(number + 1), "a.c": 5} for number in range(3)]
    source, out = write(tmp_path / "a.parquet", rows), tmp_path / "out.parquet"
    tool("columns", source, out, "prompt=q.text", "answer=a.b")
    assert [row["reward_model"]["ground_truth"] for row in pq.read_table(out).to_pylist()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drop", "contaminated"), "--drop contaminated needs --against"),
        (("--drop", "long-prompt"), "--drop long-prompt needs --max-prompt"),
        (("--max-prompt", 5), "--max-prompt needs --tokenizer"),
        (("--reward", "mahts"), r"given 'mahts'; allowed: .*; did you mean 'math'\?"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tool, tmp_path: Path, arguments: tuple, message: str) -> None:
    source = write(tmp_path / "a.parquet", [openr1_row(1)])
    with pytest.raises(HptError, match=message):
        tool("openr1", source, tmp_path / "out.parquet", *arguments)


def test_long_rows_are_left_out_when_asked(tool, tmp_path: Path, tiny_model: Path) -> None:
    long = {"target": [{"role": "assistant", "content": "1+" * 20 + "\\boxed{3}"}]}
    source = write(tmp_path / "a.parquet", [openr1_row(1), openr1_row(2, **long)])
    out = tmp_path / "out.parquet"
    options = ("--tokenizer", tiny_model, "--max-response", 30)
    assert "long-demonstration: 1 row, kept; --drop long-demonstration leaves them out" in tool("openr1", source, out, *options)
    tool("openr1", source, out, *options, "--drop", "long-demonstration")
    assert pq.read_metadata(out).num_rows == 1
    assert findings(out)[0]["detail"] == "44 tokens, not long: 30"


def test_a_chat_that_the_template_refuses_is_left_out(tool, tmp_path: Path, tiny_model: Path) -> None:
    source = write(tmp_path / "a.parquet", [openr1_row(1), openr1_row(2, prompt=[{"role": "user", "content": "2"}])])
    out = tmp_path / "out.parquet"
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    options = ("--system-prompt", "keep", "--tokenizer", tiny_model, "--chat-template", template)
    assert "1 of 2 rows" in tool("openr1", source, out, *options)
    (found,) = findings(out)
    assert (found["row"], found["reason"]) == (0, "malformed")
    assert re.search(r"a\.parquet, row 0, prompt: the chat template .* roles system, user: no system", found["detail"])


@pytest.mark.slow
def test_demonstrations_that_do_not_earn_the_reward_are_found(tool, tmp_path: Path) -> None:
    wrong = {"reward_model": {"style": "rule", "ground_truth": "\\frac{7}{2}"}}
    source = write(tmp_path / "a.parquet", [openr1_row(1), openr1_row(2, **wrong), openr1_row(3, target=None)])
    out = tmp_path / "out.parquet"
    said = tool("openr1", source, out, "--reward", "math", "--workers", 1, "--drop", "wrong-demonstration")
    assert "2 of 3 rows, 1 with demonstrations" in said
    assert findings(out)[0]["detail"] == "is graded 0 against '\\\\frac{7}{2}'"


@pytest.mark.slow
def test_of_several_demonstrations_the_right_ones_are_kept(tool, tmp_path: Path) -> None:
    several = [["no box", "So \\boxed{2}.", "So \\boxed{3}."], ["\\boxed{3}", "<think>"], ["\\boxed{4}", "It is \\boxed{4}"]]
    rows = [openr1_row(number, target=None, target_lst=shown) for number, shown in enumerate(several, start=1)]
    source, out = write(tmp_path / "a.parquet", rows), tmp_path / "out.parquet"
    options = ("--reward", "math", "--workers", 1)
    assert "wrong-demonstration: 2 rows, kept; --drop" in tool("openr1", source, out, *options)
    assert [len(row["target_lst"]) for row in pq.read_table(out).to_pylist()] == [3, 2, 2]
    said = tool("openr1", source, out, *options, "--drop", "wrong-demonstration")
    assert "3 of 3 rows, 3 with demonstrations" in said
    assert "wrong-demonstration: 2 rows, 0 left out, 2 kept with the demonstrations that are right" in said
    kept = pq.read_table(out).to_pylist()
    assert [row["target"][0]["content"] for row in kept] == ["So \\boxed{2}.", "\\boxed{3}", "\\boxed{4}"]
    assert [row["target_lst"] for row in kept] == [None, None, several[2]]
    assert [(one["row"], one["dropped"], one["detail"]) for one in findings(out)] == [
        (0, False, "demonstration 1 of 3 is graded 0 against '2'"),
        (0, False, "demonstration 3 of 3 is graded 0 against '2'"),
        (1, False, "demonstration 2 of 2 is graded 0 against '3'"),
    ]


def test_what_stands_in_place_of_an_answer_is_left_out_and_counted(tool, tmp_path: Path) -> None:
    answers = ["2", "proof", "notfound", "N/A", "\\text{None}", "Unknown", "[deleted]", "none", 0, "see solution."]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"q": f"{number}?", "a": answer}) for number, answer in enumerate(answers)))
    out = tmp_path / "out.parquet"
    said = tool("columns", source, out, "prompt=q", "answer=a")
    assert f"no-answer: 6 rows, left out; the first: {source}, row 1: a: 'proof' stands in place of an answer" in said
    assert [row["reward_model"]["ground_truth"] for row in pq.read_table(out).to_pylist()] == ["2", "Unknown", "none", "0"]
    assert {(one["row"], one["reason"], one["dropped"]) for one in findings(out)} == {
        (row, "no-answer", True) for row in (1, 2, 3, 4, 6, 9)
    }


def test_demonstrations_without_a_box_are_told_and_get_one(tool, tmp_path: Path) -> None:
    shown = ["It is 2.", "\\boxed{2}", "<think>\\boxed{2}</think> It is 2. ", "<think> endless", "\\boxed{1} or \\boxed{", None]
    source = write(tmp_path / "a.parquet", [{"q": f"{n}?", "a": 2, "s": text} for n, text in enumerate(shown)])
    out = tmp_path / "out.parquet"
    columns = ("columns", source, out, "prompt=q", "answer=a", "demonstration=s")
    assert "note: 4 demonstrations end without \\boxed{…}, which the rewards math and choice read: " in tool(*columns)
    said = tool(*columns, "--box")
    assert (
        "  3 demonstrations without \\boxed{…} were given one with their answer\n  note: 1 demonstrations end without" in said
    )
    written = [row["target"] and row["target"][0]["content"] for row in pq.read_table(out).to_pylist()]
    box = "\n\nThe answer is \\boxed{2}."
    assert written == [
        "It is 2." + box,
        shown[1],
        "<think>\\boxed{2}</think> It is 2." + box,
        shown[3],  # whatever is put behind a thought that does not end is thought too
        shown[4] + box,
        None,
    ]


def test_gsm8k_and_math_lines_become_problems(tool, tmp_path: Path) -> None:
    for name, record in {
        "gsm8k": {"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 6"},
        "math": {"problem": "How many?", "solution": "It is $\\boxed 6$.", "level": "Level 1", "type": "Algebra"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
        out = tmp_path / f"{name}.parquet"
        tool(name, tmp_path / f"{name}.jsonl", out, "--instruction", "Use a box.")
        (row,) = pq.read_table(out).to_pylist()
        assert row["prompt"] == [{"role": "user", "content": "How many?\nUse a box."}]
        assert (row["reward_model"]["ground_truth"], row["data_source"]) == ("6", name)
        assert "\\boxed{6}" in row["target"][0]["content"]


def test_reasoning_gym_writes_entries_that_its_own_scoring_reads(tool, tmp_path: Path) -> None:
    from reasoning_gym import get_score_answer_fn

    out = tmp_path / "out.parquet"
    tool("reasoning-gym", "leg_counting", out, "max_animals=4", "--rows", 20, "--seed", 3)
    rows = pq.read_table(out).to_pylist()
    assert [row["extra_info"]["index"] for row in rows] == [f"leg_counting-3-{number}" for number in range(20)]
    for row in rows:
        entry = json.loads(row["reward_model"]["ground_truth"])
        assert row["data_source"] == "reasoning_gym/leg_counting"
        assert entry["question"] == row["prompt"][0]["content"]
        assert get_score_answer_fn(entry["metadata"]["source_dataset"])(entry["answer"], entry) == 1.0
    tool("reasoning-gym", "leg_counting", out, "--rows", 5, "--answers", "text")
    assert all(re.fullmatch(r"\d+", row["reward_model"]["ground_truth"]) for row in pq.read_table(out).to_pylist())
    with pytest.raises(HptError, match=r"given 'leg_count'; it has .*; did you mean 'leg_counting'\?"):
        tool("reasoning-gym", "leg_count", out)
    with pytest.raises(HptError, match=r"task leg_counting: .*legs"):
        tool("reasoning-gym", "leg_counting", out, "legs=3")


@pytest.fixture(scope="module")
def sets(tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven test sets as parquet."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmark files (shared/data/benchmarks) are not here")
    out = tmp_path_factory.mktemp("sets")
    tool("benchmarks", BENCHMARKS, out)
    return out


def test_every_problem_of_the_seven_sets_is_kept(sets: Path, tokenizer) -> None:
    assert {path.stem: pq.read_metadata(path).num_rows for path in sets.glob("*.parquet")} == COUNTS
    assert sum(COUNTS.values()) == 1744
    assert all(path.read_text() == "" for path in sets.glob("_*.rejects.jsonl"))
    for name in COUNTS:
        (source,) = (path for path in BENCHMARKS.glob("*.json") if path.stem.replace("-", "") == name)
        records, prompts = (
            json.loads(source.read_text()),
            load_prompts(str(sets / f"{name}.parquet"), tokenizer, LengthLimits(9999, 1)),
        )
        assert [prompt.ground_truth for prompt in prompts] == [record["answer"].strip() for record in records]
        assert [prompt.prompt_id for prompt in prompts] == [
            record.get("id", f"{source.stem}-{index}") for index, record in enumerate(records)
        ]
        assert {prompt.data_source for prompt in prompts} == {records[0].get("source", source.stem)}
    letters = Counter(
        prompt.ground_truth for prompt in load_prompts(str(sets / "gpqa.parquet"), tokenizer, LengthLimits(9999, 1))
    )
    assert letters == {"A": 55, "B": 54, "C": 48, "D": 41}


def test_planted_test_problems_are_found_and_left_out(tool, sets: Path, tmp_path: Path) -> None:
    planted = [row["prompt"][0]["content"] for row in pq.read_table(sets / "aime24.parquet").to_pylist()[:3]]
    questions = [f"Add {number} to the square of {number + 1}, then divide by {number + 2}." for number in range(1500)]
    for number, problem in zip((5, 700, 1499), planted, strict=True):
        questions[number] = f"Solve this one.  {problem.upper()}"
    source = write(tmp_path / "a.parquet", [{"q": question, "a": "1"} for question in questions])
    out = tmp_path / "out.parquet"
    said = tool("columns", source, out, "prompt=q", "answer=a", "--against", sets, "--drop", "contaminated")
    assert "contaminated: 3 rows, left out" in said
    assert "in common with aime24 3" in said
    assert [(one["row"], one["dropped"]) for one in findings(out)] == [(5, True), (700, True), (1499, True)]
    assert findings(out)[0]["detail"].startswith("100% of aime24, row 0: 'every morning aya goes")
    assert pq.read_metadata(out).num_rows == 1497


def test_a_file_is_not_compared_with_itself(tool, tmp_path: Path) -> None:
    question = "Add one to the square of two, then divide by three, and round the result to the nearest whole number."
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": question, "answer": "2"}]))
    source = write(tmp_path / "train.parquet", [openr1_row(1, prompt=[{"role": "user", "content": question}])])
    tool("openr1", source, tmp_path / "out.parquet")
    assert f"in common with {tmp_path.name} 1\n" in tool("openr1", source, tmp_path / "out.parquet", "--against", tmp_path)
    with pytest.raises(HptError, match="no test set but what is prepared here"):
        tool("openr1", source, tmp_path / "out.parquet", "--against", source)


def test_the_source_is_never_written_over_and_no_role_is_given_twice(tool, tmp_path: Path) -> None:
    source = tmp_path / "in" / "src.jsonl"
    source.parent.mkdir()
    source.write_text('{"q": "1+1", "a": 2}\n', encoding="utf-8")
    for given, out in (
        (source, source),
        (source.parent, source.parent / "out.parquet"),
        (source.parent, source.parent / "x/o.parquet"),
    ):
        with pytest.raises(HptError, match="is one of the source's files, or would be read as one"):
            tool("columns", given, out, "prompt=q", "answer=a")
    with pytest.raises(HptError, match="prompt: given twice, 'q' and 'a'"):
        tool("columns", source, tmp_path / "out.parquet", "prompt=q", "prompt=a", "answer=a")
    assert source.read_text(encoding="utf-8") == '{"q": "1+1", "a": 2}\n'
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["src.jsonl"]


def test_a_test_split_beside_files_that_name_none_is_no_training_set(tool, tmp_path: Path) -> None:
    for name in ("in/data.jsonl", "in/test/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"q": "1+1", "a": 2}\n', encoding="utf-8")
    with pytest.raises(HptError, match=r"several splits \(without a split: .*data\.jsonl, test: .*a\.jsonl\)"):
        tool("columns", tmp_path / "in", tmp_path / "out.parquet", "prompt=q", "answer=a")
