"""Logits of every family in every kind of layout equal those of transformers on the same weights."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hpt.config import ParallelConfig
from megatron_hpt.examples import smollm2
from megatron_hpt.examples.tiny_families import MODELS
from tests.ranks import run_ranks

from .logits import LENGTHS, rows

pytestmark = pytest.mark.slow
TOLERANCE = 2e-4
"""Of the largest logit."""
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2, sequence=True),
    "PP2": ParallelConfig(pipeline=2),
    "EP2": ParallelConfig(data=2, expert=2),
    "TP4, more than key/value heads": ParallelConfig(tensor=4, sequence=True),
}


def run(layout: ParallelConfig, folders: list[Path]) -> None:
    description = folders[0].with_name("layout.json")
    description.write_text(json.dumps(layout.model_dump()))
    run_ranks(Path(__file__).with_name("logits.py"), description, *folders, ranks=layout.ranks)


def error(folder: Path) -> float:
    """Largest difference from transformers, relative to the largest logit."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [network(torch.tensor(row.tokens[:-1])[None]).logits[0] for row in rows(network.config.vocab_size)]
    found = torch.load(folder.with_name(f"{folder.name}.logits.pt")).split(LENGTHS)
    differences = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    return max(differences) / max(float(logits.abs().max()) for logits in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, layout: str) -> None:
    chosen = LAYOUTS[layout]
    names = [name for name in MODELS if chosen.expert == 1 or name.startswith(("mixtral", "qwen3_moe"))]
    folders = [tmp_path / f"model_{i}" for i in range(len(names))]
    for name, folder in zip(names, folders, strict=True):
        MODELS[name](folder)
    run(chosen, folders)
    errors = {name: error(folder) for name, folder in zip(names, folders, strict=True)}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ParallelConfig(), id="TP1", marks=pytest.mark.thorough),
        pytest.param(ParallelConfig(pipeline=2), id="PP2", marks=pytest.mark.thorough),
        pytest.param(ParallelConfig(tensor=3, sequence=True), id="TP3"),
    ],
)
def test_logits_of_smollm2(tmp_path: Path, layout: ParallelConfig) -> None:
    """Real weights, 9 heads. In test-all alone: layouts that the tiny models above have too."""
    smollm2.write(tmp_path / "smollm2", smollm2.shipped_file())
    run(layout, [tmp_path / "smollm2"])
    assert error(tmp_path / "smollm2") < TOLERANCE
