#!/usr/bin/env bash
# Sets up and runs the tests, a file at a time in two processes (WORKERS=…). --fast leaves out those marked slow: two
# minutes, for every save. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
arguments=()
for argument in "$@"; do
  case "$argument" in --fast) arguments+=(-m "not slow") ;; *) arguments+=("$argument") ;; esac
done
exec "$VENV/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "${arguments[@]}"
