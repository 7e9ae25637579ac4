#!/usr/bin/env bash
# Lint, types and all tests, on a CPU. Arguments go to pytest: bash tests/run.sh tests/unit -k weights
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh
ensure_environment dev

export HF_HUB_OFFLINE=1             # no test may reach for a model hub
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # ranks share this machine's cores
export TOKENIZERS_PARALLELISM=false

ruff check .
ruff format --check .
pyright --pythonpath "$(command -v python)"
pytest "$@"
