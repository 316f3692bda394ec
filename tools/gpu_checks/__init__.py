"""The whole actor on one GPU: what it gives beside what was expected (`tools/gpu_check.py`)."""
