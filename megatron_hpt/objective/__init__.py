"""The unified policy-gradient estimator: pure tensors, knows nothing of Megatron or engines."""
