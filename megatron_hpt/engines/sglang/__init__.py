"""SGLang 0.5.23 as a rollout engine."""
