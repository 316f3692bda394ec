"""Shared inputs: a tiny model, tiny data, servers of the real engines, hypothesis settings."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.engine_servers import SharedEngines

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


@pytest.fixture(scope="session")
def shared_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SharedEngines"]:
    """Servers of the real engines for all tests that do not need one of their own."""
    from tests.engine_servers import SharedEngines

    engines = SharedEngines(tmp_path_factory.mktemp("engines"))
    yield engines
    engines.close()
