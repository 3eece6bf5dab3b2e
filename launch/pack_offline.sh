#!/usr/bin/env bash
# Packs vitds for a machine without a network, which has torch and a Python of its own: a folder of wheels
# with the compiled kernels and libjpeg-turbo in them, and install.sh, which installs them there.
#
#     bash launch/pack_offline.sh --out FOLDER [OPTION...]
#
#   --python 3.12       that machine's; the one here
#   --there FILE        what that machine has, a package a line: its `python3 -m pip freeze`. That stays out of
#                       the pack where its version suits; torch, torchvision and what comes with them always do
#   --max_mb 60         of the whole pack
#   --with_data FILE    an archive of images or a .beton (with its manifest) to FOLDER/data; may be repeated
#
# Needs the environment of launch/setup_env.sh, and the network for wheels that the pack brings.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export PATH=$root/.venv/bin:$PATH
out='' python='' there='' max_mb=60 data=()

fail() { # WHAT
    printf 'pack: %s\n' "$1" >&2
    exit 2
}

while (($# > 0)); do
    option=${1//-/_} # --with-data is --with_data
    case $option in
        __out | __python | __there | __max_mb | __with_data) (($# > 1)) || fail "$1 needs a value" ;;
        *) fail "unknown word $1; there are --out --python --there --max_mb --with_data" ;;
    esac
    case $option in
        __out) out=$2 ;;
        __python) python=$2 ;;
        __there) there=$2 ;;
        __max_mb) max_mb=$2 ;;
        __with_data) data+=("$2") ;;
    esac
    shift 2
done
[[ -n $out ]] || fail "say where to: --out FOLDER"
[[ -z $python || $python =~ ^3\.1[0-3]$ ]] || fail "--python $python: vitds runs on 3.10, 3.11, 3.12 and 3.13"
[[ $max_mb =~ ^[1-9][0-9]{0,5}$ ]] || fail "--max_mb $max_mb must be a whole number from 1 on"
[[ ! -e $out || -f $out/python_version || (-d $out && -z $(ls -A -- "$out")) ]] ||
    fail "--out $out holds something else than a pack; name another folder, or empty it"
[[ -z $there || -f $there ]] || fail "--there $there is no file; \`python3 -m pip freeze\` of that machine makes one"
for file in ${data[@]+"${data[@]}"}; do
    [[ -f $file ]] || fail "--with_data $file is no file; of a folder of images make a tar"
done
python -c 'from importlib.metadata import version; version("ffcv"), version("vitds")' 2>/dev/null ||
    fail "the environment here is not complete; run \`bash launch/setup_env.sh\` first"
exec python "$root/launch/pack_offline.py" "$out" "$python" "$there" "$max_mb" ${data[@]+"${data[@]}"}
