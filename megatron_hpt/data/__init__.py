"""Prompts: where their files lie, in which order their rows are taken, and how a row becomes token ids."""
