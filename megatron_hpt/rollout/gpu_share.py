"""How an engine divides its share of a GPU's memory (`rollout.gpu_memory_share`). Imports nothing: plans calculate with it."""

SGLANG_STATIC = 0.9
"""Of it, what SGLang holds all the time, weights and KV cache; it plans what a batch needs beside that."""
