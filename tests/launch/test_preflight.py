"""What is refused before a process starts, through the command line."""

import shutil
from pathlib import Path

import pytest

from megatron_hpt.config import (
    Config,
    CurriculumConfig,
    DataConfig,
    GateConfig,
    KlConfig,
    ModelConfig,
    OverlongConfig,
    ParallelConfig,
)
from megatron_hpt.data.parquet import Problem, write_problems
from megatron_hpt.engines.checks import check_sleep
from megatron_hpt.errors import CheckpointError, ConfigError, HptError
from megatron_hpt.examples import tiny_families, tiny_llama
from megatron_hpt.launch import preflight
from megatron_hpt.models.conversion import ToMegatron
from megatron_hpt.models.hf_config import model_shape, run_shape
from megatron_hpt.models.hf_files import write_config
from megatron_hpt.overrides import dump_yaml
from megatron_hpt.plan.fit import check_memory
from megatron_hpt.plan.layout import check_layout
from megatron_hpt.run import RunDir
from tests import programs


@pytest.fixture
def config(tiny_model: Path, arithmetic_data: Path) -> Config:
    data = DataConfig(train=str(arithmetic_data / "train.parquet"), max_prompt_length=8, max_response_length=24)
    return Config(name="x", model=ModelConfig(path=str(tiny_model)), data=data)


def test_a_head_that_the_engine_cannot_compute_is_found_before_it_starts(config: Config, tmp_path: Path) -> None:
    tiny_llama.write(tmp_path / "model", hidden=64, layers=1, heads=4, kv_heads=2)
    config.model.path = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm: its attention on the host has no heads of 16 .* allowed: 32"):
        preflight.check(config)


def test_a_good_configuration_passes(config: Config) -> None:
    preflight.check(config)


def test_a_reward_may_be_for_the_data_of_an_evaluation_set_alone(config: Config, tmp_path: Path) -> None:
    write_problems(tmp_path / "choices.parquet", [Problem("1+1", "2", None)], "choices", "test")
    config.evaluation.sets = {"choices": str(tmp_path / "choices.parquet")}
    config.reward.by_source = {"choices": "exact"}
    preflight.check(config)


