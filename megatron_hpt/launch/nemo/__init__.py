"""``megatron-hpt launch``: a recipe as a task of NeMo-Run."""
