"""Everything that can be refused is refused here, before a process starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hpt.config import Config, GateConfig, SourceGateConfig, files_of
from megatron_hpt.data.prompts import Prompt, load_prompts
from megatron_hpt.data.source import held_out_limits, sources
from megatron_hpt.data.storage.locations import find
from megatron_hpt.engines.checks import check_cache, check_sampling
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.errors import ConfigError, DataError, ModelError
from megatron_hpt.evaluation.benchmarks import canonical
from megatron_hpt.launch.training_data import Found, check_training_data
from megatron_hpt.models.hf_config import ModelShape, read_config, run_shape, shape_of_any
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.models.megatron_files import check_weights
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective import algorithms
from megatron_hpt.objective.advantage import Grouped
from megatron_hpt.objective.algorithm import Algorithm
from megatron_hpt.objective.gate import Gate, Phases, Union
from megatron_hpt.plan.fit import fit_gpus
from megatron_hpt.plan.layout import check_layout, check_lengths
from megatron_hpt.plan.memory import GIB
from megatron_hpt.rewards import registry


def check(config: Config) -> Found:
    """Check names, model, layout and data; returns what was found in the training data.

    Raises:
        ConfigError, ModelError, DataError: with the key or file, what was given and what is allowed.
    """
    if not config.data.train:
        raise ConfigError("data.train: names no file; give a parquet or JSONL file, a folder, or a pattern")
    algorithm = algorithms.of_run(config)
    check_algorithm(config, algorithm)
    registry.check(config.reward)
    shape = run_shape(config)
    check_weights(config.model.path, shape)
    _check_reference_model(config, shape)
    check_layout(config, shape)
    check_precision(config)
    check_lengths(config, shape)
    check_engine(config, shape)
    check_selection(config)
    return _check_data(config, shape, algorithm.gate)


def check_algorithm(config: Config, algorithm: Algorithm) -> None:
    """The algorithm can be trained with these settings.

    Raises:
        ConfigError: it needs what is not there; names the key.
    """
    name, samples = config.algorithm.name, config.rollout.samples_per_prompt
    if algorithm.needs_values:
        raise ConfigError(
            f"algorithm.name: {name} estimates advantages from a critic's values, and there is no critic model yet; "
            "grpo, rloo and reinforce_pp need none"
        )
    if isinstance(algorithm.gate, Phases) and not 0 < algorithm.gate.at < config.trainer.steps:
        raise ConfigError(
            f"algorithm.sft_steps: given {algorithm.gate.at}; the first phase takes 1 to {config.trainer.steps - 1} steps"
        )
    if isinstance(algorithm.gate, Union) and samples < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt: given {samples}; {name} puts a demonstration in place of one: at least 2"
        )
    if samples < 2 and any(isinstance(term.advantage, Grouped) for term in algorithm.terms):
        raise ConfigError(
            f"rollout.samples_per_prompt: given {samples}; {name} compares the answers to a prompt with each other, and one "
            "alone teaches nothing: at least 2"
        )
    _check_bands(config)
    if config.algorithm.overlong.buffer >= config.data.max_response_length:
        raise ConfigError(
            f"algorithm.overlong.buffer: given {config.algorithm.overlong.buffer}; must be below data.max_response_length "
            f"({config.data.max_response_length})"
        )


def _check_bands(config: Config) -> None:
    """A band between a count and a share, which only the number of samples makes comparable."""
    gate, n = config.algorithm.gate, config.rollout.samples_per_prompt
    sections: dict[str, GateConfig | SourceGateConfig] = {"algorithm.gate": gate}
    sections |= {f"algorithm.gate.by_source.{name}": own for name, own in gate.by_source.items()}
    for key, section in sections.items():
        if isinstance(section.threshold, int) and section.threshold > n:
            raise ConfigError(f"{key}.threshold: given {section.threshold} of {n} samples; at most {n}")
        low, high = (t if isinstance(t, int) or t is None else t * n for t in (section.threshold, section.off_policy_threshold))
        if high is not None and high < low:
            raise ConfigError(
                f"{key}.off_policy_threshold: given {section.off_policy_threshold}, below the threshold {section.threshold} "
                f"for {n} samples; the band would be empty"
            )


def check_precision(config: Config) -> None:
    """FP8 runs on this machine, where the trainer will.

    Raises:
        ConfigError: names what is missing.
    """
    if config.actor.fp8 != "none":
        from megatron_hpt.actor.model.precision import check_fp8, this_machine  # imports torch

        check_fp8(config.actor.fp8, config.model.dtype, this_machine())


def check_engine(config: Config, shape: ModelShape) -> None:
    """The engine's environment is there, and weights can reach it.

    Raises:
        ConfigError: it is not, or they cannot; says what to do.
    """
    import torch

    from megatron_hpt.transfer.transports import check_transport

    check_sampling(config)
    if not config.rollout.urls:
        check_started_engine(config, shape.head_dim)
        if not torch.cuda.is_available():
            check_cache(config, shape)
    check_sleep(config, torch.cuda.is_available())
    check_transport(config.transfer.transport)
    if config.transfer.shares_gpus:
        check_memory(config, shape, torch.cuda.get_device_properties(0).total_memory)
    _check_engine_model(config, shape)


def check_started_engine(config: Config, head_dim: int | None) -> None:
    """The engine can be started here.

    Args:
        head_dim: of the model; None: not known.

    Raises:
        ConfigError: its environment is missing, or its attention; says what to do.
    """
    import torch

    interpreter(config)
    allowed = () if torch.cuda.is_available() else engine_of(config).host_head_dims
    if allowed and head_dim is not None and head_dim not in allowed:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: its attention on the host has no heads of {head_dim} "
            f"({config.model.path}/config.json); allowed: {', '.join(map(str, allowed))}, or another engine"
        )


def check_sleep(config: Config, on_gpus: bool) -> None:
    """Engines on a host keep their memory: vLLM's worker there ignores sleep (v1/worker/cpu_worker.py) and its configuration
    refuses it (config/model.py); SGLang's memory saver is a CUDA library.

    Raises:
        ConfigError: they are to sleep on a host.
    """
    if config.rollout.sleep and not on_gpus:
        raise ConfigError(
            f"rollout.sleep: {config.rollout.engine} gives memory back on GPUs only, and this machine has none; set "
            "rollout.sleep=false"
        )


def check_memory(config: Config, shape: ModelShape, gpu_bytes: int) -> None:
    """Trainer and engine fit the GPU that they share, by the plan's arithmetic: an engine that does not find its share ends
    the run when it starts, or later in the trainer's hands.

    Args:
        gpu_bytes: memory of each GPU.

    Raises:
        ConfigError: they do not; says how much does.
    """
    if problems := fit_gpus(config, shape, round(gpu_bytes / GIB, 1), colocated=True).problems:
        raise ConfigError("\n".join([*problems, "megatron-hpt plan shows what takes it, and the nearest layout that fits"]))


def _check_engine_model(config: Config, shape: ModelShape) -> None:
    """The engine's folder, where it has one of its own, is the actor's model in a form that weights can be converted to."""
    if not config.rollout.model:
        return
    from megatron_hpt.transfer.wire import fp8_format  # imports torch

    fp8_format(read_config(config.rollout.model))
    if shape_of_any(config.rollout.model, config.model.overrides) != shape:
        raise ConfigError(
            f"rollout.model: the model in {config.rollout.model} has another shape than that in {config.model.path}"
        )


def check_selection(config: Config) -> None:
    """With `evaluation.select`: evaluations come where checkpoints are, and a validation set is no test set.

    Raises:
        ConfigError: names the key.
    """
    evaluation, every = config.evaluation, config.trainer.save_every
    trained = {file.resolve() for source in sources(config) for file in _files(source.path)}
    for name, paths in evaluation.validation.items():
        files = _files(paths)
        if known := next(filter(None, map(canonical, (name, *(file.stem for file in files)))), None):
            raise ConfigError(
                f"evaluation.validation.{name}: {known} is a test set; one that chose a checkpoint could not be reported. Put "
                "it into evaluation.sets, and problems of your own into evaluation.validation"
            )
        if shared := [file for file in files if file.resolve() in trained]:
            raise ConfigError(
                f"evaluation.validation.{name}: {shared[0]} is in data.train; choose on problems that are not trained on"
            )
    if evaluation.select is not None and (not every or not evaluation.every or evaluation.every % every):
        raise ConfigError(
            f"evaluation.select={evaluation.select}: every evaluation must find a checkpoint to choose, so evaluation.every "
            f"(given {evaluation.every}) must be a multiple of trainer.save_every (given {every}), and neither may be 0"
        )


def _files(paths: str | list[str]) -> list[Path]:
    """The files of folders and patterns too; what is not there is refused where it is read."""
    try:
        return [Path(location.path) for location in find(paths)]
    except DataError:
        return [Path(path) for path in files_of(paths)]


def _check_validation(config: Config, held_out: Mapping[str, Sequence[Prompt]]) -> None:
    """No problem of a validation set is in a reported one.

    Raises:
        DataError: names both and how many.
    """
    evaluation = config.evaluation
    reported = {tuple(prompt.tokens): name for name in evaluation.sets for prompt in held_out[name]}
    for name in evaluation.validation:
        if shared := [reported[key] for prompt in held_out[name] if (key := tuple(prompt.tokens)) in reported]:
            raise DataError(
                f"evaluation.validation.{name}: {len(shared)} of its {len(held_out[name])} problems are also in "
                f"evaluation.sets.{shared[0]}, which could not be reported any more; leave them out of one of the two"
            )


def _check_reference_model(config: Config, shape: ModelShape) -> None:
    """The KL's reference model has the actor's sizes and its weights are whole; its constants may be others."""
    path = config.algorithm.kl.reference
    if not config.algorithm.kl.coefficient or path is None:
        return
    reference = run_shape(config, path)
    if (reference.heads, hf_tensor_shapes(reference)) != (shape.heads, hf_tensor_shapes(shape)):
        raise ConfigError(f"algorithm.kl.reference: the model in {path} has other sizes than that in {config.model.path}")
    if reference.max_positions < config.max_sequence_length:
        raise ConfigError(
            f"algorithm.kl.reference: the model in {path} has {reference.max_positions} positions; prompt and response have "
            f"{config.max_sequence_length} (data.max_prompt_length + data.max_response_length)"
        )
    check_weights(path, shape)


def _check_data(config: Config, shape: ModelShape, gate: Gate) -> Found:
    """Every row can be read and used; the first ones that are taken are tokenised too."""
    tokenizer = load_tokenizer(config)
    if len(tokenizer) > shape.vocab:
        raise ModelError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens, the model in {config.model.path} only {shape.vocab}"
        )
    _check_curriculum(config)
    limits = held_out_limits(config)
    held_out = {name: load_prompts(paths, tokenizer, limits) for name, paths in config.evaluation.held_out.items()}
    _check_validation(config, held_out)
    return check_training_data(
        config, tokenizer, gate, {prompt.data_source for prompts in held_out.values() for prompt in prompts}
    )


def _check_curriculum(config: Config) -> None:
    if config.data.curriculum.keep_failed < 1 and config.rollout.cancel_decided:
        raise ConfigError(
            f"data.curriculum.keep_failed: given {config.data.curriculum.keep_failed:g}; needs rollout.cancel_decided=false: "
            "which rollouts are graded before the rest is cancelled depends on the clock, and so would the data order"
        )
