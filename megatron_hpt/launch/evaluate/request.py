"""Reads and checks everything that an evaluation needs, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config, RolloutConfig
from megatron_hpt.engines.checks import check_started_engine, check_temperature
from megatron_hpt.engines.interface import RunningServer
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.engines.running import look
from megatron_hpt.engines.seeding import settled
from megatron_hpt.errors import ConfigError
from megatron_hpt.evaluation.benchmarks import Chosen, choose
from megatron_hpt.evaluation.grading import checked_grader
from megatron_hpt.evaluation.problems import EvaluationProblem, load_problems, sha256_of, system_prompt
from megatron_hpt.evaluation.samples import Evaluation, Protocol, SetRecord
from megatron_hpt.files import check_folder
from megatron_hpt.launch.engine_arguments import check_extra_arguments
from megatron_hpt.launch.evaluate.subject import Subject, dtype_of, resolve
from megatron_hpt.launch.launchers import gpus_here
from megatron_hpt.models.hf_config import read_config
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.overrides import apply_overrides

OUT = Path("evaluations")
"""Folder of evaluations that are given none."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of the command line; the defaults are the paper's protocol."""

    data: Path = Path("data")
    out: Path | None = None
    samples: int | None = None
    grader: str | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    seed: int = 0
    system_prompt: str | None = None
    tokenizer: Path | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation, and everything that was read for it."""

    config: Config
    """Settings from which engines, tokenizer and graders are made."""
    subject: Subject
    servers: tuple[RunningServer, ...]
    """Servers that somebody else has started; where there are none, the evaluation starts its own."""
    tokenizer: Any
    sets: dict[str, list[EvaluationProblem]]
    record: Evaluation
    folder: Path


def prepare(model: str, benchmarks: Sequence[str], options: EvaluationOptions) -> EvaluationJob:
    """Read and check everything that an evaluation needs.

    Raises:
        ConfigError, ModelError, DataError: something cannot be used; names what was given and what is allowed.
        EngineError: a server does not answer, or is of no known engine.
    """
    if options.out:
        check_folder(options.out)
    chosen = choose(benchmarks, options.data, options.samples, options.grader)
    subject = resolve(model)
    servers = tuple(look(url) for url in subject.urls)
    config = _settings(subject, servers, options)
    chosen = [replace(benchmark, grader=checked_grader(benchmark.grader, config.reward)) for benchmark in chosen]
    check_temperature("--temperature", options.temperature, engine_of(config))
    if not servers:
        check_started_engine(config, _head_dim(read_config(config.model.path)), bool(gpus_here()))
    tokenizer = load_tokenizer(config)
    system = system_prompt(options.system_prompt)
    sets = {benchmark.name: load_problems(benchmark.file, tokenizer, system) for benchmark in chosen}
    longest = _check_context(sets, options.max_tokens, _context(config, servers))
    lengths = {"max_prompt_length": longest, "max_response_length": options.max_tokens}
    config = config.model_copy(update={"data": config.data.model_copy(update=lengths)})
    if not servers:
        check_extra_arguments(config)
    protocol = Protocol(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=options.seed,
        system_prompt=system,
        chat_template=config.data.chat_template,
    )
    record = Evaluation(
        model=str(subject.path) if subject.path else model,
        weights=servers[0].label if servers else subject.weights(),
        protocol=protocol,
        benchmarks={benchmark.name: _set_record(benchmark, len(sets[benchmark.name])) for benchmark in chosen},
        step=subject.step,
        engine=config.rollout.engine,
        dtype="" if servers else config.model.dtype,
        overrides=config.model.overrides,
    )
    return EvaluationJob(config, subject, servers, tokenizer, sets, record, options.out or OUT / subject.name)


def _set_record(benchmark: Chosen, problems: int) -> SetRecord:
    return SetRecord(str(benchmark.file), sha256_of(str(benchmark.file)), problems, benchmark.samples, benchmark.grader)


def _settings(subject: Subject, servers: Sequence[RunningServer], options: EvaluationOptions) -> Config:
    """Return the configuration from which engines, tokenizer and graders are made.

    Raises:
        ConfigError: an override is not a setting, servers have different weights, or the tokenizer is not on this machine.
    """
    config = subject.configuration()
    if servers:
        model = str(options.tokenizer or _model_of(servers))
        engine = {"urls": [server.url for server in servers], "engine": servers[0].kind}
    else:
        model = str(subject.path)
        # The engines of an evaluation have GPUs and cores for themselves, without a trainer beside them.
        alone = ("urls", "model", "host", "sleep", "gpu_memory_share", "seeded", "max_lag", "threads")
        engine = {name: RolloutConfig.model_fields[name].get_default(call_default_factory=True) for name in alone}
    own = {"path": model, "overrides": {}}  # checkpoints and exports of a run have its overrides in them
    if subject.run is None and not servers:
        own["dtype"] = dtype_of(read_config(model))
    changes = {"model": config.model.model_copy(update=own), "rollout": config.rollout.model_copy(update=engine)}
    config = apply_overrides(config.model_copy(update=changes), list(options.overrides))
    if servers:
        return config
    placed = _placed(config, any(given.startswith("rollout.servers=") for given in options.overrides))
    return settled(placed, bool(gpus_here()))


def _placed(config: Config, chosen: bool) -> Config:
    """Set the number of engines to that for which there are GPUs, unless the number was chosen.

    Raises:
        ConfigError: there are too few GPUs for the chosen number.
    """
    width, there = config.rollout.tensor_parallel, len(gpus_here())
    number = config.rollout.servers if chosen else max(1, there // width)
    if there and number * width > there:
        raise ConfigError(
            f"rollout.servers={number} of rollout.tensor_parallel={width} need {number * width} GPUs; this machine has {there}"
        )
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"servers": number})})


def _model_of(servers: Sequence[RunningServer]) -> str:
    served = {(server.kind, server.model, server.label) for server in servers}
    if len(served) > 1:
        raise ConfigError(f"servers of different models or weights: {', '.join(map(str, sorted(served)))}")
    if not Path(servers[0].model).is_dir():
        raise ConfigError(
            f"{servers[0].url} serves {servers[0].model}, which is no folder of this machine: give --tokenizer FOLDER"
        )
    return servers[0].model


def _head_dim(contents: dict[str, Any]) -> int | None:
    """Return the size of an attention head from a config.json of any family, or None if it does not say."""
    heads, hidden = contents.get("num_attention_heads"), contents.get("hidden_size")
    return contents.get("head_dim") or (hidden // heads if heads and hidden else None)


def _context(config: Config, servers: Sequence[RunningServer]) -> int | None:
    if servers:
        return min((server.context for server in servers if server.context), default=None)
    return read_config(config.model.path, config.model.overrides).get("max_position_embeddings")


def _check_context(sets: Mapping[str, Sequence[EvaluationProblem]], max_tokens: int, context: int | None) -> int:
    """Return the length of the longest prompt in tokens.

    Raises:
        ConfigError: that prompt and a response do not fit into the model's context.
    """
    name, longest = max(
        ((name, problem) for name, problems in sets.items() for problem in problems), key=lambda pair: len(pair[1].tokens)
    )
    length = len(longest.tokens)
    if context is not None and length + max_tokens > context:
        room = f"--max-tokens {context - length} fits" if length < context else "no response fits: leave the problem out"
        raise ConfigError(
            f"{name}, problem {longest.problem_id}: a prompt of {length} tokens and --max-tokens {max_tokens} do not fit into "
            f"the model's context of {context}; {room}. model.overrides.max_position_embeddings (and rope_theta) widen a "
            "folder's context"
        )
    return length
