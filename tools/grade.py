"""Grade a file of answers (JSONL or parquet), and see where two graders disagree.

tools/grade.py ANSWERS.jsonl --response output --truth reward_model.ground_truth
tools/grade.py ANSWERS.parquet --grader math --against math_strict --out GRADES.parquet
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_hpt import command
from megatron_hpt.config import RewardConfig
from megatron_hpt.evaluation.grading import settings_of
from megatron_hpt.overrides import reward_alone
from megatron_hpt.rewards import regrade
from megatron_hpt.rewards.grades import Answer, Grade
from megatron_hpt.settings.options import MOST_ROWS, MOST_SECONDS, number

WIDTH = 400
"""Characters of a response that are shown: its end, where the answer is."""


def main(
    file: Annotated[Path, typer.Argument(help="answers: .parquet, or one JSON object a line")],
    grader: Annotated[str, typer.Option(help="a reward, or a sum such as {math: 0.9, format: 0.1}: docs/rewards.md")] = "math",
    against: Annotated[str | None, typer.Option(help="another, to compare with")] = None,
    response: Annotated[str, typer.Option(help="column of the responses; a.b is a field of a record")] = "response",
    truth: Annotated[str, typer.Option(help="column of the ground truths")] = "ground_truth",
    source: Annotated[str, typer.Option(help="column of the data sources, if any")] = "data_source",
    prompt: Annotated[str, typer.Option(help="column of the prompts, if any")] = "prompt",
    out: Annotated[Path | None, typer.Option(help="the rows with their grades: .parquet or .jsonl")] = None,
    show: Annotated[int, number(0, MOST_ROWS, help="disagreements to print")] = 10,
    workers: Annotated[int, number(1, 4096, help="grader processes")] = 2,
    deadline_s: Annotated[float, number(0.01, MOST_SECONDS, help="seconds an answer may take")] = 10.0,
    setting: Annotated[list[str] | None, typer.Option("--set", help="another setting, e.g. reward.code.time_s=2")] = None,
) -> None:
    console = Console(soft_wrap=True)
    if out:
        regrade.check_out(out, file)
    rows = regrade.read_rows(file)
    if out:
        regrade.check_rows(out, rows)
    doubts = list(regrade.doubtful(rows))
    for doubt in doubts[:show]:
        console.print(f"note: {doubt}", markup=False, highlight=False)
    if doubts[show:]:
        console.print(f"note: and so {len(doubts) - show} more", highlight=False)
    answers = regrade.answers_of(rows, regrade.Columns(response, truth, source, prompt), file)
    shared = reward_alone(setting or [], workers=workers, deadline_s=deadline_s)
    settings = {name: settings_of(name, shared) for name in dict.fromkeys([grader, against or grader])}
    graded = {name: grade(console, name, answers, each) for name, each in settings.items()}
    if out:
        regrade.write(out, rows, graded)
    if against and against != grader:
        report_disagreements(console, answers, graded[grader], graded[against], (grader, against), show)


def grade(console: Console, name: str, answers: list[Answer], reward: RewardConfig) -> list[Grade]:
    """All grades of one reward, and a line about them."""
    started = time.monotonic()
    with Progress(*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=len(answers))
        grades = regrade.grade_in_bunches(answers, reward, lambda done: progress.update(task, completed=done))
    found, seconds = regrade.summary(grades), time.monotonic() - started
    lost = ", ".join(f"{cause} {count}" for cause, count in found["ungraded"].items()) or "none"
    means = "" if found["mean"] is None else f"mean {found['mean']:.4f}, right {found['right']:.1%}, "
    console.print(
        f"{name}: {found['answers']} answers, {means}ungraded: {lost}; {seconds:.1f} s", markup=False, highlight=False
    )
    return grades


def report_disagreements(
    console: Console, answers: list[Answer], first: list[Grade], second: list[Grade], names: tuple[str, str], show: int
) -> None:
    """How many there are, and some of them."""
    places = list(regrade.disagreements(first, second))
    ups = sum(first[place].score > second[place].score for place in places)
    console.print(
        f"{len(places)} disagreements of {len(answers)}: {names[0]} is higher in {ups}, {names[1]} in {len(places) - ups}"
    )
    table = Table("row", *names, "ground truth", "response (its end)", show_lines=True)
    for place in places[:show]:
        answer = answers[place]
        scores = [f"{grades[place].score:g}" for grades in (first, second)]
        table.add_row(str(place), *scores, *map(escaped, (answer.ground_truth, answer.response[-WIDTH:])))
    if places and show:
        console.print(table)


def escaped(text: str) -> str:
    """Text in which rich finds no markup, and a terminal no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text).replace("[", "\\[")


if __name__ == "__main__":
    command.run(lambda: typer.run(main), error_code=2)
