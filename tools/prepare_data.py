"""Write the parquet files that recipes train and evaluate on (docs/data.md).

    python tools/prepare_data.py openr1 SOURCE data/openr1.parquet [--system-prompt keep]
    python tools/prepare_data.py benchmarks DIR data
    python tools/prepare_data.py gsm8k SOURCE OUT
    python tools/prepare_data.py math SOURCE OUT
    python tools/prepare_data.py columns SOURCE OUT prompt=question answer=final demonstration=solution
    python tools/prepare_data.py reasoning-gym TASK OUT --rows 10000
    python tools/prepare_data.py arithmetic DIR
    python tools/prepare_data.py word-problems DIR

SOURCE is a parquet, JSON or JSONL file, a folder of them, or a dataset of the Hugging Face hub, OWNER/NAME or OWNER/NAME/GLOB.
A demonstration must end in the form that the run's reward reads, or what is learnt from it earns nothing: for math and choice
the answer in \\boxed{…}, which --box puts behind those that have none.
What is wrong with a row is said in _OUT.rejects.jsonl, by file and row; --drop says what of it costs the row its place.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_hpt import command
from megatron_hpt.config import Config, DataConfig, ModelConfig, RewardConfig
from megatron_hpt.errors import DataError
from megatron_hpt.examples import arithmetic as sums
from megatron_hpt.examples import word_problems as words
from megatron_hpt.files import check_file
from megatron_hpt.preparation import formats
from megatron_hpt.preparation.checks import Grade, Lengths
from megatron_hpt.preparation.findings import UNUSABLE, FindingKind
from megatron_hpt.preparation.formats import RecordFormat
from megatron_hpt.preparation.hub import find
from megatron_hpt.preparation.overlap import WORDS
from megatron_hpt.preparation.pipeline import Preparation, PreparationPlan, rejects_path
from megatron_hpt.preparation.reading import Files, RecordBatch
from megatron_hpt.preparation.sets import held_out, sets_in
from megatron_hpt.preparation.summary import told
from megatron_hpt.settings.options import MOST_ROWS, MOST_TOKENS, number
from megatron_hpt.settings.values import NotAValue, given_value

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
_SAY_EVERY_S = 30
"""Where the output is not a terminal."""

Drop = Enum("Drop", {kind.name: kind.value for kind in FindingKind if kind not in UNUSABLE})
SystemPrompt = Enum("SystemPrompt", {"STRIP": "strip", "KEEP": "keep"})
Answers = Enum("Answers", {"ENTRY": "entry", "TEXT": "text"})
Source = Annotated[str, typer.Argument(help="file, folder, or OWNER/NAME or OWNER/NAME/GLOB of the hub")]
Out = Annotated[Path, typer.Argument(help="parquet file to write")]
Folder = Annotated[Path, typer.Argument(help="folder for train.parquet and heldout.parquet")]


@dataclass(frozen=True)
class Options:
    """Of every command that reads problems; the fields become options."""

    split: Annotated[
        str,
        typer.Option(
            help="written to extra_info.split; default: what the names of the files say, else train; of benchmarks test"
        ),
    ] = ""
    instruction: Annotated[str, typer.Option(help="a line after every question")] = ""
    tokenizer: Annotated[Path | None, typer.Option(help="model folder: lengths are in its tokens")] = None
    chat_template: Annotated[str | None, typer.Option(help="in place of the tokenizer's, as data.chat_template")] = None
    max_prompt: Annotated[int | None, number(1, MOST_TOKENS, help="more tokens are a long-prompt")] = None
    max_response: Annotated[int | None, number(1, MOST_TOKENS, help="more tokens are a long-demonstration")] = None
    against: Annotated[list[Path] | None, typer.Option(help="file or folder of test sets to compare with")] = None
    words: Annotated[int, number(1, MOST_ROWS, help="in a row, in common with a test problem: contaminated")] = WORDS
    reward: Annotated[str | None, typer.Option(help="grade demonstrations against their answers, e.g. math")] = None
    workers: Annotated[int, number(1, 4096, help="grader processes")] = 2
    box: Annotated[bool, typer.Option("--box", help="end demonstrations without \\boxed{…} with their answer in a box")] = False
    drop: Annotated[list[Drop] | None, typer.Option(help="leave out rows with this finding; may be repeated")] = None

    def check(self) -> None:
        """An option without the one it needs would do nothing."""
        asked = {f"--drop {one.value}": self._needed(FindingKind(one.value)) for one in self.drop or ()}
        asked |= {
            f"--{name.replace('_', '-')}": [("--tokenizer", self.tokenizer)] for name in _OF_LENGTHS if getattr(self, name)
        }
        for option, needs in asked.items():
            for name, given in needs:
                if not given:
                    raise DataError(f"{option} needs {name}")

    def _needed(self, kind: FindingKind) -> list[tuple[str, Any]]:
        return {
            FindingKind.CONTAMINATED: [("--against", self.against)],
            FindingKind.WRONG: [("--reward", self.reward)],
            FindingKind.LONG_PROMPT: [("--max-prompt", self.max_prompt)],
            FindingKind.LONG_DEMONSTRATION: [("--max-response", self.max_response)],
        }.get(kind, [])

    def lengths(self) -> Lengths | None:
        """How lengths are counted."""
        if self.tokenizer is None:
            return None
        from megatron_hpt.models.tokenizer import load_tokenizer

        data = DataConfig(train="none", chat_template=self.chat_template)
        tokenizer = load_tokenizer(Config(name="preparation", model=ModelConfig(path=str(self.tokenizer)), data=data))
        return Lengths(tokenizer, self.max_prompt, self.max_response)


_OF_LENGTHS = ("chat_template", "max_prompt", "max_response")


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose last parameter is `options: Options` gets its fields as options of the command line."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for name, one in signature.parameters.items() if name != "options"]
    shared = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        for field, annotation in zip(fields(Options), inspect.get_annotations(Options, eval_str=True).values(), strict=True)
    ]

    @wraps(command)
    def with_fields(**given: Any) -> None:
        options = Options(**{one.name: given.pop(one.name) for one in shared})
        options.check()
        command(**given, options=options)

    with_fields.__signature__ = signature.replace(parameters=[*own, *shared])
    with_fields.__annotations__ = {one.name: one.annotation for one in (*own, *shared)}
    return with_fields


@app.command()
@with_options
def openr1(
    source: Source,
    out: Out,
    system_prompt: Annotated[SystemPrompt, typer.Option(help="HPT's numbers are without it")] = SystemPrompt.STRIP,
    *,
    options: Options,
) -> None:
    """Elliott/Openr1-Math-46k-8192, and other parquet in veRL's schema."""
    _prepare(source, formats.openr1(system_prompt is SystemPrompt.KEEP), out, options)


