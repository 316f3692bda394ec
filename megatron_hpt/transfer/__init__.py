"""Weights between formats and processes: HF ↔ Megatron rules, manifests, the sender and the engines' receiver."""
