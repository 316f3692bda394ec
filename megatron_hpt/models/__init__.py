"""A model on disk and in Megatron: its configuration, its names and cuts, checkpoints, conversion, tokenizer."""
