"""The step times of `plan` beside published ones: one set of shares of the peak (plan/peaks.py) for all rows.

    .venv/bin/python benchmarks/plan_rows.py

A row says which overlaps and fusions its authors' stack has, and where its figures stand; docs/plan.md says what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt.config import ActorConfig, Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.flags import Flags
from megatron_hpt.plan.timing import StepSize, flops_per_token, train_s

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.15
FUSED = Flags(activation=True, rope=True, gradients=True, grouped=True, permute=True)
SHARDED = replace(FUSED, reduce=True, gather=True)
"""Sharded data parallelism sends weights and gradients beside computation; torch.compile and XLA fuse."""
BRIDGE = replace(SHARDED, hopper_attention=True, tensor=True, context=True, pipeline=True)
"""CommOverlapConfig of Megatron-Bridge's H100 recipes of dense models."""
EXPERTS = replace(BRIDGE, tensor=False, expert=True)
"""Of Qwen3-235B-A22B (perf_recipes/qwen/h100/qwen3_moe.py)."""


@dataclass(frozen=True)
class Stack:
    """Whose runs they are, on which GPUs, and where their figures stand."""

    name: str
    source: str
    changes: dict[str, object]
    """To the GPU of recipes/clusters/h100x128.yaml."""


TITAN_GPU = {"memory_gbs": 2400, "tflops": {"bfloat16": 835.5, "fp8": 1670.5}}
"""Their page: HBM2e of 2.4 TB/s, limited to 500 W, and a peak "between SXM and NVL" that they do not know: here NVL's, half of
the data sheet's 1,671 and 3,341 with sparsity."""
NVIDIA = Stack("Megatron-Bridge", "NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md", {})
TITAN_2024 = Stack("torchtitan", "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md", TITAN_GPU)
TITAN_2025 = Stack("torchtitan", "pytorch/torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md", TITAN_GPU)
MAXTEXT = Stack("MaxText", "NGC catalogue, dgxc-benchmarking: maxtext-llama3-70b 25.02 and maxtext-llama2-70b 25.01.1", {})


@dataclass(frozen=True)
class Row:
    """One published run."""

    stack: Stack
    what: str
    shape: ModelShape
    parallel: ParallelConfig
    actor: ActorConfig
    row_tokens: int
    rows: int
    """Of one step, over all data parallel ranks."""
    published: tuple[float, float]
    """Tokens/s a GPU, from least to most."""
    flags: Flags
    recomputed: float | None = None
    """Share of a forward pass that runs again, between our `none` and `full`; None: as `actor.recompute` says."""

    @property
    def name(self) -> str:
        """Stack and run."""
        return f"{self.stack.name}, {self.what}"

    def predicted(self) -> float:
        """Tokens/s a GPU."""
        if self.recomputed is None:
            seconds = self._seconds(self.actor)
        else:
            none, full = (self._seconds(self.actor.model_copy(update={"recompute": kind})) for kind in ("none", "full"))
            seconds = none + self.recomputed * (full - none)
        return self.rows * self.row_tokens / seconds / self.parallel.ranks

    def _seconds(self, actor: ActorConfig) -> float:
        model = ModelConfig(path="published", dtype="bfloat16")
        config = Config(name="row", model=model, data=DataConfig(train=""), parallel=self.parallel, actor=actor)
        budget = actor.micro_batch_tokens
        count = self.rows * self.row_tokens // budget // self.parallel.data
        batch = StepSize(self.rows, self.row_tokens, count, budget, self.row_tokens)
        return train_s(self.shape, config, _cluster(self.stack.changes), self.flags, batch).total

    @property
    def error(self) -> float:
        """Relative to the nearest published figure; 0 within them."""
        low, high = self.published
        predicted = self.predicted()
        return predicted / min(max(predicted, low), high) - 1


def _cluster(changes: dict[str, object]) -> ClusterConfig:
    cluster = load_cluster(ROOT / "recipes" / "clusters" / "h100x128.yaml")
    return cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update=changes)})


def rows() -> list[Row]:
    """All of them."""
    return [*_bridge(), *_titan_2024(), *_titan_2025(), *_maxtext()]


def _shape(name: str) -> ModelShape:
    return model_shape(ROOT / "docs" / "models" / name)


def _bridge() -> list[Row]:
    def row(what: str, name: str, parallel: ParallelConfig, batch: tuple[int, int], flags: Flags, *published: float) -> Row:
        length, rows = batch
        actor = ActorConfig(fp8="tensorwise", micro_batch_tokens=length)
        return Row(NVIDIA, what, _shape(name), parallel, actor, length, rows, (published[0], published[-1]), flags)

    dense = ParallelConfig(tensor=4, sequence=True, pipeline=8, virtual_pipeline=5, data=2)
    two = ParallelConfig(pipeline=2, virtual_pipeline=12, data=8, expert=8)
    eight = ParallelConfig(tensor=2, sequence=True, pipeline=8, virtual_pipeline=4, data=16, expert=32, expert_tensor=1)
    short, large = (4096, 1024), (4096, 8192)
    return [
        row("Llama-3 8B FP8, 8 H100, FSDP8", "Llama-3.1-8B", ParallelConfig(data=8), (8192, 128), BRIDGE, 14079, 14451),
        row("Llama-3 70B FP8, 64 H100, TP4 PP8 VP5", "Llama-3.1-70B", dense, (8192, 128), BRIDGE, 1602, 1664),
        row("Qwen3-30B-A3B FP8, 16 H100, PP2 VP12 EP8", "Qwen3-30B-A3B", two, short, BRIDGE, 5113),
        row("Qwen3-235B-A22B FP8, 256 H100, TP2 PP8 VP4 EP32", "Qwen3-235B-A22B", eight, large, EXPERTS, 1633),
    ]


