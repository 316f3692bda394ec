"""The command line: ``megatron-hpt train``, ``megatron-hpt report``. Imports what a command needs, when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_hpt import command, environment
from megatron_hpt.errors import ConfigError
from megatron_hpt.settings.options import MOST_ROWS, MOST_SECONDS, MOST_TOKENS, number, processes
from megatron_hpt.settings.options import samples as samples_option

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
RUNS = Path("runs")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings, e.g. trainer.steps=20, or @FILE of them; the recipe's arguments, e.g. method=grpo"),
]


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the newest run of this recipe, or the given run directory")
    ] = False,
    from_ledger: Annotated[
        bool, typer.Option("--from-ledger", help="train the batches of the given run directory again, without engines")
    ] = False,
) -> None:
    """Train a recipe on this machine, in a new run directory under runs/."""
    from megatron_hpt.launch.train import resume_run, start_from_ledger, start_run

    if resume and from_ledger:
        raise ConfigError("--resume continues a run, --from-ledger begins a new one from its batches; give one of both")
    command.goes_on_without_output()
    console = Console()
    begin = resume_run if resume else start_from_ledger if from_ledger else start_run
    run = begin(recipe, overrides or [], RUNS)
    console.print(f"[green]done[/green]  {run.path}  (curves: {run.report})", highlight=False)


@app.command(context_settings={"allow_interspersed_args": True})
def slurm(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
    ranks_per_node: Annotated[int, number(1, 1024, help="trainer ranks of a node: its GPUs")] = 8,
    health: Annotated[str, typer.Option(help="command that fails on a sick node")] = "true",
    srun: Annotated[str, typer.Option(help="more arguments of every srun, e.g. --container-image=…")] = "",
    python: Annotated[str, typer.Option(help="interpreter on the nodes")] = sys.executable,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print nodes and command lines, start nothing")] = False,
) -> None:
    """Train a recipe on the nodes of the Slurm job around this: what the scripts in slurm/ end in.

    Nodes that fail the health check are left out; a run of the recipe's name is continued; a job that is ended by a notice
    or a failure is requeued.
    """
    from megatron_hpt.launch.slurm.job import Site, plan_job, run_job

    site = Site(ranks_per_node, python, srun, health)
    if dry_run:
        sys.stdout.write(plan_job(recipe, overrides or [], site))
        return
    command.goes_on_without_output()
    run = run_job(recipe, overrides or [], RUNS, site)
    Console().print(f"[green]done[/green]  {run.path}  (curves: {run.report})", highlight=False)


Site = Annotated[str, typer.Option(help="where it runs: a file, or a name in recipes/sites/")]
Experiment = Annotated[str, typer.Argument(help="what launch printed")]


@app.command(context_settings={"allow_interspersed_args": True})
def launch(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
    site: Site = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, start nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the job has ended; fail if it has")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="show its output, until it has ended")] = False,
) -> None:
    """Send a recipe to a cluster by NeMo-Run (make nemo-env)."""
    from megatron_hpt.launch.nemo import experiments

    if dry_run:
        sys.stdout.write(experiments.dry_run(recipe, overrides or [], site))
    else:
        Console().print(f"launched  {experiments.launch(recipe, overrides or [], site, wait, logs)}", highlight=False)


@app.command()
def status(experiment: Experiment) -> None:
    """Show the state of what was launched, and its job's number."""
    from megatron_hpt.launch.nemo.experiments import status

    for name, state in status(experiment).items():
        Console().print(f"{name}  {state}", highlight=False)


@app.command()
def logs(experiment: Experiment) -> None:
    """Show the output of what was launched."""
    from megatron_hpt.launch.nemo.experiments import show_logs

    show_logs(experiment)


