"""``megatron-hpt evaluate``: engines for one evaluation, and what it is asked to do."""
