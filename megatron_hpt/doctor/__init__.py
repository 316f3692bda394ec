"""Whether a machine can run what is asked of it."""
