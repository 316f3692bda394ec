"""The tool that checks this project against numbers of the reference code."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_hpt.errors import DataError
from tests import programs
from tools.reference_vectors.check import CHECKERS, check_file

ROOT = Path(__file__).parents[2]
VECTORS = ROOT.parent / "shared" / "vectors" / "loss_vectors.json"
needs_vectors = pytest.mark.skipif(not VECTORS.is_file(), reason="the reference's vectors are not on this machine")


@needs_vectors
def test_every_case_of_the_reference_is_reproduced() -> None:
    outcomes = check_file(VECTORS)
    assert [miss for outcome in outcomes for miss in outcome.misses] == []
    assert {outcome.function for outcome in outcomes} == CHECKERS.keys()
    assert sum(outcome.cases for outcome in outcomes) == len(json.loads(VECTORS.read_text())["cases"])


@needs_vectors
@pytest.mark.parametrize("part", ["expected", "expected_grad"])
def test_a_wrong_number_is_a_miss(tmp_path: Path, part: str) -> None:
    """Every expectation counts: each is disturbed in turn, and each must be found."""
    cases = json.loads(VECTORS.read_text())["cases"]
    by_function = {case["function"]: case for case in reversed(cases) if case.get(part)}
    by_function.pop("ResumableRandomSampler", None)  # another permutation on purpose
    for function, case in by_function.items():
        if "raises" in case["expected"]:
            continue
        name = "effective_loss" if "effective_loss" in case[part] else next(iter(case[part]))
        disturbed = {**case, part: {**case[part], name: disturb(case[part][name])}}
        (tmp_path / "v.json").write_text(json.dumps({"cases": [disturbed]}))
        (outcome,) = check_file(tmp_path / "v.json")
        assert outcome.misses, f"{function}: {part}.{name} is not checked"


def disturb(value):
    """The first number in it, changed by a millionth."""
    if isinstance(value, dict):
        key = next(key for key, inner in value.items() if not isinstance(inner, str))
        return {**value, key: disturb(value[key])}
    if isinstance(value, list):
        return [disturb(value[0]), *value[1:]]
    return value * (1 + 1e-6) + 1e-6 if isinstance(value, float) else not value if isinstance(value, bool) else value + 1


@needs_vectors
def test_a_wrong_nan_an_unknown_quantity_and_an_empty_file_are_found(tmp_path: Path) -> None:
    """A reason to differ holds for the cases it is about, not for every case with that number."""
    cases = json.loads(VECTORS.read_text())["cases"]
    likelihood = next(case for case in cases if case["name"] == "sft_pure/on_only")
    clipped = next(case for case in cases if case["name"] == "ppo/mixed/remove_token_mean=True/remove_clip=False")
    wrong = [
        {**likelihood, "expected": {"loss": "NaN"}},
        {**clipped, "expected": {**clipped["expected"], "pg_clipfrac": 0.93}},
        {**likelihood, "expected": {**likelihood["expected"], "unheard_of": 1.0}},
    ]
    for case in wrong:
        (tmp_path / "v.json").write_text(json.dumps({"cases": [case]}))
        (outcome,) = check_file(tmp_path / "v.json")
        assert len(outcome.misses) == 1
    (tmp_path / "v.json").write_text(json.dumps({"cases": []}))
    with pytest.raises(DataError, match="has no cases"):
        check_file(tmp_path / "v.json")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return programs.tool("check_vectors.py", *arguments)


def test_the_tool_prints_a_line_a_function_and_fails_on_a_miss(tmp_path: Path) -> None:
    gate = {
        "name": "gate/1",
        "function": "select_on_off_ada_balance",
        "config": {"unify_strategy": "switch", "switch_gate": 1, "switch_gate_off": 2},
        "inputs": {"on_solve_num": [0, 1, 2, 3]},
        "expected": {"rows": [[8, 0, 1], [8, 0, 1], [8, 0, -1], [0, 0, 0]]},
    }
    (tmp_path / "v.json").write_text(json.dumps({"cases": [gate]}))
    good = run(str(tmp_path / "v.json"))
    assert good.returncode == 0, good.stdout
    assert good.stdout.startswith("select_on_off_ada_balance")
    assert good.stdout.splitlines()[-1] == "1 cases, 1 quantities, 0 functions missed"
    gate["expected"]["rows"][3] = [8, 0, 1]
    (tmp_path / "v.json").write_text(json.dumps({"cases": [gate, {**gate, "function": "unheard_of"}]}))
    bad = run(str(tmp_path / "v.json"))
    assert bad.returncode == 1
    assert "missed   gate/1: rows[3][0]: ours 0, theirs 8" in bad.stdout
    assert "no check for unheard_of" in bad.stdout


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(DataError, match="not a file of test vectors"):
        check_file(tmp_path / "v.json")
    assert run(str(tmp_path / "none.json")).returncode == 2


def test_graders_are_compared_with_the_references_verdicts(tmp_path: Path) -> None:
    answers = {"right": ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True), "wrong": ("\\boxed{3}", "4", False)}
    cases = [
        {"name": name, "response": response, "ground_truth": truth, "score": {"6": verdict}}
        for name, (response, truth, verdict) in answers.items()
    ]
    gate = {"config": {"unify_strategy": "switch", "switch_gate": 0, "switch_gate_off": 0}, "inputs": {"on_solve_num": [0]}}
    gate |= {"name": "g", "function": "select_on_off_ada_balance", "expected": {"rows": [[8, 0, 1]]}}
    (tmp_path / "v.json").write_text(json.dumps({"cases": [gate]}))
    (tmp_path / "g.json").write_text(json.dumps({"cases": cases}))
    good = run(str(tmp_path / "v.json"), "--grader", str(tmp_path / "g.json"))
    assert good.returncode == 0, good.stdout
    cases[1]["score"]["6"] = True
    (tmp_path / "g.json").write_text(json.dumps({"cases": cases}))
    assert run(str(tmp_path / "v.json"), "--grader", str(tmp_path / "g.json")).returncode == 1


def test_the_tool_checks_graders_alone(tmp_path: Path) -> None:
    case = {"name": "mine", "response": "\\boxed{3}", "ground_truth": "4", "score": {"6": True}}
    (tmp_path / "g.json").write_text(json.dumps({"cases": [case]}))
    done = run("--grader", str(tmp_path / "g.json"))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 cases, 1 quantities, 1 functions missed")
    assert "mine: ours False, theirs True" in done.stdout
    assert "given no file; expected LOSS.json" in run().stderr
