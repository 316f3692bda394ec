"""What published records become, and why some become nothing."""

from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.data.parquet import Problem, problem_file, schema_row
from megatron_hpt.errors import DataError
from megatron_hpt.preparation import formats
from megatron_hpt.preparation.fields import Unfit, value
from megatron_hpt.preparation.reading import local_files
from megatron_hpt.rewards.boxes import last_box

SYSTEM, USER = {"role": "system", "content": "Think first."}, {"role": "user", "content": "What is 1+1?"}
OPENR1 = {
    "data_source": "",
    "prompt": [SYSTEM, USER],
    "target": [{"role": "assistant", "content": "<think>\n…</think>\\boxed{2}"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "default", "index": -1},
}


def test_openr1_is_read_with_and_without_its_system_prompt() -> None:
    for kept in (True, False):
        named = formats.openr1(system_prompt=kept).read(OPENR1)
        assert named.problem.prompt == ([SYSTEM, USER] if kept else [USER])
        assert (named.problem.answer, named.problem.demonstration) == ("2", "<think>\n…</think>\\boxed{2}")
        assert (named.source, named.identity) == (None, None)  # the index is -1 in every row


def test_several_demonstrations_are_kept() -> None:
    problem = formats.openr1(False).read({**OPENR1, "target_lst": ["a", "b"]}).problem
    assert problem.demonstrations == ["a", "b"]
    row = schema_row(problem, "s", "train", "0")
    assert (row["target"], row["target_lst"]) == ([{"role": "assistant", "content": "a"}], ["a", "b"])


def test_a_benchmarks_id_source_and_level_are_kept() -> None:
    record = {"prompt": "q", "answer": 27, "source": "gpqa_diamond", "id": 0, "level": "Level 5"}
    named = formats.benchmark("gpqa").read(record)
    assert (named.problem.answer, named.problem.level, named.source, named.identity) == ("27", "Level 5", "gpqa_diamond", "0")


def test_gsm8k_loses_its_calculator_and_gets_a_box() -> None:
    record = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 each.\nTogether <<24*50=1200>>1,200.\n#### 1,200"}
    problem = formats.GSM8K.read(record).problem
    assert problem.answer == "1200"
    assert problem.demonstration == "48/2 = 24 each.\nTogether 1,200.\nThe answer is \\boxed{1200}."


@pytest.mark.parametrize(
    ("solution", "answer", "boxed"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "so $\\boxed{\\frac{1}{2}}$."),
        ("first \\boxed{1}, then $\\boxed{2}$", "2", "first \\boxed{1}, then $\\boxed{2}$"),
        ("so $\\boxed 5$.", "5", "so $\\boxed{5}$."),
        ("so $\\boxed 5.$", "5", "so $\\boxed{5}.$"),
        ("so $\\fbox{\\text{(A)}}$.", "\\text{(A)}", "so $\\boxed{\\text{(A)}}$."),
        ("so $\\boxed {x}$", "x", "so $\\boxed{x}$"),
        ("so $\\boxed{\\left\\{1,2\\right\\}}$", "\\left\\{1,2\\right\\}", "so $\\boxed{\\left\\{1,2\\right\\}}$"),
    ],
)
def test_maths_answer_is_what_is_boxed_last(solution: str, answer: str, boxed: str) -> None:
    problem = formats.MATH.read({"problem": "p", "solution": solution, "level": "Level 3"}).problem
    assert (problem.answer, problem.demonstration, problem.level) == (answer, boxed, "Level 3")


@pytest.mark.parametrize("solution", ["none", "$\\boxed{1", "\\boxedx", "\\boxed", "\\boxed{1} and \\boxed{2"])
def test_no_box_is_none(solution: str) -> None:
    assert last_box(solution) is None


def test_columns_are_mapped_by_role() -> None:
    form = formats.mapped("own", {"prompt": "q", "answer": "a.final", "demonstration": "s", "system": "sys", "id": "n"})
    assert form.columns == ("q", "a.final", "a", "s", "sys", "n")
    named = form.read({"q": "1+1", "a": {"final": 2.5}, "s": ["one", "two"], "sys": "Be brief.", "n": 7})
    assert named.problem.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    assert (named.problem.answer, named.problem.demonstrations, named.identity) == ("2.5", ["one", "two"], "7")
    chat = formats.mapped("own", {"prompt": "q", "answer": "q"}).read({"q": "x"})
    assert chat.problem.demonstration is None


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"a.b": "1"}, "1"),
        ({"a": {"b": "1"}}, "1"),
        ({"a.b": "1", "a": {"b": "2"}}, "1"),
        ({"a": {"b.c": {"d": "1"}}}, "1"),
        ({"a.b.c": {"d": "1"}, "a": "2"}, "1"),
        ({"a": None}, None),
    ],
)
def test_a_name_with_dots_is_a_name_first(record: dict, found: str | None) -> None:
    assert value(record, "a.b" if found is None or "d" not in str(record) else "a.b.c.d") == found