@app.command()
@with_options
def benchmarks(
    folder: Annotated[Path, typer.Argument(help="test sets: NAME.json or NAME/test.json, arrays of {prompt, answer}")],
    out: Annotated[Path, typer.Argument(help="folder for a parquet file each, named in lower case without hyphens")],
    *,
    options: Options,
) -> None:
    """Test sets; sources and ids are kept where they have any."""
    for name, files in sets_in(folder).items():
        target = out / f"{name.lower().replace('-', '').replace('_', '')}.parquet"
        _prepare(files, formats.benchmark(name.lower()), target, options, split="test")


@app.command()
@with_options
def gsm8k(source: Source, out: Out, *, options: Options) -> None:
    """GSM8K's question and answer: the steps become demonstrations whose last line boxes what stands after ####."""
    _prepare(source, formats.GSM8K, out, options)


@app.command()
@with_options
def math(source: Source, out: Out, *, options: Options) -> None:
    """MATH's problem and solution: the answer is what the solution boxes."""
    _prepare(source, formats.MATH, out, options)


@app.command()
@with_options
def columns(
    source: Source,
    out: Out,
    mapping: Annotated[list[str], typer.Argument(help="prompt=… answer=… [demonstration=… system=… id=… source=… level=…]")],
    data_source: Annotated[str, typer.Option(help="data_source of rows without one; default: OUT's name")] = "",
    *,
    options: Options,
) -> None:
    """Any file, by the columns that prompt, answer and others are in; a.b is a field of a record."""
    roles = _once(one.partition("=")[::2] for one in mapping)
    if unnamed := [role for role, column in roles.items() if not column]:
        raise DataError(f"given {unnamed[0]!r}; expected ROLE=COLUMN, e.g. prompt=question")
    _prepare(source, formats.mapped(data_source or out.stem, roles), out, options)


