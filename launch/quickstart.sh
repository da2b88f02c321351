#!/usr/bin/env bash
# Trains MPSL on the built-in digits-qa: one server, ten clients on two workers, on this machine.
# Arguments pass through: launch/quickstart.sh training.epochs=3 --overwrite
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_project
cd "$root"
# torchrun would set this to 1 itself, with a warning; the run sets its own threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Rendezvous and RPC carry no password: whoever reaches their ports can run code. Loopback only.
exec "$venv/bin/torchrun" --standalone --local-addr 127.0.0.1 --nproc-per-node 3 \
    -m mpsl_dist train configs/quickstart.yaml "$@"
