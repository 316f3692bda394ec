"""The comparison of algorithms: what is read off runs, the table, the picture."""

from pathlib import Path

import pytest

from megatron_hpt.comparison.runs import Reached, draw, reached, table
from megatron_hpt.errors import DataError


def line(step: int, **values) -> dict:
    return {
        "step": step,
        "rollout/tokens": 10,
        "train/tokens": 4,
        "time/train_s": 0.5,
        "gate/demonstration_weight": 0.25,
        **values,
    }


def run(final: float) -> list[dict]:
    evaluation = {"eval/heldout/avg@8": 0.1, "eval/heldout/solved@8": 0.5, "eval/version": 0}
    last = {"eval/heldout/avg@8": final, "eval/heldout/solved@8": 1.0, "eval/version": 3}
    return [line(0, **evaluation), line(1), line(2, **last)]


def test_what_a_run_reached_and_used() -> None:
    assert reached(run(0.75)) == Reached(accuracy=0.75, solved=1.0, generated=30, trained=12, seconds=1.5)


def test_the_table_has_mean_and_spread_over_seeds() -> None:
    rows = table({"hpt": [run(0.5), run(0.7)], "sft": [run(0.25)]}).splitlines()
    assert rows[2] == "| hpt | 2 | 0.600 ± 0.141 | 1.000 ± 0.000 | 30 | 12 | 2 |"
    assert rows[3].startswith("| sft | 1 | 0.250 ± 0.000 |")


def test_an_unfinished_run_or_one_without_evaluation_is_refused() -> None:
    with pytest.raises(DataError, match="did not finish"):
        reached(run(0.5)[:-1])
    with pytest.raises(DataError, match="evaluated nothing"):
        reached([line(0)])


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    draw({"hpt": [run(0.5), run(0.7)], "sft": [run(0.25)]}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
