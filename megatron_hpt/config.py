"""The typed configuration tree that a recipe fills in. Imports no torch.

A recipe is a Python function ``recipe() -> Config``. Dotted overrides (``trainer.steps=20``) are read as their setting's type
asks (overrides.py) and checked against the same types, so nothing reaches a process that has not been validated here.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from megatron_hpt.errors import did_you_mean
from megatron_hpt.settings.sections import (
    MOST_PROCESSES,
    MOST_SAMPLES,
    DeadlineSeconds,
    Float,
    Int,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Processes,
    Samples,
    Seconds,
    Section,
    Share,
    Tokens,
)


def _finite(given: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """JSON has no other numbers; a config.json that had would be read by nobody."""
    try:
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise ValueError("a number that is not finite") from None
    return given


LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255 for a folder's, and its time is added."""


def _name_of_a_folder(given: str) -> str:
    if given in ("", ".", "..") or "/" in given or "\0" in given or not given.isprintable():
        raise ValueError("a run's name is that of a folder: at least one character, no / and nothing invisible")
    if len(given.encode()) > LONGEST_NAME:
        raise ValueError(f"a name of {len(given.encode())} bytes; at most {LONGEST_NAME}")
    return given


def _name_of_a_set(given: str) -> str:
    if not re.fullmatch(r"[\w.+-][\w.+ -]*", given) or given in (".", ".."):
        raise ValueError("the name of a set is that of a file: letters, digits, and . + - _ or space")
    return _name_of_a_folder(given)


Threads = typing.Annotated[Int, Field(gt=0, le=1024)] | Literal["all"]
"""Of one process; all: those of its share of the machine's cores (cores.py)."""
Workers = typing.Annotated[Int, Field(gt=0, le=4096)]
"""Processes beside each other on one machine."""
MOST_GIB = 2**20
MOST_LAG = 1000
Gibibytes = typing.Annotated[Float, Field(gt=0, le=MOST_GIB)]
Mebibytes = typing.Annotated[Int, Field(gt=0, le=2**30)]
Temperature = typing.Annotated[Float, Field(gt=0, le=100)]
"""Above 100 every token of a vocabulary is as likely as any other."""


def _url_of_a_server(given: str) -> str:
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", given) and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise ValueError(f"{given!r} is no address of a server; expected http://host:port")
    return given


def _host(given: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:%\[\]-]+", given):
        raise ValueError(f"{given!r} is no host name and no address")
    return given


def _as_text(given: Any) -> Any:
    return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given


Argument = typing.Annotated[str, BeforeValidator(_as_text)]
"""A word of a command line; one that is a number need not be quoted."""
Url = typing.Annotated[str, AfterValidator(_url_of_a_server)]
Host = typing.Annotated[str, AfterValidator(_host)]
Beta = typing.Annotated[Float, Field(ge=0, lt=1)]
RunName = typing.Annotated[str, AfterValidator(_name_of_a_folder)]
SetName = typing.Annotated[str, AfterValidator(_name_of_a_set)]
"""Samples of a set lie in a file of its name."""


class ModelConfig(Section):
    path: Name
    """Hugging Face folder (config.json, safetensors weights, tokenizer), or a checkpoint: of tools/convert_hf.py or a run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the actor's and the engine's weights and arithmetic (master weights are always float32)."""
    overrides: typing.Annotated[dict[str, JsonValue], AfterValidator(_finite)] = Field(default={})
    """Keys of config.json with values that replace those of the folder, in the actor, the engines and the export, e.g.
    {rope_theta: 40000}."""


_Path = typing.Annotated[Name, Tag("path")]
_PathList = typing.Annotated[list[Name], Field(min_length=1), Tag("paths")]
Paths = typing.Annotated[_Path | _PathList, Discriminator(lambda given: "paths" if isinstance(given, list) else "path")]
"""A file, a folder, a pattern such as data/**/*.parquet, or several of these; paths or URLs."""


def files_of(paths: str | list[str]) -> list[str]:
    """What `Paths` names, as a list."""
    return [paths] if isinstance(paths, str) else list(paths)


class SourceConfig(Section):
    path: Paths
    """Its files, as data.train names them."""
    weight: PositiveFloat
    """How much of the prompts comes from it, in proportion to the other sources' weights."""


def _kind_of_data(given: Any) -> str:
    """Which of the forms of data.train is meant: an error is then about that one alone."""
    if not isinstance(given, list):
        return "path"
    return "sources" if any(isinstance(each, dict | SourceConfig) for each in given) else "paths"


_SourceList = typing.Annotated[list[SourceConfig], Field(min_length=1), Tag("sources")]
_NoneOrPath = typing.Annotated[str, Tag("path")]
"""Empty where nothing is trained, as in an evaluation."""
TrainingData = typing.Annotated[_NoneOrPath | _PathList | _SourceList, Discriminator(_kind_of_data)]


