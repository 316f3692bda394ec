"""How long rollouts are, what engines take for them, and who waits for whom."""
