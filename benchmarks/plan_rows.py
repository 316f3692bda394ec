"""The step times of `plan` beside published ones: one set of shares of the peak (plan/timing.py) for all rows.

    .venv/bin/python benchmarks/plan_rows.py

A row says what its authors' stack hides behind computation; ours hides nothing, so `plan` adds everything up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt.config import ActorConfig, Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.timing import StepSize, flops_per_token, micro_batch_s, train_s

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.15


@dataclass(frozen=True)
class Row:
    """One published run."""

    name: str
    shape: ModelShape
    parallel: ParallelConfig
    actor: ActorConfig
    row_tokens: int
    rows: int
    """Of one step, over all data parallel ranks."""
    published: tuple[float, float]
    """Tokens/s a GPU, from least to most."""
    hidden: tuple[str, ...] = ()
    """Parts of a micro-batch that run beside computation."""
    hides_reduce: bool = False
    """Gradients and weights travel between data parallel ranks beside computation."""
    memory_gbs: float = 3350

    def predicted(self) -> float:
        """Tokens/s a GPU."""
        cluster = _cluster(self.memory_gbs)
        model = ModelConfig(path="published", dtype="bfloat16")
        config = Config(name="row", model=model, data=DataConfig(train=""), parallel=self.parallel, actor=self.actor)
        budget = self.actor.micro_batch_tokens
        batch = StepSize(self.rows, self.row_tokens, self.rows * self.row_tokens // budget // self.parallel.data, budget)
        step = train_s(self.shape, config, cluster, batch)
        one = micro_batch_s(self.shape, config, cluster, budget, self.row_tokens)
        visible = sum(getattr(one, f.name) for f in fields(one) if f.name not in self.hidden) / one.total
        computed = (step.passes + step.bubble) * visible
        reduce = max(0.0, step.reduce - computed) if self.hides_reduce else step.reduce
        return batch.tokens / (computed + reduce + step.optimizer) / self.parallel.ranks

    @property
    def error(self) -> float:
        """Relative to the nearest published figure; 0 within them."""
        low, high = self.published
        predicted = self.predicted()
        return predicted / min(max(predicted, low), high) - 1


def _cluster(memory_gbs: float) -> ClusterConfig:
    cluster = load_cluster(ROOT / "recipes" / "clusters" / "h100x128.yaml")
    return cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update={"memory_gbs": memory_gbs})})


def rows() -> list[Row]:
    """All of them."""
    llama3 = model_shape(ROOT / "docs" / "models" / "Llama-3.1-70B")
    fsdp = ParallelConfig(data=128)
    titan = ParallelConfig(tensor=8, sequence=True, data=32)
    full = {"recompute": "full"}
    return [
        Row(
            "Megatron-Bridge, Llama-3 70B FP8, 64 H100, TP4 PP8 VP5",
            llama3,
            ParallelConfig(tensor=4, sequence=True, pipeline=8, virtual_pipeline=5, data=2),
            ActorConfig(fp8="tensorwise", micro_batch_tokens=8192),
            *(8192, 128, (1602, 1664), ("tensor", "pipeline"), True),
        ),
        Row(
            "torchtitan, Llama-3.1 70B BF16, 256 H100 (500 W), FSDP32 TP8",
            llama3,
            titan,
            ActorConfig(**full, micro_batch_tokens=16 * 8192),
            *(8192, 512, (597, 597), (), True, 2400),
        ),
        Row(
            "MaxText, Llama-2 70B BF16, 128 H100, FSDP128",
            replace(llama3, vocab=32000, rope_scaling=None),
            fsdp,
            ActorConfig(**full, micro_batch_tokens=2 * 4096),
            *(4096, 256, (1052, 1052), (), True),
        ),
    ]


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
