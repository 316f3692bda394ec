"""The folders of a run's models when `model.overrides` change them."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.launch import overridden_models
from megatron_hpt.models.hf_files import copy_side_files, write_config
from megatron_hpt.overrides import load_yaml
from megatron_hpt.run import RunDir, create

OVERRIDES = {"rope_theta": 40000, "max_position_embeddings": 128}


def started(tmp_path: Path, model: Path | str, overrides: dict = OVERRIDES, engine_model: str = "") -> tuple[RunDir, Config]:
    config = Config(name="x", model=ModelConfig(path=str(model), overrides=overrides), data=DataConfig(train="t"))
    config.rollout.model = engine_model
    run = create(config, tmp_path / "runs")
    overridden_models.write(config, run)
    return run, config


def contents(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "config.json"}


def test_a_run_without_overrides_uses_the_folders_themselves(tmp_path: Path, tiny_model: Path) -> None:
    run, config = started(tmp_path, tiny_model, {})
    assert run.actor_model(config) == run.engine_model(config) == str(tiny_model)
    assert not list(run.path.glob("*_model"))


def test_everything_but_the_configuration_is_a_link(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (tiny_model / "config.json").read_bytes()
    monkeypatch.chdir(tiny_model.parent)
    run, config = started(tmp_path, tiny_model.name)  # a relative path: links hold wherever a process is
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, (run.actor_model(config), run.engine_model(config))):
        assert folder.is_absolute()
        assert folder.parent == run.path
        assert contents(folder) == contents(tiny_model)
        links = {path.name for path in folder.iterdir() if path.is_symlink()}
        assert {path.name for path in folder.iterdir()} - links == {"config.json"}
        read = AutoConfig.from_pretrained(folder)
        assert (read.rope_parameters["rope_theta"], read.max_position_embeddings) == (40000, 128)
        assert AutoTokenizer.from_pretrained(folder)("1+2").input_ids
    assert (tiny_model / "config.json").read_bytes() == before
    assert load_yaml(run.config).model.overrides == OVERRIDES


def test_a_resumed_run_writes_them_anew_and_touches_no_weights(tmp_path: Path, tiny_model: Path) -> None:
    run, config = started(tmp_path, tiny_model)
    write_config(Path(run.engine_model(config)), {"rope_theta": 1})
    overridden_models.write(config, run)
    assert json.loads((Path(run.engine_model(config)) / "config.json").read_text())["rope_theta"] == 40000
    assert (tiny_model / "model.safetensors").stat().st_size > 0
    assert not list(run.path.glob(".*partial"))


def test_the_engines_own_folder_is_the_one_that_is_linked(tmp_path: Path, tiny_model: Path) -> None:
    own = tmp_path / "own"
    copy_side_files(tiny_model, own)
    write_config(own, {"quantization_config": {"quant_method": "fp8"}})
    run, config = started(tmp_path, tiny_model, engine_model=str(own))
    assert {path.name for path in Path(run.engine_model(config)).iterdir()} == {path.name for path in own.iterdir()}
    read = json.loads((Path(run.engine_model(config)) / "config.json").read_text())
    assert (read["rope_theta"], read["quantization_config"]) == (40000, {"quant_method": "fp8"})
    assert "quantization_config" not in json.loads((Path(run.actor_model(config)) / "config.json").read_text())


def test_what_copies_side_files_gets_files(tmp_path: Path, tiny_model: Path) -> None:
    """Checkpoints and the export carry them: they outlive the run directory and the model's folder."""
    run, config = started(tmp_path, tiny_model)
    copy_side_files(Path(run.actor_model(config)), tmp_path / "copy")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {p.name for p in tiny_model.iterdir()} - {
        "model.safetensors"
    }
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["rope_theta"] == 40000


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_are_started_with_the_folder(tmp_path: Path, tiny_model: Path, engine: str) -> None:
    run, config = started(tmp_path, tiny_model)
    command = ENGINES[engine].command(config, "python", Start(run.engine_model(config), 1, run.path, on_gpus=False))
    assert run.engine_model(config) in command
    assert str(tiny_model) not in command
