"""The coordinator process: prompts → rollouts → rewards → gate → batch (``python -m megatron_hpt.rollout.coordinator``)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hpt.batch.history import History
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.config import Config
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
from megatron_hpt.rollout.assembly import GateDecider, Group, assemble, decide
from megatron_hpt.rollout.evaluations import Evaluations
from megatron_hpt.rollout.sampling import Early, Grader, SamplingSettings, grade, sample
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.metrics import MetricsLog
from megatron_hpt.telemetry.metrics import read as read_metrics

logger = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Seconds per phase of a step, as metrics."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``time/<name>_s``."""
        started = time.monotonic()
        yield
        key = f"time/{name}_s"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - started


class Coordinator:
    """The main loop."""

    def __init__(self, run: RunDir, board: Blackboard, start: int, pool: GraderPool) -> None:
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

    async def run(self) -> None:
        """Make every batch, and one line of metrics for each step."""
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
                    await self._make_batch(step, watch)
                self._selection.consider(self._ledger.read_meta(step)[1])
                self._history.add(step)
                board.put(f"batch/{step}", True)
                trained = board.wait(f"trained/{step}", config.deadlines.step_s, "the trainer")
                published = self._weights_at(step + 1)
            await self._record(step, {**trained, **published}, watch)
        board.put("evaluated", True)

    def _engine_pool(self, urls: list[str]) -> EnginePool:
        deadlines = self._config.deadlines
        engines = [engine_of(self._config).client(self._config, url) for url in urls]
        # An engine comes back when it has started again and been given its weights.
        patience = Patience(deadlines.health_s, deadlines.silent_s, return_s=deadlines.startup_s + deadlines.transfer_s)
        return EnginePool(engines, patience, on_silence=self._report_silence)

    def _report_silence(self, url: str) -> None:
        """The supervisor ends an engine that gives no sign of life, and starts it again."""
        self._board.put(f"silent/{self._silences}", url)
        self._silences += 1

    async def _make_batch(self, step: int, watch: Stopwatch) -> None:
        self._weights_at(step)
        evaluation: dict[str, Any] = {}
        if self._evaluates_before(step):
            with watch.phase("eval"):
                evaluation = await self._evaluate(step)
        retried, ungraded = self._engines.retried, Counter(self._grader.pool.ungraded)
        groups, data = await self._groups(step, watch)
        engines = {"rollout/engines": self._engines.in_service, "rollout/retried": self._engines.retried - retried}
        seconds = {key: watch.seconds[key] for key in ("time/data_s", "time/rollout_s", "time/reward_s")}
        causes = {f"rollout/ungraded_{cause}": n for cause, n in (self._grader.pool.ungraded - ungraded).items()}
        metrics = {**evaluation, **seconds, **engines, **causes, **data, "rollout/policy_version": step}
        self._ledger.write(assemble(step, groups, self._algorithm, self._config, metrics, self._history.choices))

    async def _groups(self, step: int, watch: Stopwatch) -> tuple[list[Group], dict[str, int]]:
        """Graded groups enough for the step; the position of the next prompt and what was left out before it, as metrics."""
        gate, wanted, position = self._algorithm.gate, self._config.trainer.prompts_per_step, self._history.next_prompt
        groups: list[Group] = []
        counts: Counter[str] = Counter()
        for round_ in range(self._config.algorithm.max_rounds if gate.refills else 1):
            with watch.phase("data"):
                data = self._source.take(position, wanted, self._history.streaks)
            position = data.next_position
            counts.update(data.counts)
            with watch.phase("rollout"):
                settings = self._training_settings(step)
                sampled = await self._sample(data.prompts, settings, f"train/{round_}", step, self._early(step))
            with watch.phase("reward"):
                groups += await grade(sampled, self._grader, self._algorithm.grades_demonstrations)
            decided = decide(step, groups, gate, wanted, self._history.choices)
            if sum(decision.choice is not Choice.SKIPPED for decision in decided) == wanted:
                break
        return groups, {"data/next_prompt": position, **{f"data/{name}": number for name, number in counts.items()}}

    async def _record(self, step: int, trained: dict[str, Any], watch: Stopwatch) -> None:
        """Write the step's line; a batch from the ledger has the seconds that it took when it was made."""
        seconds = {**watch.seconds}
        seconds["time/step_s"] -= seconds.get("time/eval_s", 0.0)
        line = {"step": step, **self._ledger.read_meta(step)[1], **trained, **seconds, "weights/version": step + 1}
        line["throughput/tokens_per_s"] = line["train/tokens"] / line["time/step_s"]
        if step + 1 == self._config.trainer.steps:
            self._board.put("status/coordinator", "last evaluation")
            line |= await self._evaluate(step + 1)
            self._selection.consider(line)
        self._metrics.write(line)

    def _weights_at(self, version: int) -> dict[str, Any]:
        return self._board.wait(f"published/{version}", self._config.deadlines.step_s, "the trainer")

    def _evaluates_before(self, step: int) -> bool:
        every, last = self._config.evaluation.every, step + 1 == self._config.trainer.steps
        # Not before the last step: its line will hold the evaluation of the final weights.
        return bool(self._config.evaluation.held_out) and (step == 0 or bool(every and step % every == 0 and not last))

    async def _evaluate(self, version: int) -> dict[str, Any]:
        """Accuracy of weights `version` on every held-out set; in a step's line it is that of its version, see docs."""
        if not self._config.evaluation.held_out:
            return {}
        async with self._engines.serving(version):
            return await self._evaluations.evaluate(version, self._engines, self._engines.size)

    async def _sample(
        self, prompts: list[Prompt], settings: SamplingSettings, purpose: str, version: int, early: Early | None = None
    ) -> list[Group]:
        seed = (self._config.trainer.seed, purpose, version)
        async with self._engines.serving(version):
            return await sample(self._engines, prompts, settings, seed, version, early)

    def _early(self, step: int) -> Early | None:
        if not self._config.rollout.cancel_decided:
            return None
        return Early(GateDecider(self._algorithm.gate, step, self._history.choices), self._grader)

    def _training_settings(self, step: int) -> SamplingSettings:
        rollout, gate = self._config.rollout, self._algorithm.gate

        def samples(prompt: Prompt) -> int:
            return gate.samples(rollout.samples_per_prompt, prompt.demonstration is not None, step)

        return SamplingSettings(samples, rollout.temperature, 1.0, self._config.data.max_response_length, self._stop_token)

    @property
    def _stop_token(self) -> int:
        return self._tokenizer.eos_token_id


def graders(config: Config) -> GraderPool:
    """The pool of grader processes that a configuration asks for."""
    return GraderPool(config.reward)


def main() -> None:
    """Command line of the process."""
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
    with ends_in_words(run.path), graders(load_yaml(run.config)) as pool:
        board = Blackboard.join(arguments.store)
        asyncio.run(Coordinator(run, board, arguments.from_step, pool).run())
    logger.info("done")


if __name__ == "__main__":
    main()
