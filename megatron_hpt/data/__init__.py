"""Prompts in, rows through, batches on disk."""
