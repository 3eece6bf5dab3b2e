#!/usr/bin/env bash
# Ten minutes on a new GPU: whether vitds computes there what it computes elsewhere, and how fast. Flags are
# those of `vitds bench gpu`; docs/gpu.md has the parts.
#
#     bash launch/gpu_check.sh --out FOLDER [--parts head,speed] [--data ARCHIVE] [--toy]
#
# Uses the project's environment, or where there is none that of python3, as pack/install.sh leaves it.
set -euo pipefail
home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# python3's commands need not be where python3 is found
export PATH=$home/.venv/bin:$(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
exec vitds bench gpu "$@"
