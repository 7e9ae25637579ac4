#!/usr/bin/env bash
# The quickstart's study: three seeds of OPD, GRPO, SCOPE with sampled and exact divergence, and its ablations, each evaluated on 256
# unseen problems.
# What is done already is skipped. results/ holds what it gave.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
ensure_environment report
exec python examples/quickstart/study.py "$@"
