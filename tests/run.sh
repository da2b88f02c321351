#!/usr/bin/env bash
# Runs the tests; arguments pass through to pytest: tests/run.sh tests/unit -k partition
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/install.sh"
install_project "$tested"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# -gt 0 ]; then exec "$venv/bin/python" -m pytest "$@"; fi
# Unit tests share the cores, file by file; the others have worlds, which share the machine, and
# run one after another.
status=0
"$venv/bin/python" -m pytest tests/unit --numprocesses auto --maxprocesses 8 --dist loadfile || status=$?
"$venv/bin/python" -m pytest tests --ignore=tests/unit || status=$?
exit $status
