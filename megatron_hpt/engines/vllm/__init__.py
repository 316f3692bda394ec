"""vLLM 0.32 as a rollout engine."""