@app.command()
@with_options
def reasoning_gym(
    task: Annotated[str, typer.Argument(help="e.g. leg_counting")],
    out: Out,
    parameters: Annotated[list[str] | None, typer.Argument(help="of the task, in YAML, e.g. min_animals=2")] = None,
    rows: Annotated[int, number(1, MOST_ROWS)] = 10_000,
    seed: Annotated[int, number(0, MOST_ROWS)] = 0,
    answers: Annotated[
        Answers, typer.Option(help="entry: judged by the task's own scoring; text: by any reward")
    ] = Answers.ENTRY,
    *,
    options: Options,
) -> None:
    """Problems that reasoning-gym generates."""
    from megatron_hpt.preparation.generated import generate

    check_file(out)
    given = _once(_parameter(one) for one in parameters or ())
    problems = generate(task, rows, seed, given)
    _write(problems.batches(), problems.rows, problems.format(answers is Answers.ENTRY), out, options)


@app.command()
def arithmetic(
    out: Folder, held_out: Annotated[int, number(1, 700)] = 64, seed: Annotated[int, number(0, MOST_ROWS)] = 0
) -> None:
    """Sums of three numbers from 1 to 9, every step written out (the quickstart's task)."""
    sums.write(out, held_out, seed)
    print(f"wrote {out}/train.parquet and {out}/heldout.parquet")


@app.command()
def word_problems(
    out: Folder, train: Annotated[int, number(1, 900_000)] = 2000, held_out: Annotated[int, number(1, 900_000)] = 48
) -> None:
    """Grade-school word problems with step-by-step solutions, from reasoning-gym's gsm_symbolic."""
    words.write(out, train, held_out)
    print(f"wrote {train} problems to {out}/train.parquet and {held_out} to {out}/heldout.parquet")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs by name.

    Raises:
        DataError: a name stands twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DataError(f"{name}: given twice, {found[name]!r} and {value!r}")
        found[name] = value
    return found


def _parameter(given: str) -> tuple[str, Any]:
    name, equals, text = given.partition("=")
    if not name or not equals:
        raise DataError(f"given {given!r}; expected NAME=VALUE, e.g. min_animals=2")
    try:
        return name, given_value(text)
    except NotAValue as error:
        raise DataError(f"{name}: {error}") from None


def _keep_source(source: str | Files, paths: Iterable[str], out: Path) -> None:
    """What is written is none of the files that are read, and does not lie in the folder whose files are.

    Raises:
        DataError: it would.
    """
    target = out.resolve()
    folder = Path(source).resolve() if isinstance(source, str) else None
    if any(Path(path).resolve() == target for path in paths) or (folder and folder.is_dir() and folder in target.parents):
        raise DataError(f"{out}: is one of the source's files, or would be read as one the next time; write to another folder")


def _prepare(source: str | Files, form: RecordFormat, out: Path, options: Options, split: str = "") -> None:
    check_file(out)
    files = find(source) if isinstance(source, str) else source
    _keep_source(source, files.paths, out)
    files.require(form.needed)
    _write(files.batches(form.columns), files.nbytes, form, out, options, split or files.split or "train", files.paths)


def _write(
    batches: Iterable[RecordBatch],
    total: int,
    form: RecordFormat,
    out: Path,
    options: Options,
    split: str = "train",
    sources: Sequence[Path] = (),
) -> None:
    started = time.monotonic()
    with ExitStack() as stack:
        plan = PreparationPlan(
            form,
            options.split or split,
            options.instruction,
            options.lengths(),
            held_out(options.against, options.words, {out, *sources}) if options.against else None,
            stack.enter_context(_graders(options.reward, options.workers)) if options.reward else None,
            frozenset(FindingKind(one.value) for one in options.drop or ()),
            options.box,
        )
        advance = stack.enter_context(_progress(out.name, total))
        summary = Preparation(plan).write(batches, out, advance)
    unit = "tokens" if options.tokenizer else "characters"
    print("\n".join(told(summary, out, rejects_path(out), unit, time.monotonic() - started)))


@contextmanager
def _graders(reward: str, workers: int) -> Iterator[Grade]:
    from megatron_hpt.rewards.pool import GraderPool
    from megatron_hpt.rewards.registry import check_name

    check_name(reward)
    with GraderPool(RewardConfig(name=reward, workers=workers)) as pool:
        yield lambda answers: [grade.score for grade in asyncio.run(pool.grade(answers))]


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shares of the total as they are done: a bar with the time left, or a line now and then."""
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*bar, console=console, disable=not console.is_terminal) as progress:
        task, said = progress.add_task(what, total=total), time.monotonic()

        def advance(done: int) -> None:
            nonlocal said
            progress.advance(task, done)
            if not console.is_terminal and time.monotonic() - said > _SAY_EVERY_S:
                said, state = time.monotonic(), progress.tasks[task]
                print(
                    f"{what}: {state.percentage:.0f} %, time left {state.time_remaining or 0:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance


if __name__ == "__main__":
    command.run(app)
