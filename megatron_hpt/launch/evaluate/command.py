"""``megatron-hpt evaluate``: samples and grades test sets with a model, and keeps every sample."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from megatron_hpt.comparison.measures import Measures, measured
from megatron_hpt.comparison.outcomes import read_problems
from megatron_hpt.config import RewardConfig
from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.pool import EnginePool, Patience
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.engines.types import OWN, Versions
from megatron_hpt.errors import DataError, Interrupted
from megatron_hpt.evaluation.collecting import Collection, SampleSource
from megatron_hpt.evaluation.grading import Graders, checked_grader
from megatron_hpt.evaluation.resume import claimed, continued
from megatron_hpt.evaluation.samples import check_complete, read_record, read_samples, samples_file, write_record, write_samples
from megatron_hpt.launch.evaluate.request import EvaluationJob, EvaluationOptions, prepare
from megatron_hpt.launch.evaluate.servers import Servers
from megatron_hpt.launch.launchers import gpus_here
from megatron_hpt.launch.overridden_models import write_overridden
from megatron_hpt.models.checkpoints import is_checkpoint
from megatron_hpt.telemetry.progress import Counter


def evaluate(model: str, benchmarks: Sequence[str], options: EvaluationOptions, console: Console) -> Path:
    """Evaluate a model, or go on where an interrupted evaluation of the same kind ended.

    Returns:
        The folder with every sample.

    Raises:
        ConfigError, ModelError, DataError: raised before anything starts; name what was given and what is allowed.
        EngineError, DeadlineError: the engines failed; what has been sampled is kept.
        Interrupted: SIGINT or SIGTERM came; what has been sampled is kept.
    """
    job = prepare(model, benchmarks, options)
    job.folder.mkdir(parents=True, exist_ok=True)
    with claimed(job.folder), _interruptible():
        record = continued(job.folder, job.record)
        write_record(job.folder, record)
        with Collection(job.folder, record, job.sets) as collection:
            _collect(job, collection, console)
    return job.folder


def summaries(folder: Path) -> dict[str, Measures]:
    """Return the measures of every complete benchmark of an evaluation.

    Raises:
        DataError: the folder is not an evaluation, or none of its benchmarks is complete.
    """
    sets = read_record(folder).benchmarks
    files = {name: samples_file(folder, name) for name in sets}
    measures = {name: measured(read_problems(file, sets[name])) for name, file in files.items() if file.is_file()}
    if not measures:
        raise DataError(f"{folder}: no benchmark is complete yet; the command that began the evaluation continues it")
    return measures


def regrade(folder: Path, grader: str | None, reward: RewardConfig) -> None:
    """Grade the samples of an evaluation again; needs no engine.

    Args:
        grader: name of a reward for all benchmarks; None grades each with the reward that it was graded with before.
        reward: says how many grader processes there are and how long an answer may take.

    Raises:
        DataError: the folder is not an evaluation, or its samples are not those that were written; nothing is changed.
        ConfigError: there is no such reward.
    """
    record = read_record(folder)
    graders = {name: checked_grader(grader or one.grader, reward) for name, one in record.benchmarks.items()}
    changed = {name: replace(one, grader=graders[name]) for name, one in record.benchmarks.items()}
    with claimed(folder), Graders(reward) as graders:
        there = {name: file for name in record.benchmarks if (file := samples_file(folder, name)).is_file()}
        for name, file in there.items():  # all of them before one is changed
            check_complete(file, ((row.problem_id, row.sample) for row in read_samples(file)), record.benchmarks[name])
        for name, file in there.items():
            write_samples(file, asyncio.run(graders.grade(read_samples(file), changed[name].grader)))
        write_record(folder, replace(record, benchmarks=changed))


def _collect(job: EvaluationJob, collection: Collection, console: Console) -> None:
    """Sample what is missing and grade it; engines are started only if something is missing."""
    reward, missing = job.config.reward, len(collection.missing)
    with Counter(missing, console) as counter, Graders(reward) as graders:
        if not missing:
            asyncio.run(collection.fill(None, graders))
        elif job.servers:
            asyncio.run(_ask(job, lambda: _clients_of_running(job), collection, graders, counter))
        else:
            with _model_folder(job) as model, Servers(job.config, model, job.folder / "logs", gpus_here()) as servers:
                servers.wait(counter.status)
                asyncio.run(_ask(job, lambda: _clients_of(job, servers), collection, graders, counter, servers))


async def _ask(
    job: EvaluationJob,
    connect: Callable[[], Sequence[HttpEngine]],
    collection: Collection,
    graders: Graders,
    counter: Counter,
    servers: Servers | None = None,
) -> None:
    """Fill the collection from engines, and start engines again that die if they are ours.

    Args:
        connect: makes the clients; called inside the event loop.
        servers: the engines, if they are ours.
    """
    clients = connect()
    deadlines = job.config.deadlines
    patience = Patience(deadlines.health_s, deadlines.silent_s, return_s=deadlines.startup_s)
    pool = EnginePool(clients, patience, on_silence=servers.give_up if servers else None)
    counter.begin()
    try:
        async with pool.serving(Versions(OWN, OWN)) as engines:
            source = SampleSource(engines, job.tokenizer, len(clients) * job.config.rollout.max_running)
            tasks = [asyncio.create_task(collection.fill(source, graders, lambda row: counter.sample(row.tokens)))]
            tasks += [asyncio.create_task(servers.watch())] if servers else []
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in ended:
                task.result()
    finally:
        await pool.close()


def _clients_of(job: EvaluationJob, servers: Servers) -> list[HttpEngine]:
    kind = engine_of(job.config)
    return [kind.client(job.config, url, kind.started_with) for url in servers.urls]


def _clients_of_running(job: EvaluationJob) -> list[HttpEngine]:
    deadlines = job.config.deadlines
    return [server.client(len(job.tokenizer), deadlines.rollout_s, deadlines.silent_s) for server in job.servers]


@contextmanager
def _model_folder(job: EvaluationJob) -> Iterator[Path]:
    """Yield the Hugging Face folder that engines start with: a checkpoint is converted, and overrides go into a config.json.

    Folders that were made for this are removed at the end, but not by an interrupted evaluation, which uses them again.
    """
    source, made = job.subject.path, [job.folder / "converted", job.folder / "model"]
    if is_checkpoint(source):
        from megatron_hpt.models.conversion import ToHf  # imports torch

        if not made[0].is_dir():
            ToHf(source).write(made[0])
        source = made[0]
    if job.config.model.overrides:
        write_overridden(source, made[1], job.config.model.overrides)
        source = made[1]
    yield source
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise SIGINT and SIGTERM as `Interrupted`."""

    def interrupt(number: int, _: Any) -> NoReturn:
        for each in previous:  # engines take seconds to end
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(f"ended by {signal.Signals(number).name}; the same command continues the evaluation")

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