class CurriculumConfig(Section):
    visits: PositiveInt = 3
    """Last visits to a prompt that are looked at."""
    keep_solved: Share = 1.0
    """Share of its turns at which a prompt is taken that all rollouts of these visits solved; 0: dropped."""
    keep_failed: Share = 1.0
    """As keep_solved, for a prompt that none of them solved; below 1 it needs rollout.cancel_decided=false."""

    @property
    def is_on(self) -> bool:
        """Some prompts are passed over."""
        return self.keep_solved < 1 or self.keep_failed < 1


class DataConfig(Section):
    train: TrainingData
    """Prompts and demonstrations (docs/data.md): a parquet or JSONL file, a folder, a pattern, a list of these, or a list of
    {path, weight}."""
    chat_template: str | None = None
    """Jinja template that renders a prompt's `messages`, for a base model without one; default: the tokenizer's own."""
    max_prompt_length: Tokens = 1024
    """Longest prompt in tokens."""
    max_response_length: Tokens = 1024
    """Longest rollout or demonstration in tokens, end-of-sequence included."""
    long_prompts: Literal["drop", "refuse"] = "drop"
    """What becomes of a longer prompt: left out and counted, or an error."""
    long_demonstrations: Literal["drop", "cut", "refuse"] = "drop"
    """What becomes of a longer demonstration: left out and counted, cut without its end and counted, or an error."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Prompts that are passed over because they were always solved lately, or never."""


def _count_or_share(value: float) -> float:
    if not (-1 <= value <= MOST_SAMPLES if isinstance(value, int) else 0 <= value <= 1):
        raise ValueError("a whole number is a count of the rollouts (-1: never), a fraction from 0.0 to 1.0 a share of them")
    return value


Threshold = typing.Annotated[Int | Float, AfterValidator(_count_or_share)]
"""A whole number is a count of the n rollouts (-1: never reached), a fraction such as 0.25 a share of them."""
Schedule = str | list[NonNegativeFloat]
"""``up`` or ``down`` (linear in the share solved), a list of factors at equal distances, or ``module:function``."""


class SourceGateConfig(Section):
    threshold: Threshold
    """As algorithm.gate.threshold, for the prompts of one data source."""
    off_policy_threshold: Threshold | None = None
    """As algorithm.gate.off_policy_threshold."""


class GateConfig(Section):
    threshold: Threshold = 0
    """Prompts solved at most this often learn from their demonstration: a whole number is a count, a fraction a share."""
    strict: bool = False
    """A prompt solved exactly `threshold` times goes to the other side."""
    off_policy_threshold: Threshold | None = None
    """Prompts above `threshold` and solved at most this often train their demonstration by off-policy RL."""
    hysteresis: typing.Annotated[Threshold, Field(ge=0)] = 0
    """A prompt last taught by its demonstration leaves it only when solved this much more often than `threshold`."""
    by_source: dict[str, SourceGateConfig] = Field(default={})
    """Other thresholds for some data sources: name in the data's `data_source` column → thresholds."""
    soft: bool = False
    """Both losses live on one prompt: rollouts with factor f(P), the demonstration with g(P), P the share solved."""
    rollout_schedule: Schedule = "up"
    """f of a soft gate; must not fall: up, a list over P = 0 … 1, or module:function."""
    demonstration_schedule: Schedule = "down"
    """g of a soft gate; must not rise: down, a list over P = 0 … 1, or module:function."""
    missing_demonstration: Literal["rollouts", "skip"] = "rollouts"
    """What a prompt at or below the threshold does when the data has no demonstration for it."""


class ClipConfig(Section):
    low: Share | None = None
    """Trust region 1 - low of the ratio; default: what the algorithm was published with (megatron-hpt algorithms NAME)."""
    high: NonNegativeFloat | None = None
    """Trust region 1 + high of the ratio; default as for `low`."""
    dual: typing.Annotated[Float, Field(gt=1)] | None = None
    """PPO's dual clip: bound on the ratio where the advantage is negative; default: none."""


class EntropyConfig(Section):
    coefficient: NonNegativeFloat = 0.0
    """Factor on the entropy bonus, the mean over trained response tokens."""
    demonstrations: bool = True
    """Demonstration tokens are in the bonus, as in the reference code."""
    target: PositiveFloat | None = None
    """Entropy in nats that an adaptive coefficient steers to, starting from `coefficient`; default: fixed coefficient."""
    rate: PositiveFloat = 0.01
    """How fast the adaptive coefficient moves: it is multiplied by exp(rate · (target - entropy)) after every step."""


class KlConfig(Section):
    coefficient: NonNegativeFloat = 0.0
    """Factor on the KL to a frozen reference model over rollout tokens; 0: no reference model is built."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """log-ratio, half its square, or the unbiased one that is never negative."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward of each rollout before advantages are estimated."""
    reference: str | None = None
    """Hugging Face folder of the reference model, of the actor's sizes and with its own config.json (model.overrides are of
    model.path alone); default: model.path, where training starts."""


