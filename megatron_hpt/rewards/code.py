"""The program in a response, run on tests in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards import sandbox
from megatron_hpt.rewards.boxes import visible
from megatron_hpt.rewards.grades import Answer, Ungradable

_FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL)


def build(settings: RewardConfig) -> Callable[[Answer], float]:
    """Make the reward that is 1.0 if the last fenced program passes all tests of the ground truth. No program is wrong.

    Raises:
        ConfigError: programs cannot be jailed on this machine.
    """
    sandbox.require()
    code = settings.code
    limits = sandbox.SandboxLimits(code.time_s, code.memory_mib, code.processes, code.disk_mib)

    def grade(answer: Answer) -> float:
        tests = read_tests(answer.ground_truth)
        program = last_program(answer.response)
        return 0.0 if program is None else float(sandbox.run(program, tests, limits)["passed"])

    return grade


def last_program(response: str) -> str | None:
    """Return the last fenced block of Python after the reasoning."""
    blocks = _FENCED.findall(visible(response))
    return blocks[-1] if blocks else None


def read_tests(truth: str) -> list[dict[str, str]]:
    """Read the tests of a ground truth.

    It is JSON, {"inputs": [...], "outputs": [...]} or [{"input": …, "output": …}, …], or Python that is run behind the
    program, such as asserts.

    Raises:
        Ungradable: it has no tests.
    """
    try:
        given = json.loads(truth)
    except ValueError:
        given = [{"code": truth}]
    if isinstance(given, dict) and isinstance(given.get("inputs"), list) and isinstance(given.get("outputs"), list):
        inputs, outputs = given["inputs"], given["outputs"]
        if len(inputs) != len(outputs):
            raise Ungradable(f"the ground truth has {len(inputs)} inputs and {len(outputs)} outputs")
        given = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if not isinstance(given, list) or not given or not all(map(_is_test, given)) or not truth.strip():
        raise Ungradable(
            'no tests in the ground truth: {"inputs": [...], "outputs": [...]}, a list of {input, output}, or Python'
        )
    return given


def _is_test(test: Any) -> bool:
    return isinstance(test, dict) and (
        isinstance(test.get("code"), str) or (isinstance(test.get("input"), str) and isinstance(test.get("output"), str))
    )