@app.command()
def cancel(experiment: Experiment) -> None:
    """End what was launched, without saving."""
    from megatron_hpt.launch.nemo.experiments import cancel

    cancel(experiment)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option(help="cluster file (recipes/clusters/); default: enough nodes of 8 H100")
    ] = None,
    nodes: Annotated[int | None, processes("nodes of the cluster; default: those of its file")] = None,
    fill: Annotated[float, number(0.01, 1, help="mean length of prompts and responses, as a share of their limits")] = 0.5,
    response_tokens: Annotated[float | None, number(1, MOST_TOKENS, help="mean length of responses, instead")] = None,
    lengths: Annotated[Path | None, typer.Option(help="run directory: lengths are those of its rollouts, instead")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="show the fastest layouts that fit, instead of the recipe's")
    ] = False,
    taught: Annotated[float, number(0, 1, help="search: share of prompts taught by their demonstration")] = 0.25,
    max_lag: Annotated[
        int, number(0, 16, help="search: largest rollout.max_lag to try; 0: rollouts and training alternate")
    ] = 2,
    write: Annotated[Path | None, typer.Option(help="search: file for the fastest one's settings; recipes take @FILE")] = None,
) -> None:
    """Show what a recipe takes before it runs: places, memory, seconds, bytes; refuse what does not fit, with what does."""
    from megatron_hpt.files import check_file
    from megatron_hpt.plan import table
    from megatron_hpt.plan.assumptions import Assumptions
    from megatron_hpt.plan.plan import of_recipe, search_recipe
    from megatron_hpt.plan.search import table as search_table

    assumptions = Assumptions(cluster, nodes, fill, response_tokens, lengths)
    if not search:
        found = of_recipe(recipe, overrides or [], assumptions)
        table.show(found, _wide_console())
        found.require_fit()
        return
    if write:
        check_file(write)
    ranking = search_recipe(recipe, overrides or [], assumptions, taught, max_lag)
    search_table.show(ranking, _wide_console())
    if write:
        search_table.write(write, ranking)
        Console().print(f"wrote {write}: megatron-hpt train {recipe} … @{write}", highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories; their curves are overlaid")],
    out: Annotated[
        Path | None, typer.Option(help="the page; default: report.html in the run directory, of several runs in this folder")
    ] = None,
) -> None:
    """Write the page to send to colleagues: curves, the gate, answers; one self-contained HTML file, and a PNG beside it."""
    from megatron_hpt.run import open_run
    from megatron_hpt.telemetry.report.write import write_report

    Console().print(f"wrote {write_report([open_run(run) for run in runs], out)}", highlight=False, soft_wrap=True)


@app.command(context_settings={"allow_interspersed_args": True})
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, checkpoint, run directory, or http://host:port of servers")
    ],
    benchmarks: Annotated[str, typer.Option(help="names and files, e.g. aime24,math-500@4,my.parquet (docs/evaluation.md)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings, e.g. rollout.engine=sglang model.dtype=bfloat16")
    ] = None,
    data: Annotated[Path, typer.Option(help="folder of the named sets: parquet, or JSON as published")] = Path("data"),
    out: Annotated[Path | None, typer.Option(help="folder of the evaluation; default: evaluations/NAME")] = None,
    samples: Annotated[int | None, samples_option("a problem; default: 32 for the small sets, 1 elsewhere")] = None,
    grader: Annotated[str | None, typer.Option(help="a reward or a sum of some; default: each set's own")] = None,
    temperature: Annotated[float, number(1e-3, 100)] = 0.6,
    top_p: Annotated[float, number(1e-6, 1)] = 0.95,
    max_tokens: Annotated[int, number(1, MOST_TOKENS, help="of a response")] = 8192,
    seed: Annotated[int, number(0, MOST_ROWS, help="of all samples")] = 0,
    system_prompt: Annotated[str | None, typer.Option(help="put before every problem; simplerl: the paper's")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="of a server's model, where its folder is not on this machine")] = None,
) -> None:
    """Sample test sets, grade, print one table with confidence intervals; every sample is kept.

    When interrupted, the same command goes on where it was.
    """
    from megatron_hpt.launch.evaluate.command import evaluate
    from megatron_hpt.launch.evaluate.request import EvaluationOptions

    options = EvaluationOptions(
        data, out, samples, grader, temperature, top_p, max_tokens, seed, system_prompt, tokenizer, overrides or []
    )
    _print_evaluation(evaluate(model, benchmarks.split(","), options, Console()))