class MismatchConfig(Section):
    correction: Literal["none", "tis", "mis", "icepop"] = "none"
    """Weight of a rollout token by trainer/engine probability: truncated, dropped outside, or kept and weighted inside."""
    level: Literal["token", "sequence"] = "token"
    """Each token by its own ratio, or by the geometric mean over its response."""
    low: NonNegativeFloat = 0.5
    """Smallest trainer/engine ratio that icepop keeps."""
    high: PositiveFloat = 2.0
    """Largest ratio that mis and icepop keep, and tis's bound."""
    stop_above: PositiveFloat | None = None
    """Kill-switch: a step whose mismatch/k3_kl is above this is not taken (see optimizer.stop_after_skipped). Default: the run
    stops if its first batch's is larger than rounding explains (docs/metrics.md)."""

    @model_validator(mode="after")
    def _ordered(self) -> MismatchConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}, or everything is dropped")
        return self


class OverlongConfig(Section):
    buffer: NonNegativeInt = 0
    """Tokens before data.max_response_length over which a reward falls linearly (DAPO); 0: no penalty."""
    penalty: PositiveFloat = 1.0
    """What a response at the limit loses."""
    mask: bool = False
    """Responses that hit the limit do not train."""


class SrftConfig(Section):
    imitation: NonNegativeFloat = 0.5
    """Scale of e^-H on the likelihood of demonstrations (the paper's 0.5)."""
    reinforcement: NonNegativeFloat = 0.1
    """Scale of e^+H on correct rollouts (the paper's 0.1)."""


class MixtureConfig(Section):
    start: Share = 0.9
    """Weight of the demonstrations at the first step of a global mixture; rollouts have the rest."""
    end: Share = 0.1
    """Weight after `steps` steps."""
    steps: NonNegativeInt = 0
    """Steps of the linear schedule; 0: all of trainer.steps."""


class AlgorithmConfig(Section):
    name: str = "hpt"
    """A row of the table (megatron-hpt algorithms), or module:function for one of your own."""
    gate: GateConfig = GateConfig()
    """The per-prompt switch between demonstration and rollouts (used by algorithms that have both)."""
    demonstration_coefficient: NonNegativeFloat = 1.0
    """Factor on the likelihood term of demonstrations."""
    off_policy_coefficient: NonNegativeFloat = 1.0
    """Factor on the off-policy RL term of demonstrations."""
    balance: Literal["prompts", "components"] = "prompts"
    """Behind a gate: every prompt weighs the same, or each side is a mean of its own however few prompts it has."""
    shaping_gamma: PositiveFloat = 0.1
    """γ of the shaping p / (p + γ) of demonstrations under off-policy RL (LUFFY)."""
    clip: ClipConfig = ClipConfig()
    """Trust region of the rollout term. It acts where the policy has moved since it sampled: with several updates a batch
    (trainer.updates_per_batch, trainer.epochs_per_batch); else ratios differ from 1 by rounding alone."""
    old_policy: Literal["engine", "trainer"] = "engine"
    """π_θold, which the ratio starts from: the engine's log-probabilities, or those of the trainer's weights when the batch
    arrives (one more forward pass if it has several updates); mismatch.correction then weighs trainer/engine."""
    constant_length: Tokens | None = None
    """Divisor of `constant_length` aggregation in tokens; default: data.max_response_length."""
    discount: Share = 1.0
    """Discount of token rewards in returns (REINFORCE++, GAE)."""
    gae_lambda: Share = 1.0
    """λ of generalised advantage estimation (PPO)."""
    sft_steps: NonNegativeInt = 0
    """Steps of the first phase of sft_grpo."""
    srft: SrftConfig = SrftConfig()
    """SRFT's entropy-aware weights."""
    mixture: MixtureConfig = MixtureConfig()
    """Schedule of the global mixture (chord)."""
    max_rounds: PositiveInt = 4
    """Dynamic sampling: rounds of prompts a step may take until enough of them are informative (DAPO)."""
    overlong: OverlongConfig = OverlongConfig()
    """What happens to responses that are near or at the length limit."""
    entropy: EntropyConfig = EntropyConfig()
    """The entropy bonus."""
    kl: KlConfig = KlConfig()
    """The KL to a reference policy."""
    mismatch: MismatchConfig = MismatchConfig()
    """Correction of what separates the engine's probabilities from the trainer's."""


REWARDS = ("math", "math_strict", "math_reference", "choice", "exact", "numeric", "format", "reasoning_gym", "code", "http")
"""Names of rewards (docs/rewards.md); megatron_hpt/rewards/registry.py has what they do."""
_SHAPED_ELSEWHERE = ("length", "overlong")


def check_reward(choice: str | dict[str, float]) -> str | dict[str, float]:
    """The choice of a reward, if all its names are known.

    Raises:
        ValueError: names the one that is not, and what is allowed.
    """
    for name in [choice] if isinstance(choice, str) else choice:
        if name in _SHAPED_ELSEWHERE:
            raise ValueError("a length is no verdict; penalties are in the advantages: algorithm.overlong.buffer and .penalty")
        if name not in REWARDS and ":" not in name:
            raise ValueError(
                f"allowed: {', '.join(REWARDS)}, package.module:function, file.py:function, or a sum of them such as "
                f"{{math: 0.9, format: 0.1}}{did_you_mean(name, REWARDS)}"
            )
    if not choice:
        raise ValueError("a sum of no rewards; name at least one")
    return choice


