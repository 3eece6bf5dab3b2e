#!/usr/bin/env bash
#SBATCH --job-name=vitds-imagenet
#SBATCH --nodes=1
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue
# ImageNet from its files to a fine-tuned model: build or check the data, pretrain, fine-tune, evaluate; one
# job that requeues itself until it is through. Submit from the project's folder:
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 launch/slurm_imagenet.sh \
#         --root /data/imagenet [OPTION...]
#
# Options, also as VITDS_NAME from the environment:
#   --root FOLDER     ImageNet as its publisher ships it, or its class folders; needed until the .beton files
#                     are built
#   --folders FOLDER  in place of --root: FOLDER/train and FOLDER/val with any class folders, as of a subset
#   --data F.beton    the files are F-train.beton and F-test.beton (data/imagenet.beton)
#   --local FOLDER    a disk of each node to copy the data to
#   --init RUN        no pretraining: fine-tune from this run, such as one pretrained on a small subset
#   --model NAME --recipe R --finetune_recipe R --run FOLDER --epochs N --finetune_epochs N --seed N
#   --ds_config C
#   --set KEY=VALUE   for both stages, repeatable
#   --dry_run         show the commands
set -euo pipefail

cd -- "${SLURM_SUBMIT_DIR:-.}" # not the folder of this file: sbatch runs a copy of it
[[ -r launch/slurm_common.sh ]] ||
    { echo "vitds: $PWD is not the project's folder; submit from there" >&2 && exit 2; }
source launch/slurm_common.sh
option=([root]="" [folders]="" [data]=data/imagenet.beton [local]="" [init]="" [model]=""
    [recipe]=idmm_deit_tiny [finetune_recipe]=finetune_deit_tiny_224 [run]=runs/imagenet [epochs]=""
    [finetune_epochs]="" [seed]="" [ds_config]=zero2)
read_options "$@"

out=${option[data]}
option[data]=${out%.beton}-train.beton option[test]=${out%.beton}-test.beton
if [[ -e ${option[data]}.json && -e ${option[test]}.json ]]; then # a build moves the manifest into place last
    run vitds data info "${option[data]}"
    run vitds data info "${option[test]}"
elif [[ -n ${option[folders]} ]]; then
    run "${once[@]}" vitds data build "${option[folders]}" --split train --out "${option[data]}"
    run "${once[@]}" vitds data build "${option[folders]}" --split val --classes_from "${option[data]}" \
        --out "${option[test]}"
else
    [[ -n ${option[root]} ]] ||
        fail "${option[data]} is not there: --root FOLDER names ImageNet to build it from"
    run "${once[@]}" vitds data build imagenet --root "${option[root]}" --out "$out"
fi
copy_to_nodes data test
train "${option[run]}"
