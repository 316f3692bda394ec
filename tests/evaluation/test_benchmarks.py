"""Test sets by name, and the problems in their files."""

import json
from pathlib import Path

import pytest

from megatron_hpt.data.parquet import Problem, write_problems
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.evaluation.benchmarks import BENCHMARKS, canonical, choose
from megatron_hpt.evaluation.problems import SYSTEM_PROMPTS, load_problems, of_prompts
from megatron_hpt.examples import tiny_llama

SHARED = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sets as they lie about: published JSON, prepared parquet under another spelling, one of the user's own."""
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1), "level": i} for i in range(3)]
    (tmp_path / "aime24.json").write_text(json.dumps(rows))
    write_problems(tmp_path / "math500.parquet", [Problem("1+1", "2", None)], "math", "test")
    write_problems(tmp_path / "mine.parquet", [Problem("1+1", "2", None)], "mine", "test")
    return tmp_path


def test_names_aliases_and_files(folder: Path) -> None:
    chosen = choose(["aime24", "MATH_500@4", "mine"], folder)
    assert [(one.name, one.file.name, one.samples, one.grader) for one in chosen] == [
        ("aime24", "aime24.json", 32, "math"),
        ("math-500", "math500.parquet", 4, "math"),
        ("mine", "mine.parquet", 1, "math"),
    ]
    (own,) = choose([str(folder / "mine.parquet")], Path("nowhere"), samples=8)
    assert (own.name, own.samples) == ("mine", 8)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (["aime42"], ConfigError, r"given 'aime42'; known: aime24, .*did you mean 'aime2"),
        (["mein"], ConfigError, r"did you mean 'mine'"),
        (["aime24@0"], ConfigError, "after @ stands how many samples"),
        (["aime24", "aime2024"], ConfigError, "aime24 occurs twice"),
        (["minerva"], DataError, r"minerva\.parquet: no such file, nor minerva\.json; --data names the folder"),
        (["there/is/none.parquet"], DataError, r"none\.parquet: no such file"),
    ],
)
def test_what_is_no_set_is_refused(folder: Path, wanted: list[str], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        choose(wanted, folder)


def test_every_name_of_the_table_is_its_own() -> None:
    names = [name for row in BENCHMARKS.values() for name in row.aliases] + list(BENCHMARKS)
    assert all(canonical(name) in BENCHMARKS for name in names)
    assert len({name.replace("-", "") for name in names}) == len(names)


def test_problems_are_rendered_with_the_system_prompt(folder: Path) -> None:
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '(' if m['role'] == 'system' else '' }}{{ m['content'] }}{% endfor %}\n"
    )
    plain, asked = (load_problems(folder / "aime24.json", tokenizer, text) for text in (None, "12"))
    assert [problem.problem_id for problem in plain] == ["aime24-0", "aime24-1", "aime24-2"]
    assert [(p.ground_truth, p.level, p.data_source) for p in plain] == [(str(i + 1), str(i), "aime24") for i in range(3)]
    assert (plain[1].prompt, asked[1].prompt) == ("1+1", "(121+1")
    assert tokenizer.decode(asked[1].tokens) == asked[1].prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "row 0, prompt: missing"),
        ("[3]", "row 0: a int, expected a record"),
        ('[{"prompt": " ", "answer": "1"}]', "row 0, prompt: empty"),
        ('[{"prompt": "1", "answer": ""}]', "row 0, answer: empty"),
        ('[{"prompt": "1", "answer": null}]', "row 0, answer: null"),
        ('[{"prompt": "1", "solution": "2"}]', "row 0, answer: missing; there is prompt, solution"),
        (
            '[{"prompt": "1", "answer": "2", "id": "a"}, {"prompt": "2", "answer": "2", "id": "a"}]',
            "row 1, id: 'a' is also .* row 0",
        ),
        ("[]", "has no rows"),
        ("", "has no rows"),
        ("[", "row 0: damaged"),
    ],
)
def test_a_bad_file_is_refused_with_its_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_problems(tmp_path / "bad.json", tiny_llama.tokenizer())


def test_a_published_set_and_the_file_prepared_of_it_have_the_same_problems(tmp_path: Path) -> None:
    """Else what was evaluated on one could not be compared with what was on the other."""
    from megatron_hpt.preparation.formats import benchmark
    from megatron_hpt.preparation.pipeline import Preparation, PreparationPlan
    from megatron_hpt.preparation.sets import sets_in

    rows = [{"prompt": "1+1", "answer": 2, "id": "test/algebra/7.json", "source": "math"}, {"prompt": "2+2", "answer": "4"}]
    (tmp_path / "MATH-500").mkdir()
    (tmp_path / "MATH-500" / "test.json").write_text(json.dumps(rows))
    (one,) = choose(["math500"], tmp_path)
    assert (one.name, one.samples) == ("math-500", 1)
    ((name, files),) = sets_in(tmp_path).items()
    prepared = tmp_path / "prepared.parquet"
    Preparation(PreparationPlan(benchmark(name.lower()), "test")).write(files.batches(), prepared)
    published = load_problems(one.file, tiny_llama.tokenizer())
    assert published == load_problems(prepared, tiny_llama.tokenizer())
    assert [problem.problem_id for problem in published] == ["test/algebra/7.json", "math-500-1"]


def test_the_published_sets_load() -> None:
    if not SHARED.is_dir():
        pytest.skip("the seven test sets are not on this machine")
    tokenizer = tiny_llama.tokenizer()
    names = ["aime24", "aime25", "amc23", "math-500", "minerva", "olympiad-bench", "gpqa"]
    for one in choose(names, SHARED):
        assert len(load_problems(one.file, tokenizer, SYSTEM_PROMPTS["simplerl"])) == BENCHMARKS[one.name].problems


def test_a_run_asks_what_the_command_asks(arithmetic_data: Path, tokenizer) -> None:
    from megatron_hpt.data.prompts import LengthLimits, load_prompts

    file = arithmetic_data / "heldout.parquet"
    assert of_prompts(load_prompts(str(file), tokenizer, LengthLimits(8, 24)), tokenizer) == load_problems(file, tokenizer)
