"""Logits of real Megatron ranks for one model after another. Started by run_ranks.

usage: logits.py LAYOUT.json MODEL [MODEL ...]        writes MODEL.logits.pt beside every Hugging Face folder MODEL
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_hpt.actor import parallel, platform
from megatron_hpt.actor.microbatch import MicroBatch, MicroBatchLayout, pack
from megatron_hpt.actor.model import policy
from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_hpt.models.hf_config import model_shape

LENGTHS = (2, 19, 40, 7)


def rows(vocab: int) -> list[Row]:
    """Rows of random tokens, the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, vocab, (length + 1,), generator=generator).tolist() for length in LENGTHS]
    return [Row("", i, Source.DEMONSTRATION, own, 1, None, None, 1.0, 1.0, None) for i, own in enumerate(tokens)]


def logits_of(chunks: list[policy.PolicyModel], batch: MicroBatch, vocab: int) -> torch.Tensor:
    """[positions, vocabulary] on the last stage; elsewhere nothing."""
    group = parallel_state.get_tensor_model_parallel_group()
    found = [torch.empty(0)]

    def forward(data, chunk: policy.PolicyModel):
        def collect(hidden: torch.Tensor, **_):
            if chunk.config.sequence_parallel:
                parts = [torch.empty_like(hidden) for _ in range(group.size())]
                dist.all_gather(parts, hidden.contiguous(), group=group)
                hidden = torch.cat(parts)
            part = hidden[:, 0] @ chunk.output_weight.T
            parts = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(parts, part.contiguous(), group=group)
            found[0] = torch.cat(parts, 1)[: sum(LENGTHS), :vocab].clone()
            return hidden.sum(), torch.ones((), dtype=torch.int), {}

        return chunk(next(data).tokens, batch.positions, None, packed_seq_params=batch.packing), collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([batch]) for _ in chunks],
            model=chunks,
            num_microbatches=1,
            seq_length=batch.length,
            micro_batch_size=1,
            forward_only=True,
        )
    return found[0]


def main() -> None:
    layout = ParallelConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    where = platform.detect(threads=1)
    ranks = parallel.initialize(layout, where, seed=0, deadline_s=300)
    for folder in map(Path, sys.argv[2:]):
        config = Config(name="logits", model=ModelConfig(path=str(folder)), data=DataConfig(train=""), parallel=layout)
        shape = model_shape(folder)
        chunks = [chunk.eval() for chunk in policy.load(str(folder), config, ranks, where)]
        cut = MicroBatchLayout(layout.row_multiple, layout.batch_multiple, ranks.context.size, ranks.context.rank)
        found = logits_of(chunks, pack(rows(shape.vocab), where.device, cut), shape.vocab)
        if ranks.reports and ranks.data == 0:
            torch.save(found, folder.with_name(f"{folder.name}.logits.pt"))
    parallel.shutdown()


if __name__ == "__main__":
    main()
