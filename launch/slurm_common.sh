# What the slurm_*.sh scripts share: options, stages as job steps, copies on the nodes, requeueing. They
# source it in the project's folder.
# shellcheck shell=bash

export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
declare -A option # name -> value; a script gives its options and their defaults
declare -A given  # name -> yes, of those that a person gave
sets=()           # the --set words, for every stage
dry_run=          # yes: nothing is run
stages=           # the file that lists the stages for `vitds chain`

fail() { # WHAT
    printf 'vitds: %s\n' "$1" >&2
    exit 2
}

run() { # WORD...: says the command, in words that a shell reads back, and runs it
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    [[ -n $dry_run ]] || "$@"
}

# ---- options -----------------------------------------------------------------------------------------------

option_names() { printf '%s\n' "${!option[@]}" | sort; }

# WORD...: into option, sets and dry_run; an option may also come as VITDS_NAME from the environment.
read_options() {
    local name variable
    for name in "${!option[@]}"; do
        variable=VITDS_${name^^}
        option[$name]=${!variable-${option[$name]}}
        [[ -z ${!variable:-} ]] || given[$name]=yes
    done
    while (($#)); do
        case $1 in
            --dry_run) dry_run=yes && shift ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --*)
                name=${1#--}
                # The pattern comes first: bash would run a command that stands in a subscript.
                [[ $name =~ ^[a-z_]+$ && ($name == set || -v option[$name]) ]] ||
                    fail "unknown option $1; there are --$(option_names |
                        sed ':all;N;s/\n/ --/;t all') --set --dry_run"
                (($# > 1)) || fail "$1 needs a value"
                if [[ $name == set ]]; then sets+=(--set "$2"); else option[$name]=$2 given[$name]=yes; fi
                shift 2
                ;;
            *) fail "unexpected word $1" ;;
        esac
    done
    for name in recipe epochs; do # of a script without --init nothing is refused
        refuse_idle $name init \
            "it is of the pretraining, which is left out; of the fine-tuning there is --finetune_$name"
    done
    refuse_idle root folders "there is one source of images"
    [[ -n $dry_run || -n ${SLURM_JOB_ID:-} ]] || fail "this is for sbatch; --dry_run shows what it would do"
    show_resolved
    check_time_limit
}

refuse_idle() { # OPTION BECAUSE_OF WHY: an option that would do nothing beside another
    [[ -z ${given[$1]:-} || -z ${option[$2]:-} ]] || fail "--$1 does nothing with --$2: $3"
}

show_resolved() {
    local name tasks=${SLURM_TASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
    tasks=${tasks%%[!0-9]*} # of 4(x2) or 4,3
    printf 'job %s, restart %s, nodes %s (%s), tasks a node %s, GPUs a node %s\n' \
        "${SLURM_JOB_ID:-none}" "${SLURM_RESTART_COUNT:-0}" \
        "${SLURM_JOB_NUM_NODES:-1}" "${SLURM_JOB_NODELIST:-}" "$tasks" "$gpus"
    while read -r name; do printf '  --%s %q\n' "$name" "${option[$name]}"; done < <(option_names)
    ((${#sets[@]} == 0)) || printf '  %q %q\n' "${sets[@]}"
    ((gpus == 0 || gpus == tasks)) ||
        fail "$gpus GPUs and $tasks tasks a node: there is one task a GPU, so add --ntasks-per-node=$gpus"
}

# Slurm sends USR1 two to three minutes before the end; where the start is cut off by it, the job would be
# requeued for ever.
check_time_limit() {
    local limit
    [[ -n ${SLURM_JOB_ID:-} ]] || return 0
    limit=$(timeout 30 squeue --noheader --job "$SLURM_JOB_ID" --format %l) || limit=unknown
    printf 'time limit %s\n' "${limit%%$'\n'*}"
    [[ ! $limit =~ ^[0-2]:[0-9]{2}$ ]] ||
        fail "a time limit of $limit leaves no time to train: the job saves and requeues itself two to three \
minutes before its end, so give --time=10 or more"
}

# ---- steps -------------------------------------------------------------------------------------------------

# One task ends: the others may still save and say the same; a minute later Slurm ends them.
# (--kill-on-bad-exit=1 would not let them, and the step's status would be that of the killing.)
ranks=(srun --kill-on-bad-exit=0 --wait=60)
# srun does not take it over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || ranks+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
once=(srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}")

# OPTION...: where --local is given, the .beton files of these options go to every node's own disk, and the
# options with them.
copy_to_nodes() {
    local name folder
    [[ -n ${option[local]} ]] || return 0
    for name; do
        [[ -n ${option[$name]} ]] || continue
        # Files of one name may come from two folders.
        folder=${option[local]}/$(realpath -m -- "${option[$name]}" | sha256sum | cut -c 1-12)
        run srun --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 \
            bash launch/slurm_copy.sh "${option[$name]}" "$folder"
        option[$name]=$folder/$(basename -- "${option[$name]}")
    done
}

add_stage() { # RUN WORD...: a command of vitds on all ranks
    printf 'stage %q:' "$1"
    printf ' %q' "${ranks[@]}" vitds "${@:2}"
    printf '\n'
    [[ -n $dry_run ]] || python -c 'import json, shlex, sys
print("-", json.dumps({"run": sys.argv[1], "command": shlex.join(sys.argv[2:])}))' \
        "$1" "${ranks[@]}" vitds "${@:2}" >>"$stages"
}

flags() { # FLAG=OPTION...: into words, the flags whose options have a value
    local pair value
    for pair; do
        value=${option[${pair#*=}]}
        [[ -z $value ]] || words+=("--${pair%%=*}=$value")
    done
    [[ -z ${option[model]:-} ]] || words+=(--set "backbone.name=${option[model]}")
    words+=("${sets[@]}")
}

# RUN: pretrain, unless --init names a pretrained run, then fine-tune; each evaluates itself at its end.
train() {
    local words
    if [[ -z ${option[init]} ]]; then
        words=(pretrain)
        flags recipe=recipe data=data test=test epochs=epochs seed=seed ds_config=ds_config
        add_stage "$1/pretrain" "${words[@]}"
        option[init]=$1/pretrain
    fi
    words=(finetune)
    flags recipe=finetune_recipe data=data test=test init=init epochs=finetune_epochs seed=seed \
        ds_config=ds_config
    add_stage "$1/finetune" "${words[@]}"
    run vitds chain "$stages"
    run tail -n +1 "$1"/*/summary.json
}

# ---- the end -----------------------------------------------------------------------------------------------

# 75: stopped by a signal and saved. 138: ended by USR1 outside of training, where there is nothing to save.
requeue_if_stopped() { # STATUS
    local id=${SLURM_JOB_ID:-}
    rm -f -- "$stages"
    (($1 == 75 || $1 == 138)) && [[ -n $id ]] || return 0
    # The number of an array's first task stands for the whole array.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    run scontrol requeue "$id" ||
        printf 'vitds: not requeued; submit the same again, it goes on from where it was\n' >&2
}

stages=$(mktemp)
trap 'requeue_if_stopped $?' EXIT