def test_a_run_starts_from_a_checkpoint_that_is_whole(config: Config, tmp_path: Path) -> None:
    ToMegatron(Path(config.model.path), ParallelConfig(tensor=2), None).write(tmp_path / "checkpoint")
    config.model.path = str(tmp_path / "checkpoint")
    preflight.check(config)
    assert RunDir(tmp_path).engine_model(config) == str(tmp_path / "checkpoint" / "hf")
    part = next((tmp_path / "checkpoint").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.path: .*checkpoint: {part.name} has \d+ bytes, \d+ were written"):
        preflight.check(config)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "parallel",
            {"tensor": 3},
            r"parallel\.tensor: given 3, .* 2 key/value heads nor is a multiple of them; allowed: 1, 2, 4",
        ),
        ("parallel", {"tensor": 8}, r"parallel\.tensor: given 8, .* 4 attention heads; allowed: 1, 2, 4"),
        ("parallel", {"pipeline": 3}, r"parallel\.pipeline: given 3, .* 2 layers; allowed: 1, 2"),
        ("parallel", {"pipeline": 2, "virtual_pipeline": 2}, r"virtual_pipeline: given 2, .* 1 layers a stage; allowed: 1"),
        ("parallel", {"virtual_pipeline": 2}, r"parallel\.virtual_pipeline: given 2; .* parallel\.pipeline must be above 1"),
        ("parallel", {"sequence": True}, r"parallel\.sequence: .* parallel\.tensor must be above 1"),
        ("parallel", {"expert": 2, "data": 2}, r"parallel\.expert: given 2, .* has no experts: leave both out"),
        ("actor", {"fp8": "tensorwise"}, r"actor\.fp8: given 'tensorwise', .*Transformer Engine .* 2\.2 or newer, found none"),
        ("actor", {"logprob_kernel": "triton"}, r"actor\.logprob_kernel: given 'triton', which needs a GPU, found none"),
        (
            "rollout",
            {"samples_per_prompt": 9, "max_running": 8},
            r"samples_per_prompt: given 9; vllm .* refuses more than rollout\.max_running=8",
        ),
        ("rollout", {"samples_per_prompt": 1}, r"samples_per_prompt: given 1; .* one alone teaches nothing: at least 2"),
        ("rollout", {"temperature": 0.005}, r"rollout\.temperature: given 0\.005; below 0\.01 vllm samples at another"),
        ("rollout", {"temperature": 2.5}, r"rollout\.temperature: given 2\.5; vllm refuses temperatures above 2"),
        ("rollout", {"tensor_parallel": 3}, r"rollout\.tensor_parallel: given 3, .* 4 attention heads; allowed: 1, 2, 4"),
        (
            "rollout",
            {"engine": "sglang", "python": "/no/python"},
            r"run `make sglang-env`",
        ),
        ("transfer", {"transport": "nccl"}, r"transport=nccl: needs CUDA, .* allowed here: shared_memory, files, gloo"),
        ("data", {"max_response_length": 60}, r"given 68; the model has 64 positions"),
        (
            "data",
            {"max_response_length": 5, "long_demonstrations": "refuse"},
            r"row \d+, target: \d+ tokens .* data\.max_response_length allows 5",
        ),
        ("data", {"max_response_length": 5}, r"none of the \d+ prompts looked at has a demonstration of at most .*=5 tokens"),
        ("data", {"max_prompt_length": 1}, r"all of the \d+ prompts looked at are longer than data\.max_prompt_length=1"),
        ("data", {"max_prompt_length": 1, "long_prompts": "refuse"}, r"row \d+, prompt: \d+ tokens; .* allows 1"),
        ("data", {"curriculum": CurriculumConfig(keep_failed=0)}, r"keep_failed: given 0; needs rollout\.cancel_decided=false"),
        ("data", {"train": "none.parquet"}, r"none\.parquet: no such file"),
        ("evaluation", {"sets": {"a": "none.parquet"}}, r"none\.parquet: no such file"),
        ("model", {"overrides": {"rope_tetha": 1}}, r"overrides\.rope_tetha: .*; did you mean model\.overrides\.rope_theta"),
        ("model", {"overrides": {"vocab_size": 99}}, r"has shape .*, config\.json implies \(99, 64\)"),
        ("model", {"overrides": {"max_position_embeddings": 31}}, r"given 32; the model has 31 positions"),
        ("model", {"path": "nowhere"}, r"model\.path: nowhere is not a folder"),
        ("algorithm", {"name": "ppo"}, r"ppo estimates advantages from a critic's values, and there is no critic model yet"),
        ("algorithm", {"name": "sft_grpo"}, r"algorithm\.sft_steps: given 0; the first phase takes 1 to 99 steps"),
        ("algorithm", {"overlong": OverlongConfig(buffer=24)}, r"overlong\.buffer: given 24; must be below .* \(24\)"),
        ("algorithm", {"gate": GateConfig(threshold=2, off_policy_threshold=0.1)}, r"for 8 samples; the band would be empty"),
        ("algorithm", {"gate": GateConfig(by_source={"maths": {"threshold": 1}})}, r"by_source\.maths: .* it has 'arithmetic'"),
        ("reward", {"by_source": {"maths": "exact"}}, r"reward\.by_source\.maths: .* evaluation sets .* it has 'arithmetic'"),
        ("algorithm", {"kl": KlConfig(coefficient=0.1, reference="nowhere")}, r"nowhere is not a folder"),
        ("algorithm", {"name": "magic"}, r"algorithm\.name: given 'magic'; allowed: sft"),
        ("reward", {"name": "magic"}, r"reward\.name: given 'magic'; allowed: math"),
    ],
)
def test_a_bad_setting_names_key_given_and_allowed(config: Config, section: str, change: dict, message: str) -> None:
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})
    with pytest.raises(HptError, match=message):
        preflight.check(changed)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert": 3, "data": 3}, r"parallel\.expert: given 3, .* 4 experts; allowed: 1, 2, 4"),
        ({"expert": 4, "data": 2}, r"expert: given 4 × expert_tensor 1, .* the 2 ranks of a stage .* allowed .*: 1, 2$"),
        ({"expert_tensor": 3, "data": 4}, r"expert_tensor: given 3, .* the 4 ranks of a stage .*; allowed: 1, 2, 4$"),
        ({"tensor": 2}, r"only under sequence parallelism; set parallel\.sequence=true"),
        ({"expert_tensor": 5}, r"parallel\.expert_tensor: given 5, .* 96 expert ffn size; allowed: 1, 2, 3, 4"),
    ],
)
def test_a_bad_layout_of_experts_names_what_would_divide(config: Config, tmp_path: Path, parallel: dict, message: str) -> None:
    tiny_families.MODELS["mixtral"](tmp_path / "moe")
    shape = model_shape(tmp_path / "moe")
    with pytest.raises(ConfigError, match=message):
        check_layout(config.model_copy(update={"parallel": ParallelConfig(**parallel)}), shape)
    check_layout(config.model_copy(update={"parallel": ParallelConfig(data=2, expert=2)}), shape)


def test_more_positions_by_an_override_let_longer_sequences_pass(config: Config) -> None:
    config.data.max_response_length = 100
    with pytest.raises(
        ConfigError, match=r"given 108; the model has 64 positions .* model\.overrides\.max_position_embeddings"
    ):
        preflight.check(config)
    config.model.overrides = {"max_position_embeddings": 108}
    preflight.check(config)


