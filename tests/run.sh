#!/usr/bin/env bash
# Lint, types and all tests, on a CPU. Arguments go to pytest: bash tests/run.sh tests/unit -k weights
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh
ensure_environment dev

export HF_HUB_OFFLINE=1             # no test may reach for a model hub
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # ranks share this machine's cores
export TOKENIZERS_PARALLELISM=false

if [[ $# -eq 0 ]]; then
    # Two files of tests side by side: most wait for a server, or for processes that start.
    set -- -n 2 --dist loadfile --no-loadscope-reorder
    # SGLang's environment is made while the first tests run, behind them; those that need it wait for it.
    nice python tools/install_sglang_cpu.py >/dev/null 2>&1 &
fi

ruff check .
ruff format --check .
pyright --pythonpath "$(command -v python)"
pytest "$@"
