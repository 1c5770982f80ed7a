#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec "$VENV/bin/python" -m pytest "$@"