def other_model(config: Config, folder: Path, **change: object) -> str:
    """A copy of the configuration's model whose config.json has other values."""
    shutil.copytree(config.model.path, folder)
    write_config(folder, change)
    return str(folder)


def test_the_engines_own_folder_has_the_overrides_too(config: Config, tmp_path: Path) -> None:
    config.rollout.model = other_model(config, tmp_path / "engine", rms_norm_eps=1e-3)
    config.model.overrides = {"max_position_embeddings": 128}
    with pytest.raises(ConfigError, match=r"rollout\.model: the model in .*engine has another shape"):
        preflight.check(config)
    config.model.overrides = {"max_position_embeddings": 128, "rms_norm_eps": 1e-3}
    preflight.check(config)


def test_a_reference_model_may_have_other_constants_but_no_other_sizes(config: Config, tmp_path: Path) -> None:
    config.model.overrides = {"rope_theta": 40000, "max_position_embeddings": 128}
    config.algorithm.kl = KlConfig(coefficient=0.1, reference=other_model(config, tmp_path / "other", rms_norm_eps=1e-3))
    preflight.check(config)
    config.data.max_response_length = 100  # the override is not the reference's
    with pytest.raises(
        ConfigError, match=r"kl\.reference: the model in .*other has 64 positions; prompt and response have 108"
    ):
        preflight.check(config)
    config.algorithm.kl.reference = config.model.path
    preflight.check(config)
    tiny_llama.write(tmp_path / "wide", hidden=96, layers=2, heads=4, kv_heads=2, head_dim=32)
    config.algorithm.kl.reference = str(tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"kl\.reference: the model in .*wide has other sizes"):
        preflight.check(config)


def copied(config: Config, folder: Path, *names: str) -> Config:
    """The configuration with a model folder that has only some of the files."""
    for name in names:
        (folder / name).write_bytes((Path(config.model.path) / name).read_bytes())
    return config.model_copy(update={"model": ModelConfig(path=str(folder))})


def test_a_model_without_weights_or_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(HptError, match=r"has no \*\.safetensors files"):
        preflight.check(copied(config, tmp_path, "config.json"))
    with pytest.raises(HptError, match="has no tokenizer"):
        preflight.check(copied(config, tmp_path, "config.json", "model.safetensors"))


def test_damaged_or_wrong_weights_are_refused_before_anything_starts(config: Config, tmp_path: Path) -> None:
    changed = copied(config, tmp_path, "config.json", "model.safetensors")
    weights, text = tmp_path / "model.safetensors", (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"intermediate_size": 128', '"intermediate_size": 64'))
    with pytest.raises(HptError, match=r"mlp\..*_proj\.weight has shape .*, config\.json implies"):
        preflight.check(changed)
    (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(HptError, match=r"missing tensors \['model\.layers\.2"):
        preflight.check(changed)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HptError, match="not a whole safetensors file"):
        preflight.check(changed)


def test_the_command_line_prints_one_message_and_makes_no_run(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    done = programs.megatron_hpt("train", "config.yaml", "parallel.tensor=3", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: parallel.tensor: given 3")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_resume_without_a_run_is_explained(config: Config, tmp_path: Path) -> None:
    from megatron_hpt.run import newest

    with pytest.raises(ConfigError, match="no run of 'x' under"):
        newest("x", tmp_path)


def test_engines_that_cannot_sleep_are_refused(config: Config) -> None:
    config.rollout.sleep = True
    with pytest.raises(ConfigError, match=r"rollout\.sleep: with transfer\.transport=shared_memory .*cuda_ipc"):
        preflight.check(config)
    config.transfer.transport = "cuda_ipc"
    with pytest.raises(ConfigError, match=r"rollout\.sleep: vllm gives memory back on GPUs only, and this machine has none"):
        preflight.check(config)
    check_sleep(config, on_gpus=True)
    config.rollout.urls = ["http://a:1"]
    with pytest.raises(ConfigError, match=r"rollout\.sleep: servers of your own"):
        preflight.check(config)


def test_trainer_and_engine_must_fit_the_gpu_that_they_share(config: Config) -> None:
    config.transfer.transport, config.rollout.sleep, config.actor.offload = "cuda_ipc", True, "all"
    shape = run_shape(config)
    check_memory(config, shape, 80 * 2**30)
    with pytest.raises(ConfigError, match=r"a trainer rank needs 6\.\d GiB of 6\nmegatron-hpt plan shows"):
        check_memory(config, shape, 6 * 2**30)
    with pytest.raises(ConfigError, match=r"rollouts take 3\.0 GiB .* which has 24; .* is 0\.92, at most 0\.87 fits"):
        check_memory(config, shape, 24 * 2**30)
