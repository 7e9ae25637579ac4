# Sourced by tests/run.sh and examples/quickstart/run.sh: one place that finds or makes the Python environment.
#
#   source tools/env.sh
#   ensure_environment           # what the package needs
#   ensure_environment report    # and what draws its results
#   ensure_environment dev       # and what its tests need, which includes the others
#
# It leaves the environment's programs first on PATH. An active environment (venv or conda) is used as it is:
# packages that it already has keep their versions. Otherwise .venv in the repository is made; PYTHON names the
# interpreter to make it with. A stamp inside the environment makes the second run start at once.

SCOPE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints the constraints of packages that the environment lacks, so that those it has are left alone.
constraints_of_missing() {
    python - "$SCOPE_ROOT/constraints.txt" <<'PYTHON'
import importlib.metadata
import re
import sys

installed = {re.sub(r"[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions() if d.name}
with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
        if "==" in line and re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() not in installed:
            print(line, end="")
PYTHON
}

ensure_environment() {
    local extra="${1:-}" prefix python own=""
    prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -z "$prefix" ]]; then
        prefix="$SCOPE_ROOT/.venv"
        own=yes
    fi
    python="$prefix/bin/python"
    if [[ -n "$own" && ! -x "$prefix/bin/pip" ]]; then
        python="${PYTHON:-python3}"
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "$python is $("$python" --version 2>&1): megatron_scope needs Python 3.11 or newer;" \
            "name one with PYTHON=/path/to/python, or activate an environment that has it" >&2
        return 1
    fi
    if [[ -n "$own" && ! -x "$prefix/bin/pip" ]]; then
        echo "making $prefix" >&2
        "$python" -m venv "$prefix"
    fi
    export PATH="$prefix/bin:$PATH"

    local stamp="$prefix/.megatron_scope${extra:+-$extra}.stamp" wanted
    wanted="$SCOPE_ROOT $(cd "$SCOPE_ROOT" && cat setup.py constraints.txt | python -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    local done_stamp
    for done_stamp in "$stamp" "$prefix/.megatron_scope-dev.stamp"; do # dev serves every request
        if [[ -f "$done_stamp" && "$(cat "$done_stamp")" == "$wanted" ]]; then
            return 0
        fi
    done
    echo "installing megatron_scope${extra:+[$extra]} into $prefix" >&2
    local constraints="$SCOPE_ROOT/constraints.txt" scratch=""
    if [[ -z "$own" ]]; then
        scratch="$(mktemp)"
        constraints_of_missing >"$scratch"
        constraints="$scratch"
    fi
    python -m pip install --quiet --disable-pip-version-check -c "$constraints" \
        -e "$SCOPE_ROOT${extra:+[$extra]}" || { rm -f "$scratch"; return 1; }
    rm -f "$scratch"
    echo "$wanted" >"$stamp"
}
