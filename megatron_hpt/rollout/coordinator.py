"""The coordinator process (``python -m megatron_hpt.rollout.coordinator``), and what all processes of a run do in a step.

A step in ten lines (s is its number, k is `rollout.max_lag`; engines, trainer and coordinator have been started and are ready):

 1. The trainer sends version s of the weights to the engines and says so (``published/s``).
 2. The coordinator begins the batch of step s + k. If version s is due on the held-out sets, it is evaluated first
    (`Evaluations`), and the trainer keeps the next version back until that has ended (``scored/s``).
 3. It takes the next prompts; which ones follows from the position in the data, the seed and the history (`data.source`).
 4. The engines sample responses with version s or a newer one (`sampling`, through `engines.pool`).
 5. Grader processes and reward servers give each response its reward (`rewards.pool`).
 6. The gate decides what each prompt trains: rollouts, demonstration, both or nothing. A gate that refills goes back to 3,
    at most `algorithm.max_rounds` times. With `rollout.cancel_decided` 5 and 6 begin while 4 goes on.
 7. The decided groups become rows with weights and advantages (`assembly`), which are written to the ledger after those of the
    step before (``batch/s+k``).
 8. The trainer reads the batch of step s from the ledger as soon as it is there, takes its optimizer steps and says so
    (``trained/s``); where a checkpoint is due, it is written in the background. It goes to 1; engines on its GPUs sleep from
    here until their weights come.
 9. With version s + 1 published, the coordinator writes the step's line of metrics, that of the last step with an evaluation.
10. All the while the supervisor shows progress, starts dead engines again as often as is allowed, and else ends everything.

With k = 0 the two take turns; with more the trainer works on a step while the engines sample the next ones, and new weights
arrive under way (`transfer.in_flight`). Where the ledger holds the batch already (a resumed run), nothing is sent in 1, and of
2 to 7 only ``batch`` is left; in a run from another's ledger (``train --from-ledger``) that is so from the start, there are no
engines, and `from_ledger` stands in for this module. The blackboard has small values only: batches lie in the ledger, weights
go by `transfer`. Its keys, where [0] is rank 0 and n counts from 0:

    key                 written by    awaited or polled by     value
    engines             supervisor    coordinator, trainer     URLs of the engines; written once all of them answer
    ready/part          that part     supervisor               true; the part is trainer or coordinator
    asleep              trainer [0]   trainer                  true; engines on the same GPUs have given their memory back
    published/version   trainer [0]   coordinator, supervisor  metrics of the transfer; engines serve it, if a batch needs it
    scored/version      coordinator   trainer                  true; it has been evaluated, where `Config.evaluates` it
    batch/step          coordinator   trainer                  true; the batch is in the ledger
    trained/step        trainer [0]   coordinator              metrics of the optimizer step
    go/key/turn         trainer [0]   trainer                  the key that came first while rank 0 waited for `key`
    silent/n            coordinator   supervisor               URL of an engine without a sign of life; the supervisor ends it
    wanted/n            supervisor    trainer [0]              URL of a dead engine that needs memory of the trainer's GPUs
    granted/n           trainer [0]   supervisor               true; the engine of ``wanted/n`` may start
    returned/n          supervisor    trainer                  URL of a restarted engine that answers; it is given weights
    notice              supervisor    trainer [0]              true; a scheduler wants the run to end: save what is trained
    stopped             trainer [0]   supervisor               the number of steps that are saved, after a notice
    status/coordinator  coordinator   supervisor               what the screen shows from the last evaluation on
    evaluated           coordinator   trainer                  true; the engines are no longer needed
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hpt.batch.history import History, Remembered
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.data.source import open_sets, training_source
from megatron_hpt.engines.pool import EnginePool, Patience
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.engines.types import Versions
from megatron_hpt.evaluation.grading import Graders, label
from megatron_hpt.evaluation.selection import Selection
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective import algorithms
from megatron_hpt.objective.gate import Choice
from megatron_hpt.overrides import load_yaml
from megatron_hpt.process import die_with_parent, ends_in_words, log_to
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout import from_ledger
from megatron_hpt.rollout.assembly import GateDecider, Group, assemble, decide, lag_metrics
from megatron_hpt.rollout.evaluations import Evaluations
from megatron_hpt.rollout.sampling import Early, Grader, SamplingSettings, grade, sample
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.metrics import MetricsLog, step_line
from megatron_hpt.telemetry.metrics import read as read_metrics

logger = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Seconds that the phases of a step take, under their names as metrics."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``time/<name>_s``."""
        started = time.monotonic()
        yield
        key = f"time/{name}_s"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - started


