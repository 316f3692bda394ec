"""What a run's settings alone make impossible, whatever the machine, the model and the data."""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.engines.checks import check_sampling
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective import algorithms
from megatron_hpt.overrides import validated
from megatron_hpt.plan.layout import check_ranks


def check(config: Config) -> None:
    """Refuse what `train` would refuse for the configuration alone, on any machine (``megatron-hpt config``).

    Raises:
        ConfigError: with the key, what was given and what is allowed.
    """
    validated(config.model_dump(mode="json"), config.name)  # a program may have assigned settings one by one
    if not config.data.train:
        raise ConfigError("data.train: names no file; give a parquet or JSONL file, a folder, or a pattern")
    algorithms.check(config, algorithms.of_run(config))
    check_ranks(config)
    check_sampling(config)
