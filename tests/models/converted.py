"""Real Megatron ranks that load converted checkpoints, one model after another. Started by run_ranks.

usage: converted.py LAYOUT.json MODEL [MODEL ...]

Beside every Hugging Face folder MODEL lies MODEL.megatron, which is loaded; MODEL.own is written by Megatron itself.
"""

import argparse
import json
from pathlib import Path

import torch

from megatron_hpt.actor import checkpoint, parallel, platform
from megatron_hpt.actor.model import policy
from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import model_shape


def check(folder: Path, layout: ParallelConfig, ranks: parallel.Ranks, where: platform.Platform) -> None:
    """The converted checkpoint fills the model as the folder itself does, bit for bit."""
    config = Config(name="converted", model=ModelConfig(path=str(folder)), data=DataConfig(train=""), parallel=layout)
    chunks = policy.load(str(folder), config, ranks, where)
    expected = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    meta = checkpoint.load(folder.with_suffix(".megatron"), chunks, None, where)
    assert (meta["step"], meta["optimizer"]) == (0, False)
    found = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    for (name, parameter), whole in zip(found, expected, strict=True):
        rows = slice(None)
        if "word_embeddings" in name or "output_layer" in name:  # rows of padding may differ
            shape, start = model_shape(folder), ranks.tensor.rank * parameter.shape[0]
            rows = slice(0, max(0, shape.vocab - start))
        assert torch.equal(parameter[rows], whole[rows]), f"{folder.name}: {name}"
    saver = checkpoint.Saver(where, folder)
    saver.save(folder.with_suffix(".own"), 0, chunks, None)
    saver.finish()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("layout", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    layout = ParallelConfig(**json.loads(arguments.layout.read_text()))
    where = platform.detect(threads=1)
    ranks = parallel.initialize(layout, where, seed=0, deadline_s=300)
    for folder in arguments.models:
        check(folder, layout, ranks, where)
    parallel.shutdown()


if __name__ == "__main__":
    main()
