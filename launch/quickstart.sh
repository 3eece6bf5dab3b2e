#!/usr/bin/env bash
# Sets up, then runs the main job on embedded data: pretrain, fine-tune, and the same from scratch. Safe to
# run twice. Arguments go to the job: --run DIRECTORY, --seed NUMBER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python launch/quickstart.py "$@"
