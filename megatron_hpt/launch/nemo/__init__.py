"""``megatron-hpt launch``: a recipe as a task of NeMo-Run. Users of `nemo` call `task`."""

from megatron_hpt.launch.nemo.experiments import task

__all__ = ["task"]
