"""Comparison of models and runs: what was sampled is read, measured, tested for differences, and shown."""
