"""Shared inputs: a tiny model, tiny data, hypothesis settings."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 2 layers, 4 heads, 2 key/value heads, random weights, character tokenizer."""
    from megatron_hpt.examples import tiny_llama

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama.write(folder, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, positions=64)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path):
    """Tokenizer of `tiny_model`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def arithmetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.parquet and heldout.parquet of the quickstart's task."""
    from megatron_hpt.examples import arithmetic

    folder = tmp_path_factory.mktemp("arithmetic")
    arithmetic.write(folder, held_out=16)
    return folder
