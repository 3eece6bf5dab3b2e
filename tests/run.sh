#!/usr/bin/env bash
# Sets up the environment, then runs the linter and the tests. Arguments go to pytest: bash tests/run.sh tests/data -k jpeg
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup_env.sh"
export PATH="$root/.venv/bin:$PATH"
cd -- "$root"
ruff check .
pytest -n 2 --dist loadgroup "$@"
