"""`megatron-hpt compare` on evaluation folders whose samples are drawn from known probabilities, and on runs."""

import csv
import io
import json
import re
import xml.dom.minidom
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_hpt.cli import app
from megatron_hpt.comparison import paper
from megatron_hpt.comparison.comparison import compare
from megatron_hpt.comparison.outcomes import read_entries
from megatron_hpt.comparison.output import WRITERS, check, show, write
from megatron_hpt.comparison.paper import column_of
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.evaluation.samples import read_record, samples_file, write_record
from megatron_hpt.overrides import dump_yaml

from . import folders
from .folders import Drawn

HERE = Path(__file__).parent


def compared(*arguments: Path | str, model: str | None = None, intersect: bool = False, across: bool = False):
    return compare([str(argument) for argument in arguments], model, intersect, across)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models good and poor on aime24 (8 samples) and math-500 (one, with levels), and poor again as `same`."""
    root = tmp_path_factory.mktemp("evaluations")
    easy = np.random.default_rng(0).beta(1, 1, 300)
    for name, shift, seed in (("good", 0.2, 1), ("poor", 0.0, 2), ("same", 0.0, 3)):
        sets = {
            "aime24": Drawn(np.full(30, 0.2 + shift), 8, file="aime24.json", ungraded=8 if name == "good" else 0),
            "math-500": Drawn(np.clip(easy + shift, 0, 1), level=lambda place: str(1 + place % 3), file="math-500.json"),
        }
        folders.write(root / name, f"/models/{name}", sets, seed)
    return root


def test_differences_are_those_that_the_samples_were_drawn_with(evaluations: Path) -> None:
    found = compared(evaluations / "good", evaluations / "poor", evaluations / "same")
    assert [entry.label for entry in found.entries] == ["good", "poor", "same"]
    assert [column.title for column in found.columns] == ["AIME24", "MATH-500", "Avg mathematics (2)"]
    by_name = {(versus.other, versus.benchmark): versus.total for versus in found.versus}
    for other in ("poor", "same"):
        for benchmark, truth in (("AIME24", 0.2), ("MATH-500", 0.18)):
            total = by_name[other, benchmark]
            assert total.low < truth < total.high
            assert total.p_value < 0.01
            assert total.plus > total.minus
    assert by_name["poor", "MATH-500"].test == "McNemar, exact"
    assert (by_name["poor", "AIME24"].problems, by_name["poor", "AIME24"].left_out) == (29, 1)
    (equal,) = [v.total for v in compared(evaluations / "poor", evaluations / "same").versus if v.benchmark == "MATH-500"]
    assert equal.low < 0 < equal.high
    assert equal.p_value > 0.05


def test_exclusive_solves_by_level_are_counts_that_add_up(evaluations: Path) -> None:
    versus = next(v for v in compared(evaluations / "good", evaluations / "poor").versus if v.benchmark == "MATH-500")
    assert list(versus.groups) == ["1", "2", "3"]
    assert sum(one.problems for one in versus.groups.values()) == versus.total.problems == 300
    for side in ("plus", "minus"):
        counts = [getattr(one, side) for one in (*versus.groups.values(), versus.total)]
        assert all(count == int(count) for count in counts)
        assert sum(counts[:-1]) == counts[-1]


def test_ungraded_samples_are_counted_and_nobodys_fault(evaluations: Path) -> None:
    found = compared(evaluations / "good", evaluations / "poor")
    measures = found.measures["AIME24"]["good"]
    assert (measures.samples, measures.ungraded) == (240, 8)
    assert (measures.average.problems, measures.average.left_out) == (29, 1)
    assert list(measures.passed) == list(measures.majority) == [1, 2, 4, 8]
    assert measures.passed[1].value == pytest.approx(measures.average.value)
    assert measures.passed[8].value > measures.passed[1].value


def test_the_table_has_the_papers_columns_in_its_order(tmp_path: Path) -> None:
    names = ["gpqa", "own_set", "olympiad-bench", "math500", "minerva", "amc23", "AIME25", "aime24"]
    folders.write(tmp_path / "e", "m", {name: Drawn(np.full(4, 0.5), 4) for name in names})
    found = compared(tmp_path / "e", model="Qwen2.5-Math-7B")
    titles = [column.title for column in found.columns]
    assert titles == ["AIME24", "AIME25", "AMC", "MATH-500", "Minerva", "Olympiad", "Avg mathematics", "GPQA", "own_set"]
    assert found.scores["paper: HPT"]["Avg mathematics"].value == pytest.approx(0.527, abs=5e-4)
    assert "own_set" not in found.scores["paper: HPT"]
    assert any("83 problems" in note and "here it is 4" in note for note in found.notes)
    with pytest.raises(DataError, match=r"the paper reports .*did you mean 'Qwen2.5-Math-7B'"):
        compared(tmp_path / "e", model="Qwen2.5-Math-8B")


def test_every_average_of_the_paper_is_that_of_its_row() -> None:
    printed = {
        "Qwen2.5-Math-7B": [19.3, 44.5, 43.1, 46.5, 49.8, 44.2, 52.7, 37.8, 40.8, 37.4, 41.0, 43.8],
        "Qwen2.5-Math-1.5B": [15.6, 36.9, 34.0, 34.7, 41.9],
        "Llama-3.1-8B": [4.6, 5.9, 9.6, 13.2, 18.2],
    }
    for model, averages in printed.items():
        rows = [[100 * row[title] for title in paper.MATHEMATICS] for row in paper.rows(model).values()]
        assert [np.mean(row) for row in rows] == pytest.approx(averages, abs=0.051)
    assert column_of("olympiad_bench") == "Olympiad"
    assert column_of("heldout") == "heldout"


def test_of_two_sets_for_one_column_the_papers_has_it(tmp_path: Path) -> None:
    folders.write(tmp_path / "e", "m", {"amc23": Drawn(np.full(4, 0.5)), "amc": Drawn(np.full(5, 0.5))})
    outcomes = read_entries([str(tmp_path / "e")])[0].outcomes
    assert {column: outcome.name for column, outcome in outcomes.items()} == {"AMC": "amc", "amc23": "amc23"}


def test_without_levels_math_is_told_apart_by_subject(tmp_path: Path) -> None:
    subjects = ("algebra", "geometry")
    drawn = Drawn(np.full(6, 0.5), name=lambda place: f"test/{subjects[place % 2]}/{place}.json")
    for name in "ab":
        folders.write(tmp_path / name, name, {"math-500": drawn})
    assert list(compared(tmp_path / "a", tmp_path / "b").versus[0].groups) == ["algebra", "geometry"]


def test_other_problems_are_refused_or_intersected(tmp_path: Path) -> None:
    folders.write(tmp_path / "a", "a", {"own": Drawn(np.full(6, 0.5), file="six.json")})
    folders.write(tmp_path / "b", "b", {"own": Drawn(np.full(4, 0.5), file="four.json")})
    folders.write(tmp_path / "c", "c", {"own": Drawn(np.full(3, 0.5), name=lambda place: f"c{place}")})
    with pytest.raises(DataError, match=r"own: these are not the same(.|\n)*2 only in a(.|\n)*six.json(.|\n)*--intersect"):
        compared(tmp_path / "a", tmp_path / "b")
    found = compared(tmp_path / "a", tmp_path / "b", intersect=True)
    assert found.versus[0].total.problems == found.measures["own"]["a"].average.problems == 4
    assert any("only the 4 problems that all have" in note for note in found.notes)
    with pytest.raises(DataError, match="no problem in common"):
        compared(tmp_path / "a", tmp_path / "c", intersect=True)


def test_the_same_ids_from_another_file_are_not_the_same_problems(tmp_path: Path) -> None:
    """Rows without an id are called by their number, in every file."""
    for name in "ab":
        folders.write(tmp_path / name, name, {"own": Drawn(np.full(4, 0.5), file=f"{name}.json")})
    with pytest.raises(DataError, match=r"the same ids and answers from different files: a.json \(\w{8}\) and b.json"):
        compared(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("protocol", "told"),
    [({"temperature": 1.0}, "temperature: 0.6 in a, 1 in b"), ({"max_tokens": 4096}, "max_tokens: 8192 in a, 4096 in b")],
)
def test_another_protocol_is_refused_or_named(tmp_path: Path, protocol: dict, told: str) -> None:
    sets = {"own": Drawn(np.full(4, 0.5))}
    folders.write(tmp_path / "a", "a", sets)
    folders.write(tmp_path / "b", "b", sets, **protocol)
    with pytest.raises(DataError, match=rf"{re.escape(told)}(.|\n)*--across-protocols"):
        compared(tmp_path / "a", tmp_path / "b")
    assert f"not the same protocol: {told}" in compared(tmp_path / "a", tmp_path / "b", across=True).notes


def test_prompts_precision_and_numbers_of_samples_may_differ_and_are_named(tmp_path: Path) -> None:
    folders.write(tmp_path / "a", "a", {"own": Drawn(np.full(4, 0.5), 2)})
    folders.write(tmp_path / "b", "b", {"own": Drawn(np.full(4, 0.5), 4)}, system_prompt="Think.")
    write_record(tmp_path / "b", replace(read_record(tmp_path / "b"), dtype="bfloat16"))
    notes = " ".join(compared(tmp_path / "a", tmp_path / "b").notes)
    assert "system_prompt: none in a, 'Think.' in b" in notes
    assert "dtype: '' in a, 'bfloat16' in b" in notes
    assert "own: samples a problem: 2 in a, 4 in b" in notes


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither the folder of an evaluation"):
        compared(tmp_path / "empty")
    folders.write(tmp_path / "e", "m", {"own": Drawn(np.full(4, 0.5))})
    with pytest.raises(DataError, match="two entries are called"):
        compared(tmp_path / "e", tmp_path / "e")
    assert [e.label for e in read_entries([str(tmp_path / "e"), f"again={tmp_path / 'e'}"])] == ["e", "again"]
    file = samples_file(tmp_path / "e", "own")
    file.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"own\.parquet: not a readable file of samples"):
        compared(tmp_path / "e")
    file.unlink()
    with pytest.raises(DataError, match="not finished, own has no samples yet"):
        compared(tmp_path / "e")


def a_run(folder: Path, final: float, lines: int = 3) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(Config(name="r", model=ModelConfig(path="m"), data=DataConfig(train="t"))))
    steps = [{"step": step, "rollout/tokens": 10, "train/tokens": 4, "gate/demonstration_weight": 0.5} for step in range(3)]
    for step, accuracy in ((0, 0.1), (2, final)):
        steps[step] |= {"eval/heldout/avg@8": accuracy, "eval/heldout/solved@8": accuracy, "eval/version": step and 3}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps[:lines]))
    return folder


def test_runs_without_samples_are_shown_by_their_metrics_and_say_so(tmp_path: Path) -> None:
    found = compared(a_run(tmp_path / "hpt", 0.75), a_run(tmp_path / "grpo", 0.5), a_run(tmp_path / "cut", 0.5, lines=2))
    assert [found.scores[name]["heldout"].value for name in ("hpt", "grpo", "cut")] == [0.75, 0.5, 0.1]
    assert not found.versus
    assert all("No sample was kept" in note for note in found.notes)
    text = shown(found)
    assert "75.0" in text
    assert re.search(r"^ hpt +1 +0.750 ± 0.000", text, re.MULTILINE)  # what it used, of the finished ones
    assert not re.search(r"^ cut +1 +", text, re.MULTILINE)


def test_a_runs_newest_evaluation_is_taken(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 0.75)
    for step, p in ((5, 0.0), (20, 1.0)):
        folders.write(run / "evaluations" / f"step_{step:06d}", "m", {"heldout": Drawn(np.full(4, p))}, step=step)
    found = compared(run, run / "evaluations" / "step_000005")
    assert found.scores["run"]["heldout"].value == 1.0
    assert found.scores["run @5"]["heldout"].value == 0.0
    assert found.versus[0].total.plus == 4
    samples_file(run / "evaluations" / "step_000020", "heldout").unlink()  # as while it is being written
    assert compared(run).scores["run"]["heldout"].value == 0.0


def shown(comparison) -> str:
    console = Console(width=150, file=io.StringIO(), color_system=None)
    show(comparison, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def test_what_is_shown_and_written(tmp_path: Path) -> None:
    """The golden output of a small case. After an intended change: HPT_GOLDEN=write pytest …"""
    import os

    for name, shift, seed in (("hpt", 0.3, 1), ("grpo", 0.0, 2)):
        sets = {
            "aime24": Drawn(np.array([0.0, 0.1, 0.4, 0.6]) + shift, 4, ungraded=1 if name == "grpo" else 0),
            "math-500": Drawn(np.full(12, 0.4 + shift), level=lambda place: str(1 + place // 6)),
        }
        folders.write(tmp_path / name, f"models/{name}", sets, seed)
    found = compared(tmp_path / "hpt", tmp_path / "grpo", model="Llama-3.1-8B")
    write(found, tmp_path / "c.md")
    for name, text in (("compare.txt", shown(found)), ("compare.md", (tmp_path / "c.md").read_text())):
        if os.environ.get("HPT_GOLDEN") == "write":
            (HERE / name).write_text(text)
        assert text == (HERE / name).read_text()


def test_files_hold_the_same_numbers(evaluations: Path, tmp_path: Path) -> None:
    found = compared(evaluations / "good", evaluations / "poor")
    for ending in WRITERS:
        write(found, tmp_path / f"c{ending}")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    (passed,) = [r for r in rows if (r["model"], r["benchmark"], r["metric"], r["k"]) == ("good", "AIME24", "pass", "8")]
    assert float(passed["value"]) == found.measures["AIME24"]["good"].passed[8].value
    tree = json.loads((tmp_path / "c.json").read_text())
    assert tree["versus"][0]["total"] == asdict(found.versus[0].total)
    assert tree["entries"][0]["evaluation"]["protocol"]["temperature"] == 0.6
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    xml.dom.minidom.parse(str(tmp_path / "c.svg"))
    page = (tmp_path / "c.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    before = (tmp_path / "c.svg").read_bytes()
    write(found, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() == before  # the same numbers are the same file


def test_a_picture_without_curves_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "e", "m", {"own": Drawn(np.full(4, 0.5))})
    with pytest.raises(DataError, match="no pass@k curves to draw"):
        write(compared(tmp_path / "e"), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
    with pytest.raises(ConfigError, match=r"known: \.md, \.html"):
        check([tmp_path / "c.docx"])


def test_names_are_no_markup(tmp_path: Path) -> None:
    folders.write(tmp_path / "e", "m", {"own": Drawn(np.full(4, 0.5))})
    found = compared(f"[red]<b>|x={tmp_path / 'e'}")
    write(found, tmp_path / "c.html")
    write(found, tmp_path / "c.md")
    assert "[red]<b>|x" in shown(found)
    assert "&lt;b&gt;|x" in (tmp_path / "c.html").read_text()
    assert r"[red]\<b>\|x" in (tmp_path / "c.md").read_text()


def test_the_command_line(evaluations: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(evaluations / "good"), f"base={evaluations / 'poor'}", "--output", str(tmp_path / "c.json")]
    found = CliRunner().invoke(app, [*arguments, "--paper", "Qwen2.5-Math-1.5B"])
    assert found.exit_code == 0, found.output
    assert "paper: LUFFY" in found.output
    assert [entry["label"] for entry in json.loads((tmp_path / "c.json").read_text())["entries"]][:2] == ["good", "base"]