RewardWeight = typing.Annotated[Float, Field(ge=-1e6, le=1e6)]
RewardChoice = typing.Annotated[str | dict[str, RewardWeight], AfterValidator(check_reward)]


_ALL_OR_NOTHING = set(REWARDS) - {"reasoning_gym", "http"}
"""Rewards that are 0 or 1. reasoning_gym's are between; http's without a threshold, and a user's own, are any number."""


def may_be_one(choice: str | dict[str, float], raw_scores: bool) -> bool:
    """Whether some answer's reward may be exactly 1, which is what a gate counts.

    Args:
        raw_scores: those of `http` are not made 0 or 1 by a threshold.
    """
    if isinstance(choice, str):
        return True
    terms = {name: weight for name, weight in choice.items() if weight}
    whole = {name for name in terms if name in _ALL_OR_NOTHING or (name == "http" and not raw_scores)}
    if terms.keys() - whole - {"reasoning_gym"}:
        return True
    low, high = sorted((0.0, terms.get("reasoning_gym", 0.0)))
    sums = [math.fsum(some) for n in range(len(whole) + 1) for some in itertools.combinations([terms[w] for w in whole], n)]
    return any(each + low <= 1 <= each + high if low != high else each == 1 for each in sums)


class CodeRewardConfig(Section):
    time_s: Seconds = 5.0
    """Seconds that a program may take for each of its tests."""
    memory_mib: Mebibytes = 512
    """Memory of one of its processes."""
    processes: Processes = 16
    """Processes and threads it may have."""
    disk_mib: Mebibytes = 32
    """What it may write, all files together; they are gone when it ends."""


class HttpRewardConfig(Section):
    url: str = ""
    """Server of a reward model, e.g. http://node7:8000."""
    engine: Literal["vllm", "sglang"] = "vllm"
    """What serves it: vllm serve MODEL --runner pooling, or sglang.launch_server --is-embedding; asked at /classify."""
    key_variable: str = ""
    """Environment variable with the server's API key, if it wants one; the run's own token is never sent."""
    label: NonNegativeInt = 0
    """Which of the model's outputs is the score."""
    activation: bool = False
    """The model's own sigmoid or softmax over its outputs (vllm); without it the score is the output itself."""
    threshold: Float | None = None
    """Score from which an answer counts as correct (reward 1, else 0), as the gate needs it; default: the score as it is."""
    batch: Samples = 32
    """Answers in one request."""
    requests: Samples = 8
    """Requests under way at once."""


class RewardConfig(Section):
    name: RewardChoice = "math"
    """A reward (docs/rewards.md), package.module:function or file.py:function, or a sum: {math: 0.9, format: 0.1}."""
    by_source: dict[str, RewardChoice] = Field(default={})
    """Other rewards for some data: name in the data's `data_source` column → reward or sum."""
    workers: Workers = 1
    """Grader subprocesses."""
    deadline_s: DeadlineSeconds = 10.0
    """Seconds one answer may take; after that it is ungraded (counted, never a 0)."""
    memory_gib: typing.Annotated[Float, Field(ge=0.25, le=MOST_GIB)] = 4.0
    """Address space of one grader subprocess; an answer that needs more is ungraded."""
    tolerance: typing.Annotated[Float, Field(ge=0, lt=1)] = 1e-6
    """Relative error that `numeric` allows."""
    pattern: str = r"(?s).*\\boxed\{.*"
    """Regular expression that the whole response must match for `format`."""
    code: CodeRewardConfig = CodeRewardConfig()
    """Limits of the programs that `code` runs."""
    http: HttpRewardConfig = HttpRewardConfig()
    """The server that `http` asks."""

    @property
    def names(self) -> list[str]:
        """All rewards that some answer may need, each once."""
        choices = [self.name, *self.by_source.values()]
        return list(dict.fromkeys(name for choice in choices for name in ([choice] if isinstance(choice, str) else choice)))

    @model_validator(mode="after")
    def _usable(self) -> RewardConfig:
        if "http" in self.names and not self.http.url.startswith(("http://", "https://")):
            raise ValueError(f"reward.http.url: given {self.http.url!r}; the http reward needs a server, http://host:port")
        if "code" in self.names and self.code.time_s >= self.deadline_s:
            raise ValueError(
                f"reward.code.time_s: given {self.code.time_s:g}; must be below reward.deadline_s={self.deadline_s:g}, "
                "or a program that does not end is ungraded instead of wrong"
            )
        if "format" in self.names and not self.pattern:
            raise ValueError("reward.pattern: empty; no response but an empty one has this form")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"reward.pattern: {self.pattern!r} is not a regular expression: {error}") from None
        return self


