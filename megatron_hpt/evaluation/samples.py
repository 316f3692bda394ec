"""What an evaluation leaves behind: a folder with every sample, from which all tables follow without an engine.

EVALUATION/evaluation.json            model, protocol and files of problems with their sha256
EVALUATION/samples/<benchmark>.parquet    one row a sample (SCHEMA), problems in the order of their file
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),  # 0 … k-1 of its problem
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("level", pa.string()),  # difficulty, where the data has one
        pa.field("prompt", pa.string(), nullable=False),  # as the model saw it
        pa.field("response", pa.string(), nullable=False),
        pa.field("ground_truth", pa.string(), nullable=False),
        pa.field("answer", pa.string()),  # what the response's last box holds; null: no box. What maj@k counts
        pa.field("tokens", pa.int32(), nullable=False),  # of the response, end-of-sequence included
        pa.field("truncated", pa.bool_(), nullable=False),  # hit the limit of tokens
        pa.field("score", pa.float64()),  # null: ungraded
        pa.field("ungraded_reason", pa.string()),  # null: graded
        pa.field("grader", pa.string(), nullable=False),
    ]
)
"""One sample of one problem."""
