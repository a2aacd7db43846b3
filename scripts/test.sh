#!/usr/bin/env bash
# Lint, types, and every test this machine can run. Arguments go to pytest:
#
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh tests/kernels -k up  some of it
#
# Tests marked gpu skip where there is no GPU; tests/titan skips where torchtitan is missing.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$REPOSITORY"

# two workers of one thread each: more threads than cores make small matrices slower, not faster
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

code=0
"$PYTHON" -m ruff check --quiet . || code=1
"$PYTHON" -m ruff format --check --quiet . || code=1
"$PYTHON" -m pyrefly check --summary=none --output-format=min-text \
  --python-interpreter-path "$(command -v "$PYTHON")" || code=1
"$PYTHON" -m pytest --color=no -n 2 "$@" || code=$?
exit $code
