"""The evaluations inside a run. They are sampled and graded as by ``megatron-hpt evaluate``, on the engines of the run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_hpt.config import Config, files_of
from megatron_hpt.data.prompts import load_prompts
from megatron_hpt.data.source import held_out_limits
from megatron_hpt.engines.types import Sampler
from megatron_hpt.evaluation.collecting import Collection, SampleSource
from megatron_hpt.evaluation.grading import Graders, label
from megatron_hpt.evaluation.metrics import of_samples
from megatron_hpt.evaluation.problems import of_prompts, sha256_of
from megatron_hpt.evaluation.samples import Evaluation, Protocol, SetRecord, read_samples, samples_file, write_record
from megatron_hpt.evaluation.selection import remove_superseded
from megatron_hpt.run import RunDir


class Evaluations:
    """Evaluates the held-out sets of a run; every evaluation has a folder of samples. The coordinator has one of these."""

    def __init__(self, run: RunDir, config: Config, tokenizer: Any, graders: Graders) -> None:
        self._run, self._config, self._tokenizer, self._graders = run, config, tokenizer, graders
        sets = config.evaluation.held_out
        limits = held_out_limits(config)
        self._sets = {name: of_prompts(load_prompts(paths, tokenizer, limits), tokenizer) for name, paths in sets.items()}
        self._record = Evaluation(
            model=str(run.path),
            weights="",
            protocol=_protocol(config),
            benchmarks={name: self._set_record(name, paths) for name, paths in sets.items()},
            engine=config.rollout.engine,
            dtype=config.model.dtype,
        )

    async def evaluate(self, version: int, engine: Sampler, engines: int) -> dict[str, Any]:
        """Sample and grade every held-out set, and write the samples.

        Args:
            version: of the weights that `engine` serves.
            engine: the pool.
            engines: how many engines the pool has; so many times `rollout.max_running` requests are under way.

        Returns:
            The metrics that docs/metrics.md has below ``eval/``, with the version that they are about.

        Raises:
            EngineError, DeadlineError: as the engine raises.
        """
        folder, samples = self._run.evaluation(version), self._config.evaluation.samples
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from an earlier step, perhaps with other settings
        record = replace(self._record, weights=f"version {version}", step=version)
        write_record(folder, record)
        source = SampleSource(engine, self._tokenizer, engines * self._config.rollout.max_running)
        with Collection(folder, record, self._sets) as collection:
            await collection.fill(source, self._graders)
        metrics: dict[str, Any] = {}
        for name in self._sets:
            metrics |= of_samples(name, samples, read_samples(samples_file(folder, name)))
        remove_superseded(self._run, self._config.evaluation.keep_samples)
        return {**metrics, "eval/version": version}

    def _set_record(self, name: str, paths: str | Sequence[str]) -> SetRecord:
        samples, grader = self._config.evaluation.samples, label(self._config.reward)
        return SetRecord(", ".join(files_of(paths)), sha256_of(paths), len(self._sets[name]), samples, grader)


def _protocol(config: Config) -> Protocol:
    return Protocol(
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        max_tokens=config.data.max_response_length,
        seed=config.trainer.seed,
        chat_template=config.data.chat_template,
    )
