#!/usr/bin/env bash
# The quickstart's SCOPE run once more, with a real SGLang server on this machine's CPU in the place of the embedded engine.
# What is done already is skipped. results/served.md holds what it gave.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
ensure_environment report
exec python examples/quickstart/served.py "$@"
