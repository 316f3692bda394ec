"""``python -m megatron_hpt.launch.slurm.task [--rank] [--gpus 4,5] COMMAND…``: started by srun on a node, becomes COMMAND.

It has COMMAND ignore SIGUSR1: a notice reaches the parts of a run over the blackboard, while `scancel --signal=USR1` without
`--batch` goes to every process of the job and would kill it.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Mapping

_RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""Variable that torch.distributed reads → variable that srun sets. MASTER_ADDR and MASTER_PORT come with the step."""


def environment(slurm: Mapping[str, str], rank: bool, gpus: str | None) -> dict[str, str]:
    """Return the variables that COMMAND gets on top of srun's environment.

    Args:
        slurm: srun's environment.
        rank: whether COMMAND is a rank of torch.distributed.
        gpus: COMMAND's GPUs, as numbers among the step's, e.g. ``4,5``; None means all.
    """
    own = {name: slurm[source] for name, source in _RANKS.items()} if rank else {}
    if gpus is not None:
        given = slurm["CUDA_VISIBLE_DEVICES"].split(",")
        own["CUDA_VISIBLE_DEVICES"] = ",".join(given[int(gpu)] for gpu in gpus.split(","))
    return own


def main() -> None:
    """Run the command of the module's first line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", action="store_true", help="COMMAND is a rank of torch.distributed")
    parser.add_argument("--gpus", help="COMMAND sees these of the step's GPUs alone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.update(environment(os.environ, arguments.rank, arguments.gpus))
    os.execvp(arguments.command[0], arguments.command)


if __name__ == "__main__":
    main()
