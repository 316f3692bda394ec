"""The fastest layouts of a recipe on a cluster (`megatron-hpt plan --search`)."""