@app.command(context_settings={"allow_interspersed_args": True})
def regrade(
    evaluation: Annotated[Path, typer.Argument(help="folder of an evaluation")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, e.g. reward.http.url=http://node7:8000")] = None,
    grader: Annotated[
        str | None, typer.Option(help="a reward or a sum of some, for all sets; default: each set's, as it is now")
    ] = None,
    workers: Annotated[int, number(1, 4096, help="grader processes")] = 1,
    deadline: Annotated[float, number(0.1, MOST_SECONDS, help="seconds for an answer")] = 10.0,
) -> None:
    """Grade an evaluation's samples again, without an engine, and print its table."""
    from megatron_hpt.launch.evaluate.command import regrade
    from megatron_hpt.overrides import reward_alone

    regrade(evaluation, grader, reward_alone(overrides or [], workers=workers, deadline_s=deadline))
    _print_evaluation(evaluation)


def _print_evaluation(folder: Path) -> None:
    from megatron_hpt.comparison.summary import table
    from megatron_hpt.evaluation.benchmarks import BENCHMARKS
    from megatron_hpt.launch.evaluate.command import summaries

    drawn = table(summaries(folder), {name: row.title for name, row in BENCHMARKS.items()})
    # A narrow terminal breaks the lines; the table would rather leave figures out.
    needed = Console(width=1000).measure(drawn).maximum
    console = Console(width=max(Console().width, needed))
    console.print(drawn)
    console.print(f"every sample: {folder}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    entries: Annotated[list[str], typer.Argument(help="folders of evaluations and run directories, as PATH or NAME=PATH")],
    paper: Annotated[
        str | None, typer.Option(help="show the paper's rows too: Qwen2.5-Math-7B, Qwen2.5-Math-1.5B or Llama-3.1-8B")
    ] = None,
    intersect: Annotated[
        bool, typer.Option("--intersect", help="where problems differ, compare on those that all have")
    ] = False,
    across_protocols: Annotated[
        bool, typer.Option("--across-protocols", help="compare what was sampled or graded differently")
    ] = False,
    output: Annotated[
        list[Path] | None, typer.Option(help="write a file too: .md, .html, .csv, .json, .png or .svg; may be repeated")
    ] = None,
) -> None:
    """Compare models: a table of results, pass@k and maj@k, and what the first solves that each of the others does not."""
    from megatron_hpt.comparison.comparison import compare
    from megatron_hpt.comparison.output import check, show, write

    check(output or [])
    found = compare(entries, paper, intersect, across_protocols)
    show(found, _wide_console())
    for path in output or []:
        write(found, path)
        Console().print(f"wrote {path}", highlight=False)


@app.command()
def config(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration of a recipe, every default written out, if train would take it."""
    from megatron_hpt.launch import settings_checks
    from megatron_hpt.overrides import dump_yaml
    from megatron_hpt.recipe import load

    config = load(recipe, overrides or []).config
    settings_checks.check(config)
    sys.stdout.write(dump_yaml(config))


@app.command(context_settings={"allow_interspersed_args": True})
def check(
    recipe: Annotated[str, typer.Argument(help="recipe file, saved config.yaml, or run directory")],
    overrides: Overrides = None,
) -> None:
    """Look at a recipe's settings, model, tokenizer, data and engine arguments as train would; start nothing."""
    from megatron_hpt.launch.check import check_recipe

    check_recipe(recipe, overrides or [], RUNS, _wide_console())


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="a row to explain, or module:function for one of your own")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="its settings, e.g. gate.threshold=2")] = None,
) -> None:
    """Print the table of algorithms, or explain one of them with its formula."""
    from megatron_hpt.objective.explain import explain, print_table

    if name is None:
        print_table(_wide_console())
    else:
        sys.stdout.write(explain(name, overrides or []))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="run directory")],
    gate: Annotated[list[str], typer.Option(help="a setting of the other gate, e.g. threshold=2; may be repeated")],
) -> None:
    """Show what another gate would have decided on a run's rollouts, per step, from its ledger alone."""
    from megatron_hpt.telemetry.replay import print_replay

    print_replay(run, gate, _wide_console())


@app.command()
def doctor(
    node: Annotated[
        bool, typer.Option("--node", help="only the quick health check, on one line: what a batch job asks")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="findings as JSON")] = False,
    gpus: Annotated[int | None, number(0, 1024, help="GPUs that there must be; default: as many as there are")] = None,
    folder: Annotated[Path, typer.Option(help="folder of the runs, on a file system that all nodes see")] = RUNS,
) -> None:
    """Say what this machine can run, what is missing and what to do; exit code 1 if something is broken."""
    from megatron_hpt.doctor.doctor import MACHINE, NODE, examined
    from megatron_hpt.doctor.health import CheckContext

    report = examined(NODE if node else MACHINE, CheckContext(folder, gpus))
    if as_json:
        sys.stdout.write(report.as_json() + "\n")
    elif node:
        sys.stdout.write(report.as_line() + "\n")
    else:
        report.print_table(_wide_console())
    if report.sick:
        raise typer.Exit(1)


def _wide_console() -> Console:
    """For tables: the terminal's width, and room enough where there is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=180)


def main() -> None:
    """Entry point; an error is one message and exit code 1 (130: interrupted, 75: to be continued, 70: hopeless)."""
    environment.clear()
    command.run(app)


if __name__ == "__main__":
    main()
