"""Conversion of checkpoints beside `cp` of the same bytes, in one run.

    .venv/bin/python benchmarks/convert_hf.py

For each model: to-megatron, to-hf (files of 500 MB) and `cp`, alternating, the median of five each. A conversion leaves its
files on the disk (fsync), so `cp` is followed by `sync` of what it has copied; the rate of `cp` alone, which ends in memory,
stands beside it.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the tool does

import torch
from safetensors.torch import save_file

from megatron_hpt.config import ParallelConfig
from megatron_hpt.examples import smollm2, tiny_llama
from megatron_hpt.models.conversion import ToHf, ToMegatron
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.hf_files import weight_files
from megatron_hpt.models.mapping import hf_tensor_shapes

ROUNDS = 5
SHARD = "500MB"


def write_synthetic(folder: Path) -> None:
    """A Llama of 2 GB in bfloat16, in files of 500 MB."""
    tiny = folder / "tiny"
    tiny_llama.write(tiny, hidden=2048, layers=1, heads=16, kv_heads=8, ffn=8192, tied=False)
    config = (tiny / "config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 16')
    (folder / "whole").mkdir()
    (folder / "whole" / "config.json").write_text(config)
    sizes = hf_tensor_shapes(model_shape(folder / "whole"))
    save_file({name: torch.randn(size).bfloat16() for name, size in sizes.items()}, folder / "whole" / "model.safetensors")
    ToMegatron(folder / "whole", ParallelConfig(), None).write(folder / "megatron")
    ToHf(folder / "megatron", SHARD).write(folder / "synthetic")
    for name in ("tiny", "whole", "megatron"):
        shutil.rmtree(folder / name)


def seconds(work: Callable[[], object], *leaves: Path) -> float:
    """Time of one call, from a disk at rest; what it writes is removed."""
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    work()
    took = time.perf_counter() - started
    for path in leaves:
        shutil.rmtree(path)
    return took


def measure(model: Path, layout: ParallelConfig) -> dict[str, float]:
    """Gigabytes per second of each way."""
    folder = model.parent / "work"
    folder.mkdir()
    copy, files = folder / "copy", [str(path) for path in weight_files(model)]
    ToMegatron(model, layout, None).write(folder / "source")  # of to-hf; also brings the files into memory
    nbytes = sum(Path(file).stat().st_size for file in files)

    def cp() -> None:
        copy.mkdir()
        subprocess.run(["cp", *files, copy], check=True)

    def cp_sync() -> None:
        cp()
        subprocess.run(["sync", *map(str, copy.iterdir())], check=True)

    ways = {
        "cp": (cp, copy),
        "cp and sync": (cp_sync, copy),
        "to-megatron": (lambda: ToMegatron(model, layout, None).write(folder / "megatron"), folder / "megatron"),
        "to-hf": (lambda: ToHf(folder / "source", SHARD).write(folder / "hf"), folder / "hf"),
    }
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, (work, leaves) in ways.items():
            took[way].append(seconds(work, leaves))
    shutil.rmtree(folder)
    return {way: nbytes / 1e9 / statistics.median(values) for way, values in took.items()}


def main() -> None:
    layouts = {"TP1": ParallelConfig(), "TP8 PP4": ParallelConfig(tensor=8, pipeline=4, sequence=True)}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        smollm2.write(folder / "SmolLM2-135M", smollm2.shipped_file())
        write_synthetic(folder)
        cases = [(folder / "SmolLM2-135M", "TP1"), *((folder / "synthetic", layout) for layout in layouts)]
        print(f"{'':28}" + "".join(f"{way:>16}" for way in ("cp", "cp and sync", "to-megatron", "to-hf")))
        for model, layout in cases:
            rates = measure(model, layouts[layout])
            shares = {way: rate / rates["cp and sync"] for way, rate in rates.items()}
            cells = "".join(f"{rates[way]:8.2f} ({shares[way]:4.2f})" + " " * 1 for way in rates)
            print(f"{model.name + ' ' + layout:28}{cells}  GB/s (share of cp and sync)", flush=True)


if __name__ == "__main__":
    main()
