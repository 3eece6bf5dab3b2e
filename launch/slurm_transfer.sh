#!/usr/bin/env bash
#SBATCH --job-name=vitds-transfer
#SBATCH --nodes=1
#SBATCH --array=0-6
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue
# Fine-tunes one pretrained run on several targets, a job of an array each. Submit from the project's folder:
#
#     sbatch --gpus-per-node=1 launch/slurm_transfer.sh --init runs/pre [OPTION...]
#     sbatch --array=0-1 launch/slurm_transfer.sh --init runs/pre --targets "pets dtd"
#
# Options, also as VITDS_NAME from the environment: --targets "NAME ...", --folder (with NAME-train.beton and
# NAME-test.beton, as `vitds data build NAME --out FOLDER/NAME.beton` writes them; data), --run (RUN/NAME is a
# target's run), --finetune_recipe --model --finetune_epochs --seed --ds_config --set KEY=VALUE --local FOLDER
# --dry_run.
set -euo pipefail

cd -- "${SLURM_SUBMIT_DIR:-.}" # not the folder of this file: sbatch runs a copy of it
[[ -r launch/slurm_common.sh ]] ||
    { echo "vitds: $PWD is not the project's folder; submit from there" >&2 && exit 2; }
source launch/slurm_common.sh
option=([targets]="flowers102 pets dtd aircraft cars cub200 indoor67" [folder]=data [init]=""
    [run]=runs/transfer [finetune_recipe]=finetune_deit_tiny_224 [model]="" [finetune_epochs]="" [seed]=""
    [ds_config]="" [local]="")
read_options "$@"

[[ -n ${option[init]} ]] || fail "--init RUN names the pretrained run"
read -r -a targets <<<"${option[targets]}"
number=${SLURM_ARRAY_TASK_ID:-0}
((number < ${#targets[@]})) ||
    fail "there are ${#targets[@]} targets, so submit with --array=0-$((${#targets[@]} - 1)); this is number \
$number"
name=${targets[number]}
option[data]=${option[folder]}/$name-train.beton option[test]=${option[folder]}/$name-test.beton
copy_to_nodes data test
train "${option[run]}/$name"
