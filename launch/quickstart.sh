#!/usr/bin/env bash
# Trains MPSL on the built-in digits-qa: one server, ten clients on two workers, on this machine.
# Arguments pass through: launch/quickstart.sh training.epochs=3 --overwrite
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_project
cd "$root"
exec "$venv/bin/python" -m mpsl_dist train configs/quickstart.yaml "$@"