@pytest.mark.parametrize(
    ("written", "truth"),
    [
        ("1,200", "1200"),
        ("-1,234,567.5", "-1234567.5"),
        ("$1,200", "$1200"),
        ("1,200 dollars", "1200 dollars"),
        ("(1,2)", "(1,2)"),
        ("(1,200)", "(1,200)"),
        ("[1,234]", "[1,234]"),
        ("1,2", "1,2"),
        ("1, 200", "1, 200"),
        ("1,2,300", "1,2,300"),
        ("3,4,5", "3,4,5"),
        ("x,y", "x,y"),
        ("1,2345", "1,2345"),
    ],
)
def test_only_thousands_separators_leave_gsm8ks_answer(written: str, truth: str) -> None:
    problem = formats.GSM8K.read({"question": "q", "answer": f"steps\n#### {written}"}).problem
    assert problem.answer == truth
    assert problem.demonstration == f"steps\nThe answer is \\boxed{{{truth}}}."


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"prompt": "q", "anser": "a"}, r"anser=a: allowed: prompt, answer, .*; did you mean 'answer'\?"),
        ({"prompt": "q"}, "given prompt; also needed: answer=COLUMN"),
    ],
)
def test_a_wrong_mapping_is_refused(mapping: Mapping[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        formats.mapped("own", mapping)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt: null"),
        ({"prompt": []}, r"prompt: given \[\], expected a list of messages"),
        ({"prompt": [SYSTEM]}, "prompt: the last message is of role 'system', expected 'user'"),
        ({"prompt": ["text"]}, "prompt: given 'text', expected messages"),
        ({"prompt": [{"role": "user"}]}, "content: missing; there is role"),
        ({"prompt": [{"role": "user", "content": " \n"}]}, r"prompt\.content: empty"),
        ({"prompt": 5}, "prompt: given 5, expected a list of messages"),
        ({"reward_model": None}, r"reward_model\.ground_truth: null"),
        ({"reward_model": {"style": "rule"}}, r"reward_model\.ground_truth: missing; there is style"),
        ({"reward_model": {"ground_truth": True}}, r"reward_model\.ground_truth: given True \(bool\), expected text"),
        ({"reward_model": {"ground_truth": float("nan")}}, r"given nan \(float\), expected text"),
        ({"reward_model": {"ground_truth": ["1", "2"]}}, r"given \['1', '2'\] \(list\), expected text"),
        ({"target": OPENR1["target"] * 2}, "target: 2 messages; a demonstration is one message"),
        ({"target": [{"role": "assistant", "content": ""}]}, r"target\.content: empty"),
        ({"target": [{"role": "assistant", "content": "\ud800"}]}, r"target\.content: not Unicode: '\\ud800'"),
        ({"target_lst": ["a", None]}, "target_lst: null"),
    ],
)
def test_what_makes_no_problem_is_said_with_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unfit, match=message):
        formats.openr1(False).read({**OPENR1, **change})


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        (formats.GSM8K, {"question": "q", "answer": "no marker"}, "answer: no line '#### …'"),
        (formats.GSM8K, {"question": "q", "answer": "steps ####  "}, "answer, after ####: empty"),
        (formats.MATH, {"problem": "p", "solution": "no box"}, r"solution: no \\boxed"),
        (formats.MATH, {"problem": "p", "solution": "\\boxed{ }"}, r"solution: no \\boxed"),
        (formats.benchmark("x"), {"prompt": "p"}, "answer: missing; there is prompt"),
    ],
)
def test_a_format_says_what_it_misses(form: formats.RecordFormat, record: dict, message: str) -> None:
    with pytest.raises(Unfit, match=message):
        form.read(record)


written = st.text(min_size=1).filter(lambda text: text.strip())
messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": written})


problems = st.builds(Problem, written, written.map(str.strip), written, before=st.lists(messages, max_size=2).map(tuple))


@given(st.lists(problems, max_size=4))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, problems: list[Problem]) -> None:
    path = tmp_path_factory.mktemp("round") / "a.parquet"
    with problem_file(path) as append:
        append([schema_row(problem, "source", "train", str(index)) for index, problem in enumerate(problems)])
    form = formats.openr1(system_prompt=True)
    if problems:
        found = [record for batch in local_files(path).batches(form.columns) for record in batch.records]
        assert [form.read(record.fields).problem for record in found] == problems
    assert pq.ParquetFile(path).metadata.num_rows == len(problems)
