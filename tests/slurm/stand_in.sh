#!/usr/bin/env bash
# In place of the interpreter on the nodes: every task writes where it is and what it would be. Servers answer their health
# check, the coordinator waits for them, and trainer ranks wait for the coordinator.
#
#   HPT_STAND_IN   folder that takes one file a task
#   HPT_REAL       the interpreter
#   HPT_DIES       trainer rank that dies (exit code 9) once the engines answer; default: none
set -euo pipefail
role=$(printf '%s\n' "$@" | grep -oE 'actor.trainer|rollout.coordinator|vllm.entrypoints' | head -n 1)
task=$SLURM_PROCID/$SLURM_NTASKS
[[ " $* " == *" --gpus "* ]] && gpus=$(sed -E 's/.* --gpus ([0-9,]+) .*/\1/' <<<" $* ") || gpus=all
echo "$role $SLURMD_NODENAME $task local=$SLURM_LOCALID gpus=$gpus of=$CUDA_VISIBLE_DEVICES master=${MASTER_ADDR:-}" \
    >"$HPT_STAND_IN/$role-$SLURMD_NODENAME-$SLURM_PROCID"
option() { printf '%s\n' "$@" | grep -A1 -xF -- "$name" | tail -n 1; }
case $role in
    actor.trainer)
        until [[ -e $HPT_STAND_IN/ended ]]; do sleep 1; done
        [[ $SLURM_PROCID != "${HPT_DIES:-}" ]] || exit 9
        ;;
    rollout.coordinator)
        name=--store
        "$HPT_REAL" -c 'import sys
from megatron_hpt.blackboard import Blackboard
print(Blackboard.join(sys.argv[1]).wait("engines", 240, "an engine"))' "$(option "$@")" >"$HPT_STAND_IN/engines"
        touch "$HPT_STAND_IN/ended"
        ;;
    vllm.entrypoints)
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        touch "$folder/health"
        name=--host host=$(option "$@")
        name=--port port=$(option "$@")
        "$HPT_REAL" -m http.server --bind "$host" --directory "$folder" "$port" &
        wait $!
        ;;
esac
