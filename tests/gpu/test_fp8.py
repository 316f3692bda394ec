"""FP8 through Transformer Engine's layers: what the weights are, and that it really computes in FP8."""

import json
from pathlib import Path

import pytest

from megatron_hpt.config import ActorConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_hpt.examples import tiny_families
from megatron_hpt.models.conversion import ToMegatron
from megatron_hpt.overrides import dump_yaml
from tests.actor.test_actor import Layouts
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
WEIGHTS = Path(__file__).with_name("weights.py")
FP8_ERROR = 0.03
"""Rounding to e4m3's three bits: at most 1/16, on average half of that and less."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Batches, and a model whose products have the multiples of 16 that FP8 wants."""
    folder = tmp_path_factory.mktemp("fp8")
    tiny_families.write(folder / "model", "llama", vocab_size=256)
    return Layouts(folder, folder / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """The same of a mixture of experts."""
    folder = tmp_path_factory.mktemp("mixture")
    tiny_families.write(folder / "model", "mixtral", vocab_size=256, num_local_experts=4, num_experts_per_tok=2)
    return Layouts(folder, folder / "model")


def built(layouts: Layouts, name: str, model: Path | None = None, steps: int = 0, **actor) -> dict:
    """What `weights.py` says of an actor in FP8."""
    sections = {
        "model": ModelConfig(path=str(model or layouts.model), dtype="bfloat16"),
        "actor": ActorConfig(micro_batch_tokens=64, bf16_layers=0, **actor),
        "optimizer": OptimizerConfig(lr=1e-5),
    }
    config, out = layouts.folder / f"{name}.yaml", layouts.folder / f"{name}.json"
    config.write_text(dump_yaml(layouts.config(64).model_copy(update=sections)))
    run_ranks(WEIGHTS, config, layouts.model, out, "--ledger", layouts.folder / "ledger", "--steps", steps, ranks=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_weights_kept_in_fp8_train_from_the_weights_of_the_folder(layouts: Layouts, recipe: str) -> None:
    found = built(layouts, f"gather_{recipe}", fp8=recipe, fp8_param_gather=True, steps=2)
    assert "Float8Tensor" in found["classes"]
    assert found["main"] < 3e-3  # float32 copies of bfloat16 weights, which had been random
    assert 0 < found["model"] < FP8_ERROR  # each tensor has a scale that fits all of it
    assert found["trained"] < 2 * FP8_ERROR


def test_weights_kept_in_fp8_are_those_of_a_checkpoint_without_optimizer(layouts: Layouts) -> None:
    checkpoint = layouts.folder / "converted" / "step_000000"
    ToMegatron(layouts.model, ParallelConfig(), None).write(checkpoint)
    found = built(layouts, "checkpoint", model=checkpoint, fp8="tensorwise", fp8_param_gather=True)
    assert found["main"] < 3e-3
    assert 0 < found["model"] < FP8_ERROR


def test_fp8_computes_something_else_than_bfloat16_and_nearly_the_same(layouts: Layouts) -> None:
    plain, fp8 = (built(layouts, f"loss_{recipe}", fp8=recipe, steps=1)["losses"][0] for recipe in ("none", "tensorwise"))
    assert 0 < abs(fp8 - plain) / abs(plain) < 2e-2


@pytest.mark.parametrize("gathers", [False, True], ids=["", "weights in FP8"])
def test_experts_compute_in_fp8_on_padded_groups_of_tokens(mixture: Layouts, gathers: bool) -> None:
    plain = built(mixture, f"experts_none_{gathers}", fp8="none", steps=2)
    fp8 = built(mixture, f"experts_{gathers}", fp8="tensorwise", fp8_param_gather=gathers, steps=2)
    assert fp8["main"] < 3e-3
    assert all(0 < abs(a - b) / abs(b) < 5e-2 for a, b in zip(fp8["losses"], plain["losses"], strict=True))
