"""Where a run continues, and what may not change when it does."""

import json
import os
import shutil
import time
from pathlib import Path
from time import gmtime

import pytest

from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, MixtureConfig, ModelConfig, TrainerConfig
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.files import swap_in
from megatron_hpt.launch import preflight, train
from megatron_hpt.launch.supervisor import Supervisor
from megatron_hpt.launch.train import _check_same_batches, resume_point, resume_run
from megatron_hpt.models.checkpoints import record, superseded
from megatron_hpt.overrides import dump_yaml, load_yaml
from megatron_hpt.run import RunDir, create, newest
from megatron_hpt.telemetry.metrics import MetricsLog, read


def make(tmp_path: Path, checkpoints: list[int], lines: int, export: bool = False) -> tuple[RunDir, Config]:
    config = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), trainer=TrainerConfig(steps=10))
    run = create(config, tmp_path)
    for step in checkpoints:
        run.checkpoint(step).mkdir()
        record(run.checkpoint(step), {"step": step})
    run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(lines)))
    if export:
        run.export.mkdir()
    return run, config


@pytest.mark.parametrize(
    ("checkpoints", "lines", "export", "start"),
    [
        ([], 3, False, 0),
        ([4, 6], 7, False, 6),
        ([4, 6], 6, False, 6),
        ([4, 6], 5, False, 4),  # killed between a checkpoint and its step's line
        ([4, 6], 2, False, 0),
        ([8, 10], 10, False, 8),  # killed before the export
        ([8, 10], 9, False, 8),  # killed before the last line
        ([8, 10], 10, True, 10),  # complete
    ],
)
def test_the_newest_checkpoint_after_which_nothing_is_lost(
    tmp_path: Path, checkpoints: list[int], lines: int, export: bool, start: int
) -> None:
    assert resume_point(*make(tmp_path, checkpoints, lines, export)) == start


@pytest.mark.parametrize("harm", ["missing", "short", "no record", "half removed"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    run, config = make(tmp_path, [4], 7)
    newest_, weights = run.checkpoint(6), run.checkpoint(6) / "weights.distcp"
    newest_.mkdir()
    weights.write_bytes(b"12345")
    record(newest_, {"step": 6})
    assert resume_point(run, config) == 6
    if harm == "missing":
        weights.unlink()
    elif harm == "short":
        weights.write_bytes(b"1234")
    else:
        (newest_ / "megatron_hpt.json").write_text("{" if harm == "no record" else "{}")
    assert resume_point(run, config) == 4
    assert "step_000006 is damaged" in caplog.text


def test_the_newest_and_every_nth_stay() -> None:
    assert superseded([2, 4, 6, 8, 10, 12], newest=2, every=0) == [2, 4, 6, 8]
    assert superseded([2, 4, 6, 8, 10, 12], newest=1, every=4) == [2, 6, 10]
    assert superseded([2], newest=2, every=0) == []


def test_a_longer_run_may_not_change_the_schedule_of_its_gate() -> None:
    config = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), algorithm=AlgorithmConfig(name="chord"))
    longer = config.model_copy(update={"trainer": TrainerConfig(steps=200)})
    with pytest.raises(ConfigError, match=r"trainer\.steps, which the gate's schedule depends on"):
        _check_same_batches(config, longer)
    fixed = AlgorithmConfig(name="chord", mixture=MixtureConfig(steps=100))
    _check_same_batches(*(c.model_copy(update={"algorithm": fixed}) for c in (config, longer)))


def test_half_written_and_renamed_checkpoints_do_not_count(tmp_path: Path) -> None:
    run, _ = make(tmp_path, [4], 10)
    for name in (".step_000006.partial", "step_000006.bak", "step_x"):
        (run.checkpoints / name).mkdir()
    assert run.checkpoint_steps() == [4]


@pytest.mark.parametrize(
    "override", ["data.train=other.parquet", "rollout.samples_per_prompt=2", "trainer.seed=5", "algorithm.name=grpo"]
)
def test_settings_that_the_ledger_depends_on_may_not_change(tmp_path: Path, override: str) -> None:
    run, _ = make(tmp_path, [4], 5)
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"--resume: .*{key.split('.')[0]}.* cannot change within a run"):
        resume_run(str(run.path), [override], tmp_path)


def test_a_run_directory_is_claimed_by_one_process(tmp_path: Path) -> None:
    run, _ = make(tmp_path, [], 0)
    with run.lock(), pytest.raises(ConfigError, match="another process is training in this run directory"):
        run.lock()
    run.lock().close()


def test_newest_takes_no_run_of_a_longer_name(tmp_path: Path) -> None:
    run, config = make(tmp_path, [], 0)
    create(config.model_copy(update={"name": "x-large"}), tmp_path)
    assert newest("x", tmp_path).path == run.path