class RolloutConfig(Section):
    engine: str = "vllm"
    """The inference server: vllm, sglang, or package.module:NAME of an `engines.interface.EngineKind` of your own."""
    model: str = ""
    """Folder that engines are started with; default: model.path. One whose config.json has a quantization_config of method
    fp8 (blocks of 128, or per tensor) gets weights that are converted on the way. model.overrides are of this folder too."""
    python: str = ""
    """Interpreter of the engine's own environment; default: this one for vllm, .venv-sglang's beside it for sglang."""
    urls: list[Url] = Field(default=[])
    """Servers that run already, e.g. [http://node7:8000]; default: `servers` of them are started on this machine.
    With model.overrides they must have been started from a folder whose config.json has them."""
    host: Host = "127.0.0.1"
    """Address that started servers listen on: loopback, or the cluster's interface."""
    samples_per_prompt: Samples = 8
    """Rollouts a prompt (n)."""
    temperature: Temperature = 1.0
    """Sampling temperature; the trainer applies the same to its log-probabilities. vllm samples as asked from 0.01 to 2."""
    servers: Processes = 1
    """Engine servers to start."""
    tensor_parallel: Processes = 1
    """Tensor parallel ranks of one engine server."""
    kv_cache_gib: typing.Annotated[Int, Field(gt=0, le=MOST_GIB)] = 1
    """Memory for the KV cache of one server, in GiB (host engines)."""
    gpu_memory_share: typing.Annotated[Float, Field(gt=0, lt=1)] = 0.92
    """Share of a GPU's memory that an engine takes: weights, workspaces, and the rest for its cache (engines on GPUs)."""
    sleep: bool = False
    """Engines on the trainer's GPUs give their memory back while it trains, and take it again for the next rollouts."""
    max_running: Samples = 256
    """Sequences that one server decodes at the same time; vllm: at least `samples_per_prompt`."""
    seeded: bool | None = None
    """Samples are functions of trainer.seed, as far as the engine computes the same twice: seeds in requests, no CUDA graphs,
    no chunked prefill. Default: true on a host and for `urls`; false on GPUs, where it is slow (docs/gpu.md)."""
    extra_arguments: list[Argument] = Field(default=[])
    """Further arguments of the servers that are started, e.g. [--kv-cache-dtype, fp8]; the engine's own parser reads them
    before anything starts."""
    max_restarts: NonNegativeInt = 3
    """Engine servers that may be started again in one run after they died; then the run ends."""
    cancel_decided: bool = True
    """Rollouts of a prompt are cancelled once they cannot change that the gate sends it to its demonstration."""
    max_lag: typing.Annotated[NonNegativeInt, Field(le=MOST_LAG)] = 0
    """How many steps the weights that sample a batch may be older than those that it trains. 0: engines and trainer take turns;
    1 and more: engines sample the next batches while the trainer works (docs/throughput.md)."""
    threads: Threads = "all"
    """Threads of one rank of an engine on the host. all: its share of the cores, which are all there are while generation and
    training take turns, and those that actor.threads leaves where they overlap; the number is in RUN/config.yaml."""

    @model_validator(mode="after")
    def _sleeps_between_turns(self) -> RolloutConfig:
        if self.sleep and self.max_lag:
            raise ValueError(f"max_lag {self.max_lag}: with sleep the engines and the trainer take turns, so it must be 0")
        return self

    @model_validator(mode="after")
    def _there_is_such_a_machine(self) -> RolloutConfig:
        if (ranks := self.servers * self.tensor_parallel) > MOST_PROCESSES:
            raise ValueError(
                f"servers {self.servers} × tensor_parallel {self.tensor_parallel} are {ranks} ranks; at most {MOST_PROCESSES}"
            )
        return self

    @model_validator(mode="after")
    def _extra_arguments_of_own_servers(self) -> RolloutConfig:
        if self.extra_arguments and self.urls:
            raise ValueError("extra_arguments are of servers that are started, and those of urls run already: leave one out")
        return self


class TransferConfig(Section):
    transport: Literal["shared_memory", "files", "gloo", "cuda_ipc", "nccl"] = "shared_memory"
    """How weights reach the engines: memory of one host, a shared file system, messages between hosts, memory of one GPU,
    messages between GPUs."""
    in_flight: Literal["keep", "recompute", "abort"] = "recompute"
    """What happens to the keys and values of requests that are under way when new weights arrive."""
    compare_every: PositiveInt = 50
    """Engines compare their weights with what was sent at the first version, every k-th, after an engine's restart, and
    whenever they have slept."""
    host: Host = "127.0.0.1"
    """Address of the trainer's first rank that engines reach (gloo, nccl)."""
    folder: str = ""
    """Folder for versions on a file system that trainer and engines share (files)."""
    full_every: PositiveInt = 1
    """Every k-th version is written whole, those between hold only what changed (files)."""

    @property
    def shares_gpus(self) -> bool:
        """Engines are on the trainer's GPUs: they read its memory."""
        return self.transport == "cuda_ipc"

    @model_validator(mode="after")
    def _folder_of_files(self) -> TransferConfig:
        if (self.transport == "files") != bool(self.folder):
            raise ValueError("folder belongs to transport=files, which needs one on a file system that engines share")
        return self


