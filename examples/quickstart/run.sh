#!/usr/bin/env bash
# The quickstart: makes a teacher and a weak student, runs SCOPE, and compares the student before and after.
# A stage whose model is there already is skipped; remove runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
ensure_environment

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

HERE=examples/quickstart
RUNS=runs/quickstart

# Trains by a config of this folder unless the run's final model is there.
train() {
    local config="$1" run="$2"
    if [[ ! -e "$RUNS/$run/hf/config.json" ]]; then
        megatron-scope train "$HERE/$config.yaml"
    fi
}

# Evaluates a model on the held-out problems, 8 samples each, at a temperature, unless that was done since it was trained.
evaluate() {
    local name="$1" model="$2" temperature="$3"
    if [[ "$RUNS/$name-t$temperature.json" -nt "$model/config.json" ]]; then
        return
    fi
    megatron-scope evaluate "$HERE/scope.yaml" "evaluate.temperature=$temperature" --model "$model" \
        --benchmarks "$RUNS/data/heldout.jsonl" --samples 8 --k 1,8 --output "$RUNS/$name-t$temperature.json"
}

if [[ ! -e "$RUNS/data/student_init/config.json" ]]; then
    python "$HERE/task.py" make "$RUNS/data"
fi
train teacher_sft teacher
train student_sft student
train scope scope

for temperature in 1.0 0.6; do
    evaluate before "$RUNS/student/hf" "$temperature"
    evaluate after "$RUNS/scope/hf" "$temperature"
done

python - "$RUNS" <<'PYTHON'
import json
import sys
from pathlib import Path


def row(name: str, temperature: str) -> str:
    (benchmark,) = json.loads(Path(sys.argv[1], f"{name}-t{temperature}.json").read_text())["benchmarks"].values()
    average, passed = (100 * benchmark[key]["value"] for key in ("avg@8", "pass@8"))
    return f"{name:8} {temperature:>11} {average:7.1f} {passed:7.1f}"


print("\n256 held-out problems, percent\n\nstudent  temperature   avg@8  pass@8")
for temperature in ("1.0", "0.6"):
    for name in ("before", "after"):
        print(row(name, temperature))
PYTHON
