"""Hybrid post-training at scale: SFT and RL as one policy-gradient estimator on Megatron-Core."""

__version__ = "0.1.0"
