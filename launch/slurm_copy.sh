#!/usr/bin/env bash
# slurm_copy.sh FILE FOLDER: copies a .beton and its manifest into a folder on this node's own disk, once a
# node, and verifies the copies. A copy of the same size and time whose hash still holds is kept.
set -euo pipefail

mkdir -p -- "$2"
exec 9>"$2/.lock"
flock 9 # other tasks and jobs on this node
for file in "$1" "$1.json"; do
    copy=$2/$(basename -- "$file")
    if [[ -e $copy && ! $copy -nt $file && ! $copy -ot $file && -e $copy.sha256 ]] &&
        [[ $(stat -c %s -- "$copy") == "$(stat -c %s -- "$file")" ]] &&
        [[ $(sha256sum <"$copy") == "$(<"$copy.sha256")" ]]; then
        printf '%s: %s is there and sound\n' "${SLURMD_NODENAME:-$HOSTNAME}" "$copy"
        continue
    fi
    rm -f -- "$copy.sha256"
    hash=$(tee -- "$copy.part" <"$file" | sha256sum)
    if [[ $(sha256sum <"$copy.part") != "$hash" ]]; then
        printf 'vitds: %s: %s does not read back as %s; is the disk full or faulty?\n' \
            "${SLURMD_NODENAME:-$HOSTNAME}" "$copy.part" "$file" >&2
        exit 6
    fi
    touch -r "$file" -- "$copy.part"
    mv -- "$copy.part" "$copy"
    printf '%s\n' "$hash" >"$copy.sha256"
    printf '%s: copied %s to %s\n' "${SLURMD_NODENAME:-$HOSTNAME}" "$file" "$copy"
done