def test_the_newest_run_is_the_last_that_was_started_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another time zone, summer time, a clock that was put back, many starts in one second."""
    _, config = make(tmp_path, [], 0)
    moment = 1_790_000_000
    runs = []
    for hours in (0, -1, 14, -12, *[3] * 12):
        monkeypatch.setattr("megatron_hpt.run.time.gmtime", lambda at=moment + 3600 * hours: gmtime(at))
        runs.append(create(config, tmp_path).path)
        assert newest(config.name, tmp_path).path == runs[-1]
    shutil.rmtree(runs[-1])
    os.utime(runs[3] / "config.yaml")
    assert newest(config.name, tmp_path).path == runs[-2]


def test_a_runs_name_has_its_start_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XXX-14")
    time.tzset()
    try:
        before = time.strftime("%Y%m%d-%H%M", gmtime())
        run, _ = make(tmp_path, [], 0)
        assert before <= run.path.name.removeprefix("x-") <= time.strftime("%Y%m%d-%H%M%S", gmtime())
    finally:
        monkeypatch.undo()
        time.tzset()


def test_runs_of_older_versions_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    _, config = make(tmp_path / "new", [], 0)
    for name in ("x-20250101-000000", "x-20250101-000000-2", "x-20250101-000000-10", "x-20240101-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_yaml(config))
    assert newest("x", tmp_path).path.name == "x-20250101-000000-10"
    assert newest("x", tmp_path).path != create(config, tmp_path).path == newest("x", tmp_path).path


@pytest.mark.parametrize("kind", ["file", "link"])
def test_runs_that_is_no_folder_is_said(tmp_path: Path, kind: str) -> None:
    _, config = make(tmp_path / "new", [], 0)
    runs = tmp_path / "runs"
    runs.touch() if kind == "file" else runs.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"runs: (is a file; give a folder|cannot be written)"):
        create(config, runs)


def test_the_recipes_arguments_name_the_run_and_are_no_overrides_of_it(tmp_path: Path) -> None:
    make(tmp_path, [4], 4)
    sections = "model=ModelConfig(path='m'), data=DataConfig(train='t')"
    imports = "from megatron_hpt.config import Config, DataConfig, ModelConfig"
    (tmp_path / "r.py").write_text(f"{imports}\ndef recipe(run: str = 'y'): return Config(name=run, {sections})")
    with pytest.raises(ConfigError, match="no run of 'y'"):
        resume_run(str(tmp_path / "r.py"), [], tmp_path)
    with pytest.raises(ConfigError, match=r"--resume: trainer\.seed cannot change"):
        resume_run(str(tmp_path / "r.py"), ["run=x", "trainer.seed=5"], tmp_path)


@pytest.mark.parametrize(("checkpoints", "lines"), [([4, 8], 9), ([4, 8], 8), ([4], 9), ([10], 10)])
def test_fewer_steps_than_are_trained_are_refused_and_everything_stays(
    tmp_path: Path, checkpoints: list[int], lines: int
) -> None:
    run, _ = make(tmp_path, checkpoints, lines, export=True)
    before = contents(run)
    with pytest.raises(ConfigError, match=rf"trainer\.steps: given 7; .* has trained {max(lines, *checkpoints)} steps"):
        resume_run(str(run.path), ["trainer.steps=7"], tmp_path)
    assert contents(run) == before


class Fails(Exception):
    pass


def test_nothing_of_a_run_goes_before_its_new_part_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails at the start: configuration, lines, export, checkpoints and the ledger are as they were."""
    run, _ = make(tmp_path, [4, 6, 10], 10, export=True)
    (run.export / "model.safetensors").write_bytes(b"weights")
    (run.batches / "step_000009.arrow").write_bytes(b"batch")
    kept = {path: text for path, text in contents(run).items() if path.name != "config.yaml"}

    def fail(self: Supervisor) -> None:
        raise Fails

    monkeypatch.setattr(preflight, "check", lambda config: None)
    monkeypatch.setattr(Supervisor, "run", fail)
    monkeypatch.setattr(train, "_report", lambda run: None)
    with pytest.raises(Fails):
        resume_run(str(run.path), ["trainer.steps=20"], tmp_path)
    assert contents(run).items() >= kept.items()
    longer = load_yaml(run.config)
    assert (longer.trainer.steps, run.exported_step(longer)) == (20, 10)
    assert resume_point(run, longer) == 10  # the export of step 10 does not make a run of 20 steps complete


def test_a_run_that_is_being_trained_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make(tmp_path, [4], 6)
    monkeypatch.setattr(preflight, "check", lambda config: None)
    with run.lock():
        before = contents(run)
        with pytest.raises(ConfigError, match="another process is training"):
            resume_run(str(run.path), ["trainer.steps=20"], tmp_path)
        assert contents(run) == before


def test_old_lines_stay_until_the_first_new_one(tmp_path: Path) -> None:
    run, _ = make(tmp_path, [4], 6)
    log = MetricsLog(run, 4)
    assert len(read(run.metrics)) == 6
    for step in (4, 5):
        log.write({"step": step, "new": True})
    log.close()
    assert [(line["step"], "new" in line) for line in read(run.metrics)] == [
        *((s, False) for s in range(4)),
        (4, True),
        (5, True),
    ]
    MetricsLog(run, 2).close()  # it was ended before its first step
    assert len(read(run.metrics)) == 6


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    new, path = tmp_path / "new", tmp_path / "export"
    for folder, text in ((path, "old"), (new, "new")):
        folder.mkdir()
        (folder / "model").write_text(text)
    swap_in(new, path)
    assert (path / "model").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


def contents(run: RunDir) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
