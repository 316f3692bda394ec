"""The Megatron-Core actor: builds the model, computes the unified loss, steps the optimizer."""