def _titan_2024() -> list[Row]:
    def one_dimension(fp8: str, gpus: int, figure: float) -> Row:
        what = f"Llama-3.1 8B {_kind(fp8)}, {gpus} H100, FSDP{gpus}"
        actor, parallel = ActorConfig(fp8=fp8, micro_batch_tokens=2 * 8192), ParallelConfig(data=gpus)
        shape = _shape("Llama-3.1-8B")
        return Row(TITAN_2024, what, shape, parallel, actor, 8192, 2 * gpus, (figure, figure), SHARDED, recomputed=0.5)

    def giant(schedule: str, pieces: int, figure: float) -> Row:
        parallel = ParallelConfig(tensor=8, sequence=True, pipeline=8, virtual_pipeline=pieces, data=8)
        # Their 32 rows of a rank are as many micro-batches as the pipeline is deep (pipeline_parallel_microbatches' default).
        actor = ActorConfig(fp8="tensorwise", recompute="full", micro_batch_tokens=4 * 8192)
        what = f"Llama-3.1 405B FP8, 512 H100, FSDP8 TP8 PP8, {schedule}"
        return Row(TITAN_2024, what, _llama_405b(), parallel, actor, 8192, 256, (figure, figure), SHARDED)

    return [
        one_dimension("none", 8, 6667),
        one_dimension("none", 128, 6514),
        one_dimension("tensorwise", 8, 8532),
        one_dimension("tensorwise", 128, 8380),
        giant("1F1B", 1, 100),
        giant("interleaved", 2, 128),
    ]


def _titan_2025() -> list[Row]:
    """Without async TP; the 70B in FP8 stands in both of their pages."""

    def small(fp8: str, figure: float) -> Row:
        parallel = ParallelConfig(tensor=8, sequence=True, data=8)
        actor, what = ActorConfig(fp8=fp8, micro_batch_tokens=12 * 8192), f"Llama-3.1 8B {_kind(fp8)}, 64 H100, FSDP8 TP8"
        shape = _shape("Llama-3.1-8B")
        return Row(TITAN_2025, what, shape, parallel, actor, 8192, 96, (figure, figure), SHARDED, recomputed=0.5)

    def large(fp8: str, *figures: float) -> Row:
        parallel = ParallelConfig(tensor=8, sequence=True, data=32)
        actor = ActorConfig(fp8=fp8, recompute="full", micro_batch_tokens=16 * 8192)
        what, shape = f"Llama-3.1 70B {_kind(fp8)}, 256 H100, FSDP32 TP8", _shape("Llama-3.1-70B")
        return Row(TITAN_2025, what, shape, parallel, actor, 8192, 512, (figures[0], figures[-1]), SHARDED)

    return [large("none", 597.3), large("tensorwise", 809.8, 829), small("none", 4378), small("tensorwise", 5078.1)]


def _kind(fp8: str) -> str:
    return "BF16" if fp8 == "none" else "FP8"


def _maxtext() -> list[Row]:
    """Two rows of text a rank. What is recomputed is not published; nothing less than all of it fits by plan/memory.py."""
    llama3 = _shape("Llama-3.1-70B")
    llama2 = replace(llama3, vocab=32000, rope_scaling=None)
    flags = replace(SHARDED, hopper_attention=True)

    def row(name: str, shape: ModelShape, length: int, fp8: str, figure: float) -> Row:
        actor = ActorConfig(fp8=fp8, recompute="full", micro_batch_tokens=2 * length)
        what = f"{name} 70B {_kind(fp8)}, 128 H100, FSDP128"
        return Row(MAXTEXT, what, shape, ParallelConfig(data=128), actor, length, 256, (figure, figure), flags)

    return [
        row("Llama-3", llama3, 8192, "none", 134752.43 / 128),
        row("Llama-3", llama3, 8192, "tensorwise", 231116.60 / 128),
        row("Llama-2", llama2, 4096, "none", 148271.49 / 128),
        row("Llama-2", llama2, 4096, "tensorwise", 230152.77 / 128),
    ]


def _llama_405b() -> ModelShape:
    """Return Llama 3.1 405B (arXiv 2407.21783, table 3)."""
    return replace(_shape("Llama-3.1-70B"), layers=126, hidden=16384, ffn=53248, heads=128, kv_heads=8)


def main() -> None:
    columns = ("run", "published tokens/s/GPU", "predicted", "off by", f"within {TOLERANCE:.0%}", "predicted model TFLOP/s/GPU")
    table = Table(*columns)
    for row in rows():
        low, high = row.published
        published = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
        hit = "yes" if abs(row.error) <= TOLERANCE else "missed"
        tflops = row.predicted() * flops_per_token(row.shape, row.row_tokens) / 1e12
        table.add_row(row.name, published, f"{row.predicted():.0f}", f"{row.error:+.1%}", hit, f"{tflops:.0f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
