#!/usr/bin/env bash
#SBATCH --job-name=vitds-transfer
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue
# Calls `vitds transfer`: pretrained runs on several targets, as a matrix. Submit from the project's folder:
#
#     sbatch [--gpus-per-node=1 --cpus-per-task=8 --time=24:00:00] launch/slurm_transfer.sh --runs runs/pre [OPTION...]
#     sbatch launch/slurm_transfer.sh --runs "runs/a-seed0 runs/a-seed1 runs/b" --targets "pets dtd" --seeds 2
#
# Options, also as VITDS_NAME from the environment: --runs "RUN ...", --targets "NAME ...", --folder (with
# NAME-train.beton and NAME-test.beton, as `vitds data build NAME --out FOLDER/NAME.beton` writes them; data),
# --out --recipe --epochs --seeds (as of `vitds transfer`), --set KEY=VALUE, --dry_run. Two minutes before the
# time limit the job saves and requeues itself.
set -euo pipefail

cd -- "${SLURM_SUBMIT_DIR:-.}" # not the folder of this file: sbatch runs a copy of it
[[ -r launch/slurm_common.sh ]] ||
    { echo "vitds: $PWD is not the project's folder; submit from there" >&2 && exit 2; }
source launch/slurm_common.sh
option=([runs]="" [targets]="flowers102 pets dtd aircraft cars cub200 indoor67" [folder]=data
    [out]=runs/transfer [recipe]=finetune_deit_tiny_224 [epochs]="" [seeds]="")
read_options "$@"

[[ -n ${option[runs]} ]] || fail "--runs \"RUN ...\" names the pretrained runs"
[[ ${SLURM_NTASKS:-1} == 1 ]] || fail "one run trains at a time, as one task; leave --ntasks out"
read -r -a sources <<<"${option[runs]}"
read -r -a targets <<<"${option[targets]}"
words=(transfer "${sources[@]}")
for name in "${targets[@]}"; do words+=("--to=${option[folder]}/$name-train.beton"); done
flags out=out recipe=recipe epochs=epochs seeds=seeds
run "${once[@]}" vitds "${words[@]}"
