"""TRL's side of benchmarks/step.py, which starts it in TRL's own environment: GRPOTrainer on the CPU, one line a step.

Also the reward of both sides, because TRL's environment has nothing of this project. Written against TRL 1.16.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any


def score(text: str) -> float:
    """Return a number that depends on the text alone: answers to one prompt differ, so that every row has an advantage."""
    return zlib.crc32(text.encode()) % 1000 / 1000


def reward(response: str, ground_truth: str) -> float:
    """This project's reward (`reward.name`)."""
    return score(response)


def train(
    model: Path, dtype: str, prompts: list[str], samples: int, steps: int, rows: int, tokens: int, lr: float, out: Path
) -> None:
    """Train some steps; after each one write the seconds of its generation and the tokens that it generated.

    Args:
        dtype: bfloat16: TRL's mixed precision, float32 weights under autocast.
        prompts: of every step.
        rows: of a micro-batch.
        tokens: length of every response.
        out: JSONL file.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    done = {"generation_s": 0.0, "tokens": 0}

    class Writer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done) + "\n")
            done.update(generation_s=0.0, tokens=0)

    def rewards(completions: list[list[dict]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        done["tokens"] += sum(map(len, completion_ids))
        return [score(completion[0]["content"]) for completion in completions]

    arguments = GRPOConfig(
        output_dir=str(out.parent),
        use_cpu=True,
        bf16=dtype == "bfloat16",
        # Recomputing activations would only make it slower: there is memory enough.
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        num_generations=samples,
        max_completion_length=tokens,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(prompts) * samples // rows,
        learning_rate=lr,
        lr_scheduler_type="constant",
        beta=0.0,
        max_steps=steps,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts])
    trainer = GRPOTrainer(str(model), rewards, arguments, train_dataset=chats, callbacks=[Writer()])
    generate = trainer.model.generate

    def timed(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return generate(*given, **named)
        finally:
            done["generation_s"] += time.perf_counter() - started

    trainer.model.generate = timed
    trainer.train()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    train(**{**given, "model": Path(given["model"]), "out": Path(given["out"])})
