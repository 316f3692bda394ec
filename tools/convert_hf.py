"""Convert checkpoints between Hugging Face folders and Megatron's distributed format, bit for bit.

    python tools/convert_hf.py to-megatron HF_DIR CKPT_DIR [--tp 8 --pp 4 --ep 1 --vpp 2 --dtype bf16]
    python tools/convert_hf.py to-hf       CKPT_DIR HF_DIR [--shard-size 5GB]
    python tools/convert_hf.py verify      HF_DIR CKPT_DIR
    python tools/convert_hf.py show        HF_DIR

Any layout can load the checkpoint; CKPT_DIR may also be one of a run, e.g. runs/NAME/checkpoints/step_000100. A conversion
needs memory for a few tensors and one file, not for the model; when interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_hpt import command
from megatron_hpt.errors import ModelError
from megatron_hpt.files import check_new_folder
from megatron_hpt.settings.options import processes

# Large tensors come and go: with large pages the kernel has far less to do for each. torch reads this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, say what would be written, write nothing")]
Like = Annotated[Path | None, typer.Option(help="folder of the same model, for a checkpoint without configuration")]


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@app.command()
def to_megatron(
    hf: Path,
    checkpoint: Path,
    tp: Annotated[int, processes("tensor parallel ranks whose shards are written")] = 1,
    pp: Annotated[int, processes("pipeline stages")] = 1,
    ep: Annotated[int, processes("expert parallel ranks")] = 1,
    vpp: Annotated[int, processes("pieces of a stage in an interleaved pipeline")] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as in HF")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write CHECKPOINT (a new folder) from the Hugging Face folder HF."""
    import torch

    from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig
    from megatron_hpt.models.conversion import ToMegatron
    from megatron_hpt.models.hf_config import model_shape
    from megatron_hpt.plan.layout import check_layout

    if dtype is not None and dtype not in PRECISIONS:
        raise ModelError(f"--dtype: given {dtype}; allowed: {', '.join(PRECISIONS)}")
    layout = ParallelConfig(tensor=tp, pipeline=pp, virtual_pipeline=vpp, expert=ep, data=ep, sequence=tp > 1)
    check_layout(
        Config(name="conversion", model=ModelConfig(path=str(hf)), data=DataConfig(train="none"), parallel=layout),
        model_shape(hf),
    )
    _convert(ToMegatron(hf, layout, getattr(torch, PRECISIONS[dtype]) if dtype else None), checkpoint, dry_run)


@app.command()
def to_hf(
    checkpoint: Path,
    hf: Path,
    shard_size: Annotated[str, typer.Option(help="largest safetensors file, e.g. 500MB")] = "5GB",
    like: Like = None,
    dry_run: DryRun = False,
) -> None:
    """Write the Hugging Face folder HF (a new folder) from a Megatron checkpoint."""
    from megatron_hpt.models.conversion import ToHf

    _convert(ToHf(checkpoint, shard_size, like), hf, dry_run)


@app.command()
def verify(hf: Path, checkpoint: Path) -> None:
    """Compare every tensor of HF with CHECKPOINT: names, shapes, checksums."""
    from megatron_hpt.models.conversion import compare

    size, compared = compare(hf, checkpoint)
    count, differ, kinds = 0, [], set()
    with _progress("comparing", size.nbytes) as advance:
        for tensor in compared:
            count += 1
            kinds.add((tensor.was, tensor.dtype))
            advance(tensor.nbytes)
            if tensor.hf != tensor.megatron:
                differ.append(tensor)
    for tensor in differ:
        where = f"{tensor.hf:016x} in {hf}, {tensor.megatron:016x} in {checkpoint}"
        print(f"{tensor.name} {list(tensor.sizes)} {tensor.dtype}: {where}")
    if differ:
        raise ModelError(f"{len(differ)} of {count} tensors differ")
    cast = sorted(f"{dtype} from {was}" for was, dtype in kinds if was != dtype)
    print(f"{count} tensors, {decimal(size.nbytes)}: names, shapes and checksums are equal{_after(cast)}")


@app.command()
def show(hf: Path) -> None:
    """Show how the tensors of HF and those of Megatron correspond."""
    from megatron_hpt.models.hf_config import model_shape
    from megatron_hpt.models.mapping import FAMILIES

    shape = model_shape(hf)
    table = Table(title=f"{shape.family}: {shape.layers} layers" + (f", {shape.experts} experts" if shape.experts else ""))
    for column in ("Hugging Face", "Megatron", "shape", "over tensor parallel ranks"):
        table.add_column(column, no_wrap=True)
    for pattern, rule in FAMILIES[shape.family].items():
        if pattern == "output_layer.weight" and shape.tied_embeddings:
            continue
        names = rule.tensors(shape)
        table.add_row(*("\n".join(map(str, column)) for column in (names, [pattern], map(list, names.values()), [rule.how])))
    (console if console.is_terminal else Console(width=200)).print(table)


def _after(cast: list[str]) -> str:
    return f", after conversion to {', '.join(cast)}" if cast else ""


class Conversion(Protocol):
    """What both directions have in common."""

    def size(self): ...

    def write(self, target: Path, advance) -> None: ...


def _convert(conversion: Conversion, target: Path, dry_run: bool) -> None:
    check_new_folder(target)
    size = conversion.size()
    what = f"{size.files} file{'s' * (size.files > 1)}, {decimal(size.nbytes)}"
    if dry_run:
        print(f"{target} would be written: {what}; it takes about {decimal(size.memory)} of memory beside Python's own")
        return
    started = time.monotonic()
    with _progress("converting", size.nbytes) as advance:
        conversion.write(target, advance)
    seconds = time.monotonic() - started
    print(f"wrote {target}: {what} in {seconds:.1f} s ({decimal(round(size.nbytes / seconds))}/s)")


@contextmanager
def _progress(verb: str, nbytes: int) -> Iterator:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=nbytes)
        yield lambda done: progress.advance(task, done)


if __name__ == "__main__":
    command.run(app)
