#!/usr/bin/env bash
#SBATCH --job-name=vitds-small
#SBATCH --nodes=1
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue
# Pretrains, fine-tunes and evaluates on a small data set, by default the embedded digits. Submit from the
# project's folder:
#
#     sbatch [--gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=8 --time=24:00:00] \
#         launch/slurm_small.sh [OPTION...]
#
# Options, also as VITDS_NAME from the environment: --recipe --finetune_recipe --data --test --run --init
# --model --epochs --finetune_epochs --seed --ds_config, --set KEY=VALUE (for both stages, repeatable),
# --local FOLDER (a disk of each node to copy the data to), --dry_run. --init RUN skips the pretraining.
# Without recipes the stages take the digits', for the digits alone. Two minutes before the time limit the job
# saves and requeues itself.
set -euo pipefail

cd -- "${SLURM_SUBMIT_DIR:-.}" # not the folder of this file: sbatch runs a copy of it
[[ -r launch/slurm_common.sh ]] ||
    { echo "vitds: $PWD is not the project's folder; submit from there" >&2 && exit 2; }
source launch/slurm_common.sh
option=([recipe]="" [finetune_recipe]="" [data]="" [test]="" [run]=runs/small [init]="" [model]="" [epochs]=""
    [finetune_epochs]="" [seed]="" [ds_config]="" [local]="")
read_options "$@"
copy_to_nodes data test
train "${option[run]}"