class ParallelConfig(Section):
    tensor: Processes = 1
    """Tensor parallel ranks."""
    pipeline: Processes = 1
    """Pipeline parallel ranks."""
    virtual_pipeline: Processes = 1
    """Pieces of the model on every pipeline rank (interleaved schedule: a smaller bubble, more messages)."""
    context: Processes = 1
    """Context parallel ranks: every row is cut over them."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are cut over the tensor parallel ranks too."""
    expert: Processes = 1
    """Expert parallel ranks of a mixture of experts; taken from the data and context parallel ranks."""
    expert_tensor: Processes | None = None
    """Tensor parallel ranks inside an expert; default: as `tensor`."""
    data: Processes = 1
    """Data parallel ranks (the optimizer state is sharded over them)."""

    @property
    def ranks(self) -> int:
        """Trainer processes in all."""
        return self.tensor * self.pipeline * self.context * self.data

    @model_validator(mode="after")
    def _there_is_such_a_machine(self) -> ParallelConfig:
        if self.ranks > MOST_PROCESSES:
            raise ValueError(
                f"tensor {self.tensor} × pipeline {self.pipeline} × context {self.context} × data {self.data} are "
                f"{self.ranks} ranks; at most {MOST_PROCESSES}"
            )
        return self

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks that share the matrices of one expert."""
        return self.expert_tensor or self.tensor

    @property
    def row_multiple(self) -> int:
        """Tokens that a row is padded to a multiple of: its two mirrored pieces on every context parallel rank are equal."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def batch_multiple(self) -> int:
        """Tokens that a micro-batch is padded to a multiple of: sequence parallel ranks hold equal parts of it."""
        return self.row_multiple * (self.tensor if self.sequence else 1)


RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]
KernelFlag = Literal[
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "overlap_grad_reduce",
    "overlap_p2p_comm",
    "batch_p2p_comm",
]
"""Keys of `actor.kernels` (actor/model/kernels.py)."""


class ActorConfig(Section):
    micro_batch_tokens: Tokens = 8192
    """Tokens packed into one micro-batch, over all its context parallel ranks (a longer row gets one of its own)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of the core attention, or every layer's."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Matrix products in FP8, by this recipe of Transformer Engine; master weights and reductions stay float32."""
    fp8_param_gather: bool = False
    """Weights are kept and gathered in FP8 too."""
    bf16_layers: NonNegativeInt = 1
    """Layers at each end of the model that stay in bfloat16 under FP8; 0 with the delayed recipe."""
    logprob_kernel: Literal["torch", "triton"] = "torch"
    """What computes log-probabilities and entropies from logits: torch's operations, or a Triton kernel that reads the logits
    once (GPUs only). tools/gpu_check.py measures both."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in host memory while nothing needs it: main weights and moments between optimizer steps; all: weights and
    gradients too while the trainer waits for rollouts, for engines on the same GPUs."""
    recompute_modules: list[RecomputeModule] = Field(default=["core_attn"])
    """What recompute=selective computes again, by Megatron-Core's names."""
    kernels: dict[KernelFlag, bool] = Field(default={})
    """Fused kernels and overlaps switched on or off, by Megatron-Core's names; default: what can run (docs/gpu.md)."""
    expert_dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens go to their experts on other ranks: by NCCL, or by DeepEP's kernels (package deep_ep, GPUs)."""
    deterministic: bool = False
    """Kernels that give the same bits for the same batch on GPUs too, for a bitwise resume there; slower."""
    threads: Threads = 1
    """Torch threads of one rank on the host. all: its share of the cores, as in rollout.threads; another number of threads may
    change last bits, so that the default gives the same ones on every machine."""

    @model_validator(mode="after")
    def _kernels_that_agree(self) -> ActorConfig:
        if self.deterministic and self.expert_dispatcher == "deepep":
            # Destinations are drawn by atomic additions: github.com/deepseek-ai/DeepEP, pull request 753.
            raise ValueError(
                "deterministic cannot be had with expert_dispatcher=deepep: the order in which DeepEP delivers tokens, and so "
                "the sums over them, changes from run to run; set it to alltoall"
            )
        if self.fp8_param_gather and self.fp8 == "none":
            raise ValueError("fp8_param_gather keeps weights in FP8: choose a recipe in fp8, or leave it out")
        if self.fp8 == "delayed" and self.bf16_layers:
            raise ValueError("Megatron-Core has no bfloat16 layers with fp8=delayed: set bf16_layers to 0")
        return self


class OptimizerConfig(Section):
    lr: PositiveShare = 1e-6
    """Peak learning rate, at most 1."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up to `lr`."""
    decay_to: Share = 1.0
    """Share of `lr` reached linearly at the last step; 1: constant."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's decay rates, at least 0 and below 1."""
    eps: PositiveShare = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    clip_grad: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    skip_above: PositiveFloat | None = None
    """An optimizer step whose gradient norm before clipping is above this is not taken; default: only one that is not
    finite."""
    stop_after_skipped: PositiveInt = 3
    """The run stops after this many optimizer steps in a row that were not taken."""