class Coordinator:
    """Makes the batches of a run and writes its metrics. `main` runs one, in a process of its own.

    Two loops run side by side. One makes batches, up to `rollout.max_lag` steps ahead of the trainer; the other follows the
    trainer and writes a line of metrics for each step. What they tell each other is in `_committed` and `_published`.
    """

    def __init__(self, run: RunDir, board: Blackboard, start: int, pool: GraderPool) -> None:
        """
        Args:
            start: the first step that is trained; above 0 in a resumed run.
        """
        self._board, self._start = board, start
        self._config = config = load_yaml(run.config)
        self._lag = config.rollout.max_lag
        self._ledger, self._metrics = Ledger(run.batches), MetricsLog(run, start)
        self._algorithm = algorithms.of_run(config)
        self._history = History(self._ledger, start)
        self._tokenizer = load_tokenizer(config)
        self._grader = Grader(pool, self._tokenizer)
        self._source = training_source(config, open_sets(config, run.path), self._tokenizer)
        graders = Graders(config.reward, {label(config.reward): pool})
        self._evaluations = Evaluations(run, config, self._tokenizer, graders)
        behind = [line for line in read_metrics(run.metrics) if line["step"] < start]
        self._selection = Selection(run, config.evaluation, behind)
        self._committed: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        """By step, set when its batch is in the ledger and in the history."""
        self._published: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        """By version, set when the engines have it."""
        self._evaluated_s = 0.0
        """Seconds that evaluations have taken."""
        self._silences = 0
        """Engines that have been reported as silent so far."""

    async def run(self) -> None:
        """Wait for the engines, then make every batch and write one line of metrics for each step.

        Raises:
            DeadlineError: another part is late.
            EngineError: no engine samples, or one sampled with other weights.
            DataError: a row cannot be used, or no prompt is left.
        """
        self._board.put(ready("coordinator"), True)
        urls = self._board.wait("engines", self._config.deadlines.startup_s, "an engine")
        self._engines = self._engine_pool(urls)
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._make_batches(loops))
                loops.create_task(self._follow_trainer())
        except ExceptionGroup as failed:  # one part fails, and the others with it; the first says enough
            raise failed.exceptions[0] from None
        finally:
            await self._engines.close()
            self._metrics.close()
        self._board.put("evaluated", True)

    async def _make_batches(self, tasks: asyncio.TaskGroup) -> None:
        """Begin the batch of every step as soon as weights that it may be sampled with are published, in the order of the data.

        With `rollout.max_lag` the next one begins while responses to earlier ones are still sampled, so that engines are not
        left with a few long ones. A batch that the ledger has (a resumed run) is used as it is.
        """
        position = self._history.next_prompt
        for step in range(self._start, self._config.trainer.steps):
            oldest = max(step - self._lag, 0)
            evaluated = oldest if (step == 0 or step > self._lag) and self._config.evaluates(oldest) else None
            if self._ledger.has(step):
                if step > self._start:
                    await self._committed[step - 1].wait()
                self._commit(step)
                position = self._history.next_prompt
            else:
                await self._published[max(oldest, self._start)].wait()
                watch = Stopwatch()
                evaluation = await self._evaluation_before(evaluated, watch)
                taken = asyncio.get_running_loop().create_future()
                tasks.create_task(self._make_batch(step, position, taken, watch, evaluation))
                position = await taken
            if evaluated is not None:
                self._board.put(f"scored/{evaluated}", True)

    async def _evaluation_before(self, version: int | None, watch: Stopwatch) -> dict[str, Any]:
        """Evaluate the version that is due before a batch, which the engines serve until ``scored`` is put."""
        if version is None:
            return {}
        if version < self._start:
            logger.warning("version %d is not evaluated: the run goes on from version %d", version, self._start)
            return {}
        with watch.phase("eval"):
            return await self._evaluate(version)

    async def _make_batch(
        self, step: int, position: int, taken: asyncio.Future[int], watch: Stopwatch, evaluation: dict[str, Any]
    ) -> None:
        """Make the batch of a step from the prompts at `position` on, and commit it when those of all steps before are.

        The gate and the curriculum know the steps that are committed when it begins, to its end.

        Args:
            taken: set to the position of the next step's prompts as soon as that is known.
        """
        known, history = self._history.steps, self._history.snapshot()
        retried, ungraded = self._engines.retried, Counter(self._grader.pool.ungraded)
        groups, data = await self._graded_groups(step, position, taken, history, watch)
        in_service = self._engines.in_service(self._versions(step))
        engines = {"rollout/engines": in_service, "rollout/retried": self._engines.retried - retried}
        causes = {f"rollout/ungraded_{cause}": n for cause, n in (self._grader.pool.ungraded - ungraded).items()}
        lags = lag_metrics(step, groups, self._lag)
        metrics = {**evaluation, **watch.seconds, **engines, **causes, **data, **lags, "data/known_steps": known}
        batch = assemble(step, groups, self._algorithm, self._config, metrics, history.choices)
        if step > self._start:
            await self._committed[step - 1].wait()
        await asyncio.to_thread(self._ledger.write, batch)
        self._commit(step)

    def _commit(self, step: int) -> None:
        """Take a batch that is in the ledger into the history, and tell the trainer."""
        self._history.add(step)
        self._committed[step].set()
        self._board.put(f"batch/{step}", True)

    async def _follow_trainer(self) -> None:
        """Wait for each step of the trainer and for the weights that come of it, and write the step's line of metrics."""
        board, late_s = self._board, self._config.deadlines.step_s
        await board.wait_beside(f"published/{self._start}", late_s, "the trainer")
        self._published[self._start].set()
        clock = _Clock(time.monotonic(), self._evaluated_s, self._engines.busy_s)
        for step in range(self._start, self._config.trainer.steps):
            await self._committed[step].wait()
            batch = self._ledger.read_meta(step)[1]
            self._selection.consider(batch)
            trained = await board.wait_beside(f"trained/{step}", late_s, "the trainer")
            published = await board.wait_beside(f"published/{step + 1}", late_s, "the trainer")
            now = _Clock(time.monotonic(), self._evaluated_s, self._engines.busy_s)
            self._published[step + 1].set()
            line = _metrics_line(step, batch, {**trained, **published}, clock, now)
            clock = now
            if step + 1 == self._config.trainer.steps:
                board.put("status/coordinator", "last evaluation")
                line |= await self._evaluate(step + 1)
            self._metrics.write(line)

    async def _graded_groups(
        self, step: int, position: int, taken: asyncio.Future[int], history: Remembered, watch: Stopwatch
    ) -> tuple[list[Group], dict[str, int]]:
        """Take prompts, sample and grade them; where the gate refills, until enough of them train something.

        Returns:
            The groups; and as metrics the position of the next prompt and what was left out before it.
        """
        gate, needed = self._algorithm.gate, self._config.trainer.prompts_per_step
        groups: list[Group] = []
        counts: Counter[str] = Counter()
        for round_ in range(self._config.algorithm.max_rounds if gate.refills else 1):
            with watch.phase("data"):
                prompts = self._source.take(position, needed, history.streaks)
            position = prompts.next_position
            counts.update(prompts.counts)
            if not gate.refills:
                taken.set_result(position)
            with watch.phase("rollout"):
                sampled = await self._sample(step, round_, prompts.prompts, history)
            with watch.phase("reward"):
                groups += await grade(sampled, self._grader, self._algorithm.grades_demonstrations)
            decisions = decide(step, groups, gate, needed, history.choices)
            if sum(decision.choice is not Choice.SKIPPED for decision in decisions) == needed:
                break
        if gate.refills:
            taken.set_result(position)
        return groups, {"data/next_prompt": position, **{f"data/{name}": number for name, number in counts.items()}}

    async def _sample(self, step: int, round_: int, prompts: Sequence[Prompt], history: Remembered) -> list[Group]:
        config, gate = self._config, self._algorithm.gate

        def samples(prompt: Prompt) -> int:
            return gate.samples(config.rollout.samples_per_prompt, prompt.demonstration is not None, step)

        limit, stop_token = config.data.max_response_length, self._tokenizer.eos_token_id
        settings = SamplingSettings(samples, config.rollout.temperature, 1.0, limit, stop_token)
        early = None
        if config.rollout.cancel_decided:
            early = Early(GateDecider(gate, step, history.choices), self._grader)
        seed = (config.trainer.seed, f"train/{round_}", step)
        async with self._engines.serving(self._versions(step)) as engines:
            return await sample(engines, prompts, settings, seed, early)

    def _versions(self, step: int) -> Versions:
        # Newer weights than those that the step trains cannot be there, since they come of its batch.
        return Versions(max(step - self._lag, 0), step)

    async def _evaluate(self, version: int) -> dict[str, Any]:
        if not self._config.evaluation.held_out:
            return {}
        started = time.monotonic()
        async with self._engines.serving(Versions(version, version)) as engines:
            metrics = await self._evaluations.evaluate(version, engines, self._engines.size)
        self._evaluated_s += time.monotonic() - started
        # The trainer removes checkpoints that nobody needs: the best one must be known before it goes on.
        self._selection.consider(metrics)
        return metrics

    def _engine_pool(self, urls: Sequence[str]) -> EnginePool:
        deadlines = self._config.deadlines
        engines = [engine_of(self._config).client(self._config, url) for url in urls]
        # An engine comes back when it has started again and been given its weights.
        patience = Patience(deadlines.health_s, deadlines.silent_s, return_s=deadlines.startup_s + deadlines.transfer_s)
        return EnginePool(engines, patience, on_silence=self._report_silence)

    def _report_silence(self, url: str) -> None:
        """Have the supervisor end an engine and start it again; the pool calls this when it gives the engine up."""
        self._board.put(f"silent/{self._silences}", url)
        self._silences += 1


