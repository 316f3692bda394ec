"""How long the prompts and responses of a run were, read from its ledger (`megatron-hpt plan --lengths RUN`). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.plan.rollouts.lengths import Lengths, of_responses
from megatron_hpt.run import RunDir

NEWEST_STEPS = 10
"""Steps of a ledger whose lengths are taken: the newest."""


def of_ledger(run: RunDir) -> Lengths:
    """Return the lengths of a run's newest steps.

    Raises:
        ConfigError: the run has no rollouts yet.
        DataError: a batch cannot be read; names its file.
    """
    ledger = Ledger(run.batches)
    steps = ledger.steps()[-NEWEST_STEPS:]
    rows = [row for step in steps for row in _rows(ledger.path(step))]
    rollouts = sorted(response for source, _, response in rows if source == "rollout")
    if not rollouts:
        raise ConfigError(f"--lengths: {run.path} has no rollouts in its ledger yet")
    demonstrations = [response for source, _, response in rows if source == "demonstration"] or rollouts
    return Lengths(
        prompt=sum(prompt for _, prompt, _ in rows) / len(rows),
        parts=of_responses(rollouts),
        demonstration=sum(demonstrations) / len(demonstrations),
        origin=f"those of {len(rollouts):,} rollouts of {run.path}, steps {steps[0]} to {steps[-1]}",
    )


def _rows(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield source, tokens of the prompt and tokens of the response of each row of a batch; no token is read."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            prompts = table["prompt_length"]
            responses = pc.subtract(pc.list_value_length(table["tokens"]), prompts)
            yield from zip(table["source"].to_pylist(), prompts.to_pylist(), responses.to_pylist(), strict=True)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{path}: cannot be read as a batch: {error}") from None
