#!/usr/bin/env bash
# Runs the tests; arguments pass through to pytest: tests/run.sh tests/unit -k partition
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/install.sh"
install_project "$tested"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest "$@"
