"""``megatron-hpt slurm``: a run as a batch job."""
