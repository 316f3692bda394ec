"""FP8 is refused by name where it cannot run, and never taken for granted where it was asked for."""

import pytest
import torch
from packaging.version import Version
from pydantic import ValidationError

from megatron_hpt.actor.model.precision import FP8_RECIPES, Machine, check_bf16_layers, check_fp8, prove_fp8, this_machine
from megatron_hpt.config import ActorConfig
from megatron_hpt.errors import ConfigError

H100 = Machine(Version("2.11.0"), (9, 0), Version("13.0"))


def test_a_hopper_runs_all_recipes_but_mxfp8() -> None:
    for name in ("none", "delayed", "tensorwise", "blockwise"):
        check_fp8(name, "bfloat16", H100)
    with pytest.raises(ConfigError, match=r"'mxfp8', which needs a GPU of compute capability 10\.0 or newer, found 9\.0"):
        check_fp8("mxfp8", "bfloat16", H100)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (
            Machine(None, (9, 0), Version("13.0")),
            r"Transformer Engine \(package transformer-engine\) 2\.3 or newer, found none",
        ),
        (Machine(Version("2.2"), (9, 0), Version("13.0")), r"2\.3 or newer, found 2\.2"),
        (Machine(Version("2.11"), (9, 0), Version("12.4")), r"CUDA 12\.9 or newer, found 12\.4"),
        (Machine(Version("2.11"), None, None), r"CUDA .* found none; a GPU of compute capability 9\.0 or newer, found none"),
    ],
)
def test_everything_that_is_missing_is_named(machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fp8("blockwise", "bfloat16", machine)


def test_fp8_wants_bfloat16_around_it() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.dtype=bfloat16, given float32"):
        check_fp8("tensorwise", "float32", H100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", FP8_RECIPES)
def test_this_machine_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"actor.fp8: given '{name}'.*set actor.fp8=none"):
        check_fp8(name, "bfloat16", this_machine())


def test_a_model_without_fp8_layers_is_not_trained_under_an_fp8_flag() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert prove_fp8("none", layers.modules()) == 0
    with pytest.raises(ConfigError, match="would train in bfloat16"):
        prove_fp8("tensorwise", layers.modules())


@pytest.mark.parametrize(("bf16_layers", "layers"), [(1, 2), (2, 4), (2, 3), (40, 80)])
def test_bfloat16_layers_that_leave_none_in_fp8_are_refused(bf16_layers: int, layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"leave none in FP8: at most {(layers - 1) // 2}, or set actor\.fp8=none"):
        check_bf16_layers("tensorwise", bf16_layers, layers)
    check_bf16_layers("tensorwise", (layers - 1) // 2, layers)
    check_bf16_layers("none", bf16_layers, layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8_param_gather": True}, "choose a recipe"),
        ({"fp8": "delayed"}, "set bf16_layers to 0"),
        ({"deterministic": True, "expert_dispatcher": "deepep"}, "set it to alltoall"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ActorConfig(**settings)
