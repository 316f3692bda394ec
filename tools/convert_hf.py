"""Convert checkpoints between Hugging Face folders and Megatron's distributed format (every family, one rank).

    python tools/convert_hf.py to-megatron HF_DIR CKPT_DIR
    python tools/convert_hf.py to-hf CKPT_DIR HF_DIR --like HF_DIR      # config and tokenizer come from --like

The Megatron checkpoint loads into any layout; CKPT_DIR may also be one of a run, e.g. runs/NAME/checkpoints/step_000100.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_hpt.errors import HptError, ModelError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _build(hf: Path):
    """The model of a Hugging Face folder on one rank, its weights not loaded."""
    from megatron_hpt.actor import model, parallel, platform
    from megatron_hpt.config import Config, DataConfig, ModelConfig
    from megatron_hpt.weights.hf_config import model_shape

    shape = model_shape(hf)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where = platform.detect(threads=os.cpu_count() or 1)
    config = Config(name="conversion", model=ModelConfig(path=str(hf)), data=DataConfig(train=""))
    ranks = parallel.initialize(config.parallel, where, seed=0, deadline_s=600)
    gpt = model.build(shape, model.transformer_config(shape, config, where), ranks, where)
    return gpt, shape, ranks, where


@app.command()
def to_megatron(hf: Path, checkpoint: Path) -> None:
    """Write CHECKPOINT (a folder, must not exist) from the weights of the Hugging Face folder HF."""
    from megatron_hpt.actor import checkpoint as checkpoints
    from megatron_hpt.actor import model, parallel
    from megatron_hpt.weights.hf_config import model_shape
    from megatron_hpt.weights.hf_files import HfTensors

    if checkpoint.exists():
        raise ModelError(f"{checkpoint} exists; give a new folder")
    wanted = model_shape(hf)
    HfTensors(hf).check(wanted)
    gpt, shape, ranks, where = _build(hf)
    model.load_hf(gpt, shape, ranks, hf)
    checkpoints.save_now(checkpoint, 0, gpt, None, where)
    parallel.shutdown()
    print(f"wrote {checkpoint}")


@app.command()
def to_hf(
    checkpoint: Path,
    hf: Path,
    like: Annotated[Path, typer.Option(help="Hugging Face folder of the same model: configuration and tokenizer")],
) -> None:
    """Write the Hugging Face folder HF (must not exist) from a Megatron checkpoint."""
    from megatron_hpt.actor import checkpoint as checkpoints
    from megatron_hpt.actor import export, model, parallel

    if hf.exists():
        raise ModelError(f"{hf} exists; give a new folder")
    gpt, shape, ranks, where = _build(like)
    checkpoints.load(checkpoint, gpt, None, where)
    export.export_hf(like, hf, model.contributed_views(gpt, shape, ranks))
    parallel.shutdown()
    print(f"wrote {hf}")


if __name__ == "__main__":
    try:
        app()
    except HptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
