#!/usr/bin/env bash
# Trains on one machine, a rank a GPU (without GPU one rank), by DeepSpeed's launcher or torchrun; on several
# machines without Slurm by a hostfile of lines `HOST slots=RANKS`, with the project, its data and its runs at
# the same place everywhere.
#
#     bash launch/single_node.sh [OPTION...] pretrain|finetune FLAG...
#
#   --launcher deepspeed|torchrun   deepspeed
#   --ranks N                       on this machine, without --hostfile; a rank a GPU
#   --hostfile FILE                 several machines: deepspeed starts all ranks from here, by pdsh and ssh
#                                   without password
#   --node_rank K                   with --hostfile, without ssh: start the same on each machine; K is that of
#                                   its line, from 0
#   --port N                        where the ranks meet; a free one, with --hostfile 29500
#   --dry_run                       show the command
#
# The flags after pretrain or finetune are those of `vitds pretrain` and `vitds finetune`. Exit status under
# deepspeed: that of the rank that ended first, 75 for a run that was stopped and saved; under torchrun 1.
set -euo pipefail

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export PATH=$home/.venv/bin:$PATH
launcher=deepspeed ranks='' hostfile='' node_rank='' port='' dry_run=''

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
        --node_rank) node_rank=$2 && shift 2 ;;
        --port) port=$2 && shift 2 ;;
        --dry_run) dry_run=yes && shift ;;
        *) fail "unknown option $1; there are --launcher --ranks --hostfile --node_rank --port --dry_run" ;;
    esac
done
[[ ${1:-} == pretrain || ${1:-} == finetune ]] || fail "say pretrain or finetune, then its flags"
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks $ranks must be a whole number from 1 on"
[[ -z $port || $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || fail "--port $port must be from 1 to 65535"
[[ $launcher == deepspeed || $launcher == torchrun ]] ||
    fail "--launcher $launcher: there are deepspeed and torchrun"
script=$home/launch/$1.py
shift

hosts=() slots=()
if [[ -n $hostfile ]]; then
    [[ -r $hostfile ]] || fail "--hostfile $hostfile cannot be read"
    [[ -z $ranks ]] || fail "--ranks does nothing with --hostfile, whose lines have the ranks of each machine"
    while read -r host count _; do
        [[ $count =~ ^slots=[1-9][0-9]*$ ]] || fail "$hostfile: '$host $count' must be HOST slots=RANKS"
        hosts+=("$host") slots+=("${count#slots=}")
    done < <(sed -E 's/#.*//; /^[[:space:]]*$/d' "$hostfile")
    ((${#hosts[@]} > 0)) || fail "$hostfile names no machine"
    [[ -n $node_rank || $launcher == deepspeed ]] ||
        fail "torchrun is started on each machine: add --node_rank K"
    # The pattern comes first: bash would run a command that stands in a subscript.
    [[ -z $node_rank || ($node_rank =~ ^(0|[1-9][0-9]*)$ && -v slots[$node_rank]) ]] ||
        fail "--node_rank $node_rank: $hostfile has the machines 0 to $((${#hosts[@]} - 1))"
    port=${port:-29500} ranks=${slots[${node_rank:-0}]}
elif [[ -n $node_rank ]]; then
    fail "--node_rank needs --hostfile FILE"
fi
[[ -n $ranks ]] || ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')
[[ -n $port ]] || port=$(python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

meet=(--master_port "$port")
[[ -z $node_rank ]] || meet+=(--master_addr "${hosts[0]}" --node_rank "$node_rank")
if [[ $launcher == deepspeed ]]; then
    command=(deepspeed "${meet[@]}")
    if [[ -z $hostfile ]]; then command+=(--num_gpus "$ranks"); else command+=(--hostfile "$hostfile"); fi
    [[ -z $node_rank ]] || command+=(--no_ssh)
else
    command=(torchrun "${meet[@]}" --nproc_per_node "$ranks")
    [[ -z $node_rank ]] || command+=(--nnodes "${#hosts[@]}")
    command+=(--) # else it takes --run for its own
fi
command+=("$script" "$@")
printf '+ OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
printf ' %q' "${command[@]}"
printf '\n'
[[ -n $dry_run ]] || exec "${command[@]}"
