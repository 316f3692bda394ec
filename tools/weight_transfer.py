"""Weights on their way into engines: plan, push, verify, bench, watch.

    tools/weight_transfer.py plan recipes/quickstart.py                        who sends what to whom, and how long it takes
    tools/weight_transfer.py plan MODEL_DIR --actor tensor=8,pipeline=4,data=2 --engine tensor=8 --engines 4
    tools/weight_transfer.py push CHECKPOINT --to http://127.0.0.1:8000        a checkpoint into running engines
    tools/weight_transfer.py verify CHECKPOINT http://127.0.0.1:8000           is that what the engine serves?
    tools/weight_transfer.py bench                                             the transports of this machine beside memcpy
    tools/weight_transfer.py watch http://127.0.0.1:8000 …                     versions that a fleet serves

Servers that were started with a token want it in HPT_TOKEN.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_hpt import command
from megatron_hpt.errors import HptError
from megatron_hpt.settings.options import MOST_ROWS, MOST_SECONDS, number

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
out = Console(highlight=False, width=None if Console().is_terminal else 140)
Urls = Annotated[list[str], typer.Argument(help="engines, e.g. http://127.0.0.1:8000")]
Deadline = Annotated[float, number(0.1, MOST_SECONDS, "--deadline", help="seconds that an engine may take for one step")]


@app.command()
def plan(
    source: Annotated[str, typer.Argument(help="a recipe, or a model folder (config.json is enough)")],
    actor: Annotated[str, typer.Option(help="actor layout of a model folder, e.g. tensor=8,pipeline=4,data=2")] = "",
    engine: Annotated[str, typer.Option(help="layout of each engine: tensor, pipeline, expert")] = "",
    engines: Annotated[int, number(0, 2**17, help="number of engines")] = 0,
    transport: Annotated[str, typer.Option(help="shared_memory, files, gloo, cuda_ipc or nccl")] = "nccl",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or float8_e4m3fn (one byte an element)")] = "bfloat16",
    send: Annotated[float, number(1e-3, 1e6, help="10^9 bytes/s that one actor rank sends")] = 50.0,
    receive: Annotated[float, number(1e-3, 1e6, help="10^9 bytes/s that one engine rank receives")] = 50.0,
) -> None:
    """Print who sends how much to whom, the lower bound, and the predicted seconds. Nothing is started."""
    from megatron_hpt.transfer import plan_report

    started = time.perf_counter()
    case = plan_report.of_source(source, actor, engine, engines, dtype)
    found = plan_report.make(case, transport)
    plan_report.show(out, case, found, send, receive, time.perf_counter() - started)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or a version written by transport=files")],
    to: Annotated[list[str], typer.Option("--to", help="an engine; may be repeated")],
    version: Annotated[int, number(0, MOST_ROWS, help="version that the engines will report")] = 0,
    deadline: Deadline = 120.0,
) -> None:
    """Bring a checkpoint into running engines, whole or not at all; the engines compare what they hold with it."""
    from megatron_hpt.engines.registry import connect
    from megatron_hpt.transfer.from_folder import describe

    contents, manifest = describe(checkpoint, version)

    def one(url: str) -> dict[str, float] | HptError:
        try:
            control = connect(url, deadline)
            control.prepare(contents)
            seconds = control.update(manifest)
            control.resume()
            return seconds
        except HptError as error:
            return error

    started = time.perf_counter()
    with ThreadPoolExecutor(len(to)) as pool:
        outcomes = dict(zip(to, pool.map(one, to), strict=True))
    for url, outcome in outcomes.items():
        if not isinstance(outcome, HptError):
            steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in outcome.items())
            out.print(f"{url} serves version {manifest.version} ({contents.nbytes / 1e6:.1f} MB; {steps})")
    failed = [error for error in outcomes.values() if isinstance(error, HptError)]
    if failed:
        raise HptError("\n".join(map(str, failed)))
    out.print(f"{len(to)} engines in {time.perf_counter() - started:.2f} s")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or a version written by transport=files")],
    urls: Urls,
    deadline: Deadline = 120.0,
) -> None:
    """Compare what engines hold with a checkpoint, tensor by tensor; exits with 1 and names the first that differs."""
    from megatron_hpt.engines.registry import connect
    from megatron_hpt.transfer.from_folder import describe

    contents, manifest = describe(checkpoint, 0)
    failed = []
    for url in urls:
        try:
            control = connect(url, deadline)
            control.compare(contents, manifest)
            out.print(f"{url} holds {checkpoint}, all {len(contents.shapes)} tensors (it reports version {control.version()})")
        except HptError as error:
            failed.append(str(error))
    if failed:
        raise HptError("\n".join(failed))


@app.command()
def bench(
    megabytes: Annotated[int, number(1, 10**6, help="10^6 bytes of float32 to move")] = 512,
    tensors: Annotated[int, number(1, 10**5, help="number of tensors")] = 200,
    folder: Annotated[Path | None, typer.Option(help="where files are written; default: the temporary folder")] = None,
) -> None:
    """Move weights between this process's sending and receiving ends, beside copying memory once."""
    from megatron_hpt.transfer.speed import local_speed

    table = Table("transport", "stage s", "receive s", "GB/s", "of memcpy")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for transport in ("shared_memory", "files"):
            speed = local_speed(transport, [megabytes * 10**6 // 4 // tensors] * tensors, Path(place))
            seconds = speed.stage_s + speed.receive_s
            row = (f"{speed.stage_s:.3f}", f"{speed.receive_s:.3f}", f"{speed.nbytes / seconds / 1e9:.1f}")
            table.add_row(transport, *row, f"{speed.of_memcpy:.2f}")
    out.print(table)


@app.command()
def watch(
    urls: Urls,
    every: Annotated[float, number(0.1, 86_400, help="seconds between looks")] = 2.0,
    times: Annotated[int, number(0, MOST_ROWS, help="looks; 0: until Ctrl-C")] = 0,
) -> None:
    """Show the versions that a fleet serves."""
    looks = 0
    with Live(console=out, auto_refresh=False) as live, ThreadPoolExecutor(len(urls)) as pool:
        while not times or looks < times:
            if looks:
                time.sleep(every)
            table = Table("engine", "version", "running", "waiting", "cache", "")
            for url, cells in zip(urls, pool.map(_look, urls), strict=True):
                table.add_row(url, *cells)
            live.update(table, refresh=True)
            looks += 1


def _look(url: str) -> tuple[str, ...]:
    from megatron_hpt.engines.registry import connect

    try:
        control = connect(url, 2.0)
        version, load = control.version(), control.load()
    except HptError as error:
        return "-", "-", "-", "-", str(error)
    return (
        *("none of ours" if version is None else str(version), str(load.running), str(load.waiting)),
        *(f"{load.cache:.0%}", ""),
    )


if __name__ == "__main__":
    command.run(app)
