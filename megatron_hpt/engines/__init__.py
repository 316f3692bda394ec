"""The inference servers that generate: one folder for each engine, and what all of them have in common."""
