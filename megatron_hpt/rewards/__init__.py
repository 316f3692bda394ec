"""Verifiers and the subprocesses they run in."""