@dataclass(frozen=True)
class _Clock:
    """Seconds so far, when a step ends: since some time, of evaluations, and in which engines had requests."""

    time: float
    evaluated: float
    busy: float


def _metrics_line(step: int, batch: dict[str, Any], trained: dict[str, Any], before: _Clock, now: _Clock) -> dict[str, Any]:
    """A step's line of metrics. A batch from the ledger has the seconds that it took when it was made.

    Args:
        before: when the step before ended.
        now: when this one ended.
    """
    took = now.time - before.time
    idle = {"engines": max(0.0, took - (now.busy - before.busy)), "trainer": trained["time/trainer_idle_s"]}
    seconds = {
        "time/step_s": took - (now.evaluated - before.evaluated),
        "time/engines_idle_s": idle["engines"],
        **{f"time/{side}_idle_share": waited / took for side, waited in idle.items()},
    }
    return step_line(step, {**batch, **trained, **seconds})


def main() -> None:
    """Run the process that the supervisor starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--from-step", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent()
    # A connection is an open file, and many engines have more of them than the usual soft limit of 1024.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run = RunDir(arguments.run)
    log_to(run.log("coordinator"))
    with ends_in_words(run.path):
        board = Blackboard.join(arguments.store)
        if run.is_from_ledger:
            from_ledger.coordinate(run, board, arguments.from_step)
        else:
            with GraderPool(load_yaml(run.config).reward) as pool:
                asyncio.run(Coordinator(run, board, arguments.from_step, pool).run())
    logger.info("done")


if __name__ == "__main__":
    main()