class EvaluationConfig(Section):
    sets: dict[SetName, Paths] = Field(default={})
    """Held-out sets that are reported, and cannot choose a checkpoint: name → files, as data.train names them."""
    validation: dict[SetName, Paths] = Field(default={})
    """Held-out sets that may choose one, and are evaluated like the others: name → files."""
    select: str | None = None
    """The set in `validation` whose avg@k chooses the best checkpoint (RUN/best.json), which then stays; default: none."""
    every: NonNegativeInt = 0
    """Evaluate before every k-th step too (0: only before the first and after the last)."""
    samples: Samples = 8
    """Answers a prompt (k of avg@k)."""
    temperature: Temperature = 1.0
    """Sampling temperature of the evaluation."""
    top_p: PositiveShare = 1.0
    """Nucleus of the evaluation."""
    keep_samples: PositiveInt = 3
    """Newest evaluations whose samples stay in RUN/evaluations; those of the best checkpoint stay too."""

    @property
    def held_out(self) -> dict[str, Paths]:
        """Every set that is evaluated: name → files."""
        return {**self.sets, **self.validation}

    @model_validator(mode="after")
    def _reported_or_selecting(self) -> EvaluationConfig:
        reported = {file for paths in self.sets.values() for file in files_of(paths)}
        both = {name for name, paths in self.validation.items() if name in self.sets or reported & set(files_of(paths))}
        if both:
            raise ValueError(
                f"{', '.join(sorted(both))} is in sets and in validation; a set is reported, or it may choose a checkpoint"
            )
        if self.select is not None and self.select in self.sets:
            raise ValueError(
                f"select={self.select} is a reported set (sets): a checkpoint that it chose would score too well on it; choose "
                "on a set of validation"
            )
        if self.select is not None and self.select not in self.validation:
            known = ", ".join(self.validation) or "empty"
            raise ValueError(
                f"select={self.select} is no set of validation ({known}){did_you_mean(self.select, self.validation)}"
            )
        return self


class TrainerConfig(Section):
    steps: PositiveInt = 100
    """Batches: one optimizer step each, or several (updates_per_batch)."""
    prompts_per_step: typing.Annotated[Int, Field(gt=0, le=2**20)] = 128
    """Prompts a step."""
    updates_per_batch: typing.Annotated[Int, Field(gt=0, le=2**20)] = 1
    """Optimizer steps in one pass over a batch, whose prompts are spread over them; all have the batch's learning rate. From
    the second on the policy has moved away from π_θold (algorithm.old_policy): ratios are not 1, and algorithm.clip acts."""
    epochs_per_batch: typing.Annotated[Int, Field(gt=0, le=1024)] = 1
    """Passes over a batch, each over the same updates in an order of its own."""
    seed: NonNegativeInt = 0
    """Seed of the data order, and of every sampling request with rollout.seeded."""
    save_every: NonNegativeInt = 0
    """Write a checkpoint after every k-th step (0: only after the last)."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay on disk."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of every k-th step stay too (0: none)."""
    export: bool = True
    """Write the final model as a Hugging Face folder."""

    @model_validator(mode="after")
    def _a_prompt_for_every_update(self) -> TrainerConfig:
        if self.updates_per_batch > self.prompts_per_step:
            raise ValueError(
                f"updates_per_batch {self.updates_per_batch}: a batch has {self.prompts_per_step} prompts (prompts_per_step), "
                "and none of them is cut; at most as many updates"
            )
        return self


class DeadlinesConfig(Section):
    startup_s: DeadlineSeconds = 600.0
    """An engine, the trainer or the coordinator to be ready; the trainer's counts from when engines on its own GPUs are."""
    rollout_s: DeadlineSeconds = 3600.0
    """One generation request, and the coordinator's whole batch."""
    step_s: DeadlineSeconds = 3600.0
    """One training step including the weight transfer."""
    notice_s: DeadlineSeconds = 600.0
    """From SIGTERM or SIGUSR1 (Slurm's notice) to a saved checkpoint; after that the run ends without a new one."""
    transfer_s: DeadlineSeconds = 300.0
    """One call of the engine's weight-transfer API."""
    health_s: DeadlineSeconds = 10.0
    """An engine's answer to how it is. Then it is late: it keeps its requests, new ones go to others if there are any."""
    silent_s: DeadlineSeconds = 300.0
    """An engine without any sign of life, neither an answer nor a token: it is given up, ended and started again."""

    @model_validator(mode="after")
    def _late_before_silent(self) -> DeadlinesConfig:
        if self.health_s >= self.silent_s:
            raise ValueError(f"health_s {self.health_s:g} must be below silent_s {self.silent_s:g}: late comes before dead")
        return self


COUNTS_SOLVED = ("hpt", "hpt_reference", "off_on", "mix_on", "dapo")
"""Algorithms of the table whose gate counts the answers that have a reward of 1."""
MOST_ROWS = 2**20
"""Rollouts of one step."""


