#!/usr/bin/env bash
# The quickstart: makes a teacher and a weak student, trains the student by OPD, GRPO and SCOPE, and compares.
# What is there already is skipped; remove runs/quickstart to start over. study.py has the commands it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
ensure_environment report

exec python examples/quickstart/study.py --seeds 1234 --methods opd,grpo,scope \
    --results runs/quickstart --name comparison
