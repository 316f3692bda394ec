"""Replaying a gate from a ledger, without engines."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.batch.history import History
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, GateConfig, ModelConfig, TrainerConfig
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.objective.gate import Choice
from megatron_hpt.rollout.assembly import GateDecider, Group, assemble
from megatron_hpt.run import RunDir, create
from megatron_hpt.telemetry.replay import replay
from tests import programs

REWARDS = st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4), min_size=1, max_size=5)


def config_of(gate: GateConfig, name: str = "hpt") -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t", max_response_length=4),
        algorithm=AlgorithmConfig(name=name, gate=gate),
        trainer=TrainerConfig(prompts_per_step=8),
    )


def recorded(folder: Path, steps: list[list[list]], config: Config) -> Ledger:
    """A ledger as the coordinator writes it."""
    ledger = Ledger(folder)
    folder.mkdir(parents=True, exist_ok=True)
    history, algorithm = History(ledger, 0), of_run(config)
    for step, groups in enumerate(steps):
        rows = []
        for index, rewards in enumerate(groups):
            prompt = Prompt(str(index), [5], [8, 1] if index % 3 else None, "7", "hard" if index % 2 else "easy")
            rows.append(Group(prompt, [Sample([7], [-0.1], "stop", ((step, 1),)) for _ in rewards], rewards))
        ledger.write(assemble(step, rows, algorithm, config, {"data/next_prompt": 5 * (step + 1)}, history.choices))
        history.add(step)
    return ledger


GATE = GateConfig(threshold=1, hysteresis=1, by_source={"hard": {"threshold": 2, "off_policy_threshold": 3}})


@settings(max_examples=20)
@given(steps=st.lists(REWARDS, min_size=1, max_size=4))
def test_the_same_gate_decides_the_same(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    config = config_of(GATE)
    ledger = recorded(tmp_path_factory.mktemp("ledger"), steps, config)
    found = list(replay(ledger, of_run(config).gate))
    assert [step.changed for step in found] == [0] * len(steps)
    assert [step.prompts for step in found] == [len(groups) for groups in steps]


@settings(max_examples=30)
@given(rewards=st.lists(st.sampled_from([0.0, 1.0, None]), max_size=7), source=st.sampled_from(["easy", "hard"]))
def test_a_prompt_whose_rollouts_were_cancelled_is_decided_as_if_all_had_finished(
    tmp_path_factory: pytest.TempPathFactory, rewards: list, source: str
) -> None:
    """Shares are of the rollouts that were asked for; recorded are only those that finished."""
    config, ledger = config_of(GATE), Ledger(tmp_path_factory.mktemp("ledger"))
    gate, prompt, missing = of_run(config).gate, Prompt("p", [5], [8, 1], "7", source), 8 - len(rewards)
    decider = GateDecider(gate, 0, {})
    if not decider.decided(prompt, rewards, 8):
        return
    sample = Sample([7], [-0.1], "stop", ((0, 1),))
    cut = Group(prompt, [sample] * len(rewards), rewards, cancelled=missing)
    whole = Group(prompt, [sample] * 8, [*rewards, *[1.0] * missing])
    ledger.write(assemble(0, [cut], of_run(config), config, {"data/next_prompt": 1}))
    ledger.write(assemble(1, [whole], of_run(config), config, {"data/next_prompt": 2}))
    decisions = [ledger.read(step).decisions[0] for step in (0, 1)]
    assert decisions[0]["choice"] == decisions[1]["choice"] != Choice.ROLLOUTS
    assert decisions[0]["cancelled"] == missing
    assert len(ledger.read(0).rows) == len(rewards) + 1
    assert [step.changed for step in replay(ledger, gate)] == [0, 0]


def test_another_gate_is_counted_step_by_step(tmp_path: Path) -> None:
    steps = [[[1.0, 0, 0, 0]] * 2, [[0.0] * 4, [1.0] * 4]]
    ledger = recorded(tmp_path, steps, config_of(GateConfig(threshold=0)))
    first, second = replay(ledger, of_run(config_of(GateConfig(threshold=1))).gate)
    assert first.recorded == {Choice.ROLLOUTS: 2}
    assert first.replayed == {Choice.ROLLOUTS: 1, Choice.DEMONSTRATION: 1}  # the first prompt has no demonstration
    assert (first.changed, second.changed) == (1, 0)


def test_a_changed_weight_is_a_changed_decision(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, [[[1.0, 0, 0, 0]] * 3], config_of(GateConfig(soft=True)))
    other = GateConfig(soft=True, rollout_schedule=[0.9, 1], demonstration_schedule=[0.1, 0.01])
    (step,) = replay(ledger, of_run(config_of(other)).gate)
    assert step.recorded == step.replayed
    assert step.changed == 3
    assert step.replayed_weights[0] == pytest.approx(3 * 0.925)


def test_a_prompt_that_occurs_twice_in_a_step_is_decided_as_it_was(tmp_path: Path) -> None:
    config = config_of(GateConfig(threshold=0, hysteresis=1))
    ledger, prompt = Ledger(tmp_path), Prompt("p", [5], [8, 1], "7", "")
    samples = [Sample([7], [-0.1], "stop", ((0, 1),))] * 4
    twice = [Group(prompt, samples, rewards) for rewards in ([0.0] * 4, [1.0, 0, 0, 0])]
    ledger.write(assemble(0, twice, of_run(config), config, {"data/next_prompt": 2}))
    (step,) = replay(ledger, of_run(config).gate)
    assert step.changed == 0


def test_steps_of_a_first_phase_of_sft_are_left_out(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, [[[], []], [[0.0] * 4, [1.0] * 4]], config_of(GateConfig()))
    assert [step.step for step in replay(ledger, of_run(config_of(GateConfig())).gate)] == [1]


def test_an_ungraded_visit_is_not_remembered(tmp_path: Path) -> None:
    config = config_of(GateConfig(threshold=0, hysteresis=2))
    visits = [[[0.0] * 4] * 2, [[None] * 4] * 2, [[1.0, 0, 0, 0]] * 2]
    decisions = [Ledger.read(recorded(tmp_path, visits, config), step).decisions[1]["choice"] for step in range(3)]
    assert decisions == ["demonstration", "skipped", "demonstration"]


def test_a_run_without_rollouts_cannot_be_replayed(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, [[[], []]], config_of(GateConfig(), "sft"))
    with pytest.raises(ConfigError, match="this run generated none"):
        list(replay(ledger, of_run(config_of(GateConfig())).gate))
    with pytest.raises(ConfigError, match="no step has rollouts"):
        list(replay(Ledger(tmp_path / "none"), of_run(config_of(GateConfig())).gate))


def test_what_the_coordinator_remembers_is_in_the_ledger(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, [[[0.0] * 4] * 3, [[1.0] * 4] * 3], config_of(GateConfig(threshold=0)))
    assert (History(ledger, 0).choices, History(ledger, 0).next_prompt) == ({}, 0)
    taught = History(ledger, 1)
    assert taught.choices == {"0": Choice.ROLLOUTS, "1": Choice.DEMONSTRATION, "2": Choice.DEMONSTRATION}
    assert taught.next_prompt == 5
    assert set(History(ledger, 2).choices.values()) == {Choice.ROLLOUTS}


def test_a_run_of_any_algorithm_that_generates_can_be_replayed(tmp_path: Path) -> None:
    config = config_of(GateConfig(), "grpo")
    run = create(config, tmp_path)
    recorded(run.batches, [[[0.0] * 4, [0.0] * 4, [1.0] * 4]], config)
    shown = command("replay", str(run.path), "--gate", "threshold=0")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-2].split()[-2:] == ["1", "3"]  # one prompt has no demonstration, one is solved


def command(*arguments: str) -> subprocess.CompletedProcess:
    return programs.megatron_hpt(*arguments)


def test_the_command_line_shows_every_step_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    config = config_of(GateConfig(threshold=0))
    run: RunDir = create(config, tmp_path)
    recorded(run.batches, [[[1.0, 0, 0, 0]] * 2] * 3, config)
    shown = command("replay", str(run.path), "--gate", "threshold=0.5", "--gate", "strict=true")
    assert shown.returncode == 0, shown.stderr
    assert "recorded: demonstration if P ≤ 0 of n, else rollouts" in shown.stdout
    assert "replayed: demonstration if P < 0.5, else rollouts" in shown.stdout
    assert [line.split()[0] for line in shown.stdout.splitlines()[3:7]] == ["0", "1", "2", "all"]
    wrong = command("replay", str(run.path), "--gate", "treshold=1")
    assert wrong.returncode == 1
    assert "did you mean algorithm.gate.threshold?" in wrong.stderr.replace("\n", " ")


def test_the_table_is_printed_and_a_row_explained() -> None:
    table = command("algorithms")
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in ("hpt", "luffy", "gspo", "sft_grpo", "π_ref"))
    one = command("algorithms", "hpt", "gate.off_policy_threshold=2")
    assert "L = L_rollouts + L_demonstrations + L_off_policy" in one.stdout
    assert "f(x) = x/(x+0.1)" in one.stdout
    assert "did you mean 'hpt'?" in command("algorithms", "hptt").stderr
