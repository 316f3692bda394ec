"""The coordinator process (``python -m megatron_hpt.rollout.coordinator``), and what all processes of a run do in a step.

A step in ten lines (s is its number; the supervisor has started engines, trainer and coordinator, all of which are ready):

 1. The trainer sends version s of the weights to the engines and says so (``published/s``).
 2. The coordinator evaluates that version on the held-out sets, if it is due and this is not the last step (`Evaluations`).
 3. It takes the next prompts; which ones follows from the position in the data, the seed and the history (`data.source`).
 4. The engines sample responses with version s (`sampling`, through `engines.pool`).
 5. Grader processes and reward servers give each response its reward (`rewards.pool`).
 6. The gate decides what each prompt trains: rollouts, demonstration, both or nothing. A gate that refills goes back to 3,
    at most `algorithm.max_rounds` times. With `rollout.cancel_decided` 5 and 6 begin while 4 goes on.
 7. The decided groups become rows with weights and advantages (`assembly`), which are written to the ledger (``batch/s``).
 8. The trainer, which has waited, reads the ledger, takes an optimizer step and says so (``trained/s``); where a checkpoint is
    due, it is written in the background. It goes to 1; engines on its GPUs sleep from here until their weights come.
 9. With version s + 1 published, the coordinator writes the step's line of metrics, that of the last step with an evaluation.
10. All the while the supervisor shows progress, starts dead engines again as often as is allowed, and else ends everything.

Where the ledger holds the batch already (a resumed run), nothing is sent in 1, and of 2 to 7 only ``batch/s`` is left; in a
run from another's ledger (``train --from-ledger``) that is so from the start, there are no engines, and `from_ledger` stands in
for this module. The blackboard has small values only: batches lie in the ledger, weights go by `transfer`. Its keys, where [0]
is rank 0 and n counts from 0:

    key                 written by    awaited or polled by     value
    engines             supervisor    coordinator, trainer     URLs of the engines; written once all of them answer
    ready/part          that part     supervisor               true; the part is trainer or coordinator
    asleep              trainer [0]   trainer                  true; engines on the same GPUs have given their memory back
    published/version   trainer [0]   coordinator, supervisor  metrics of the transfer; engines serve it, if a batch needs it
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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hpt.batch.history import History
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.data.source import open_sets, training_source
from megatron_hpt.engines.pool import EnginePool, Patience
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.evaluation.grading import Graders, label
from megatron_hpt.evaluation.selection import Selection
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective import algorithms
from megatron_hpt.objective.gate import Choice
from megatron_hpt.overrides import load_yaml
from megatron_hpt.process import die_with_parent, ends_in_words, log_to
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout import from_ledger
from megatron_hpt.rollout.assembly import GateDecider, Group, assemble, decide
from megatron_hpt.rollout.evaluations import Evaluations
from megatron_hpt.rollout.sampling import Early, Grader, SamplingSettings, grade, sample
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.metrics import MetricsLog
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
    """Makes the batches of a run and writes its metrics. `main` runs one, in a process of its own."""

    def __init__(self, run: RunDir, board: Blackboard, start: int, pool: GraderPool) -> None:
        """
        Args:
            start: the first step that is trained; above 0 in a resumed run.
        """
        self._board, self._start = board, start
        self._config = config = load_yaml(run.config)
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
            await self._steps()
        finally:
            await self._engines.close()
            self._metrics.close()

    async def _steps(self) -> None:
        config, board = self._config, self._board
        for step in range(self._start, config.trainer.steps):
            watch = Stopwatch()
            with watch.phase("step"):
                if not self._ledger.has(step):
                    self._ledger.write(await self._make_batch(step, watch))
                batch_metrics = self._ledger.read_meta(step)[1]
                self._selection.consider(batch_metrics)
                self._history.add(step)
                board.put(f"batch/{step}", True)
                trained = board.wait(f"trained/{step}", config.deadlines.step_s, "the trainer")
                published = self._await_weights(step + 1)
            line = _metrics_line(step, batch_metrics, {**trained, **published}, watch)
            if step + 1 == config.trainer.steps:
                board.put("status/coordinator", "last evaluation")
                line |= await self._evaluate(step + 1)
                self._selection.consider(line)
            self._metrics.write(line)
        board.put("evaluated", True)

    async def _make_batch(self, step: int, watch: Stopwatch) -> Batch:
        self._await_weights(step)
        evaluation: dict[str, Any] = {}
        if self._evaluates_before(step):
            with watch.phase("eval"):
                evaluation = await self._evaluate(step)
        retried, ungraded = self._engines.retried, Counter(self._grader.pool.ungraded)
        groups, data = await self._graded_groups(step, watch)
        engines = {"rollout/engines": self._engines.in_service, "rollout/retried": self._engines.retried - retried}
        seconds = {key: watch.seconds[key] for key in ("time/data_s", "time/rollout_s", "time/reward_s")}
        causes = {f"rollout/ungraded_{cause}": n for cause, n in (self._grader.pool.ungraded - ungraded).items()}
        metrics = {**evaluation, **seconds, **engines, **causes, **data, "rollout/policy_version": step}
        return assemble(step, groups, self._algorithm, self._config, metrics, self._history.choices)

    async def _graded_groups(self, step: int, watch: Stopwatch) -> tuple[list[Group], dict[str, int]]:
        """Take prompts, sample and grade them; where the gate refills, until enough of them train something.

        Returns:
            The groups; and as metrics the position of the next prompt and what was left out before it.
        """
        gate, needed, position = self._algorithm.gate, self._config.trainer.prompts_per_step, self._history.next_prompt
        groups: list[Group] = []
        counts: Counter[str] = Counter()
        for round_ in range(self._config.algorithm.max_rounds if gate.refills else 1):
            with watch.phase("data"):
                taken = self._source.take(position, needed, self._history.streaks)
            position = taken.next_position
            counts.update(taken.counts)
            with watch.phase("rollout"):
                sampled = await self._sample(step, round_, taken.prompts)
            with watch.phase("reward"):
                groups += await grade(sampled, self._grader, self._algorithm.grades_demonstrations)
            decisions = decide(step, groups, gate, needed, self._history.choices)
            if sum(decision.choice is not Choice.SKIPPED for decision in decisions) == needed:
                break
        return groups, {"data/next_prompt": position, **{f"data/{name}": number for name, number in counts.items()}}

    async def _sample(self, step: int, round_: int, prompts: Sequence[Prompt]) -> list[Group]:
        config, gate = self._config, self._algorithm.gate

        def samples(prompt: Prompt) -> int:
            return gate.samples(config.rollout.samples_per_prompt, prompt.demonstration is not None, step)

        limit, stop_token = config.data.max_response_length, self._tokenizer.eos_token_id
        settings = SamplingSettings(samples, config.rollout.temperature, 1.0, limit, stop_token)
        early = None
        if config.rollout.cancel_decided:
            early = Early(GateDecider(gate, step, self._history.choices), self._grader)
        seed = (config.trainer.seed, f"train/{round_}", step)
        async with self._engines.serving(step):
            return await sample(self._engines, prompts, settings, seed, step, early)

    def _evaluates_before(self, step: int) -> bool:
        every, last = self._config.evaluation.every, step + 1 == self._config.trainer.steps
        # Not before the last step: its line will hold the evaluation of the final weights.
        return bool(self._config.evaluation.held_out) and (step == 0 or bool(every and step % every == 0 and not last))

    async def _evaluate(self, version: int) -> dict[str, Any]:
        if not self._config.evaluation.held_out:
            return {}
        async with self._engines.serving(version):
            return await self._evaluations.evaluate(version, self._engines, self._engines.size)

    def _await_weights(self, version: int) -> dict[str, Any]:
        return self._board.wait(f"published/{version}", self._config.deadlines.step_s, "the trainer")

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


def _metrics_line(step: int, batch: dict[str, Any], trained: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """A step's line of metrics. A batch from the ledger has the seconds that it took when it was made."""
    seconds = {**watch.seconds}
    seconds["time/step_s"] -= seconds.get("time/eval_s", 0.0)
    line = {"step": step, **batch, **trained, **seconds, "weights/version": step + 1}
    line["throughput/tokens_per_s"] = line["train/tokens"] / line["time/step_s"]
    return line


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
