"""``megatron-hpt plan``: what a recipe will take on a cluster, before anything is started."""
