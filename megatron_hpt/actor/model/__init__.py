"""The policy: Megatron's model with the parts of it that are ours."""