class Config(Section):
    name: RunName
    """Name of the run; its folder is runs/<name>-<time>."""
    model: ModelConfig
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    transfer: TransferConfig = TransferConfig()
    parallel: ParallelConfig = ParallelConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trainer: TrainerConfig = TrainerConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if problems := [problem for rule in _RULES for problem in rule(self)]:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def engine_model(self) -> str:
        """Folder that engines are started with."""
        return self.rollout.model or self.model.path

    def evaluates(self, version: int) -> bool:
        """Whether a version of the weights is evaluated before the batch that is the first to need it; the last always is.

        The line of metrics of the last step has the evaluation of the last version, so there is none before its batch.
        """
        every, batch = self.evaluation.every, version + self.rollout.max_lag
        if not self.evaluation.held_out:
            return False
        return version == 0 or bool(every and version % every == 0 and batch + 1 < self.trainer.steps)

    @property
    def max_sequence_length(self) -> int:
        """Prompt and response together, in tokens."""
        return self.data.max_prompt_length + self.data.max_response_length


def _rollouts_of_a_step(config: Config) -> Iterator[str]:
    prompts, samples = config.trainer.prompts_per_step, config.rollout.samples_per_prompt
    if (rows := prompts * samples) > MOST_ROWS:
        yield (
            f"trainer.prompts_per_step {prompts} × rollout.samples_per_prompt {samples} are {rows} rollouts a step; at most "
            f"{MOST_ROWS}"
        )


def _rewards_that_are_counted(config: Config) -> Iterator[str]:
    """Some answer must be able to earn exactly 1 where answers that do are counted."""
    if config.algorithm.name not in COUNTS_SOLVED and not config.data.curriculum.is_on:
        return
    choices = {"reward.name": config.reward.name}
    choices |= {f"reward.by_source.{name}": choice for name, choice in config.reward.by_source.items()}
    for key, choice in choices.items():
        if not may_be_one(choice, config.reward.http.threshold is None):
            yield (
                f"{key}: given {choice}; no answer can reach exactly 1 with it, and {config.algorithm.name} counts the "
                "answers whose reward is 1: choose weights of which some, e.g. all, add up to 1"
            )


def _bands(config: Config) -> Iterator[str]:
    """A band between a count and a share, which only the number of samples makes comparable."""
    gate, n = config.algorithm.gate, config.rollout.samples_per_prompt
    sections: dict[str, GateConfig | SourceGateConfig] = {"algorithm.gate": gate}
    sections |= {f"algorithm.gate.by_source.{name}": section for name, section in gate.by_source.items()}
    for key, section in sections.items():
        if isinstance(section.threshold, int) and section.threshold > n:
            yield f"{key}.threshold: given {section.threshold} of {n} samples; at most {n}"
        low, high = (t if isinstance(t, int) or t is None else t * n for t in (section.threshold, section.off_policy_threshold))
        if high is not None and high < low:
            yield (
                f"{key}.off_policy_threshold: given {section.off_policy_threshold}, below the threshold {section.threshold} "
                f"for {n} samples; the band would be empty"
            )


def _overlong_buffer(config: Config) -> Iterator[str]:
    buffer, longest = config.algorithm.overlong.buffer, config.data.max_response_length
    if buffer >= longest:
        yield f"algorithm.overlong.buffer: given {buffer}; must be below data.max_response_length ({longest})"


def _order_without_a_clock(config: Config) -> Iterator[str]:
    if config.data.curriculum.keep_failed < 1 and config.rollout.cancel_decided:
        yield (
            f"data.curriculum.keep_failed: given {config.data.curriculum.keep_failed:g}; needs rollout.cancel_decided=false: "
            "which rollouts are graded before the rest is cancelled depends on the clock, and so would the data order"
        )


def _correction_between_updates(config: Config) -> Iterator[str]:
    algorithm, trainer = config.algorithm, config.trainer
    several = trainer.updates_per_batch * trainer.epochs_per_batch > 1
    if several and algorithm.mismatch.correction != "none" and algorithm.old_policy == "engine":
        yield (
            f"algorithm.mismatch.correction: given {algorithm.mismatch.correction}; it measures ratios from the trainer's "
            "probabilities before the first update of a batch, which with several updates (trainer.updates_per_batch="
            f"{trainer.updates_per_batch}, trainer.epochs_per_batch={trainer.epochs_per_batch}) only "
            "algorithm.old_policy=trainer keeps"
        )


def _checkpoints_to_select(config: Config) -> Iterator[str]:
    evaluation, every = config.evaluation, config.trainer.save_every
    if evaluation.select is not None and (not every or not evaluation.every or evaluation.every % every):
        yield (
            f"evaluation.select={evaluation.select}: every evaluation must find a checkpoint to choose, so evaluation.every "
            f"(given {evaluation.every}) must be a multiple of trainer.save_every (given {every}), and neither may be 0"
        )


_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _rollouts_of_a_step,
    _rewards_that_are_counted,
    _bands,
    _overlong_buffer,
    _order_without_a_clock,
    _correction_between_updates,
    _checkpoints_to_select,
)
"""What sections refuse of each other: each rule yields a line for every problem, which begins with the setting's key."""
