#!/usr/bin/env bash
# Trains on one machine, a rank a GPU (without GPU one rank), by DeepSpeed's launcher or torchrun; on several machines without Slurm by a
# hostfile, as DeepSpeed reads it (lines `host slots=8`; needs ssh without password and the project at the same place everywhere).
#
#     bash launch/single_node.sh [--launcher deepspeed|torchrun] [--ranks N] [--hostfile FILE] [--dry_run] pretrain|finetune FLAG...
#
# The flags after pretrain or finetune are those of `vitds pretrain` and `vitds finetune`. A free port is chosen, so that two runs do not
# meet. Exit status under deepspeed: that of the rank that ended first, 75 for a run that was stopped and saved; under torchrun 1.
set -euo pipefail

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export PATH=$home/.venv/bin:$PATH
launcher=deepspeed ranks='' hostfile='' dry_run=''

fail() { # WHAT
    printf 'single_node: %s\n' "$1" >&2
    exit 2
}

while [[ ${1:-} == --* ]]; do
    [[ $1 == --dry_run || $# -gt 1 ]] || fail "$1 needs a value"
    case $1 in
        --launcher) launcher=$2 && shift 2 ;;
        --ranks) ranks=$2 && shift 2 ;;
        --hostfile) hostfile=$2 && shift 2 ;;
        --dry_run) dry_run=yes && shift ;;
        *) fail "unknown option $1; there are --launcher --ranks --hostfile --dry_run" ;;
    esac
done
[[ ${1:-} == pretrain || ${1:-} == finetune ]] || fail "say pretrain or finetune, then its flags"
script=$home/launch/$1.py
shift

[[ -n $ranks ]] || ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
port=$(python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
case $launcher in
    deepspeed) command=(deepspeed --num_gpus "$ranks" --master_port "$port" "$script" "$@") ;;
    torchrun) command=(torchrun --nproc_per_node "$ranks" --master_port "$port" -- "$script" "$@") ;; # without -- it takes --run for its own
    *) fail "--launcher $launcher: there are deepspeed and torchrun" ;;
esac
if [[ -n $hostfile ]]; then
    [[ $launcher == deepspeed ]] || fail "--hostfile is for deepspeed; torchrun is started on each machine by hand"
    command=(deepspeed --hostfile "$hostfile" --master_port "$port" "$script" "$@")
fi
printf '+ OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
printf ' %q' "${command[@]}"
printf '\n'
[[ -n $dry_run ]] || exec "${command[@]}"
