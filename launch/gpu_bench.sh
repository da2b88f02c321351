#!/usr/bin/env bash
# Benches ViT-B, L and H (half of the blocks trained) with 25 clients on inputs of the paper's
# shapes, image+text and image+audio, then runs tests/gpu. No data and no weights are needed, and
# nothing is installed: PYTHON names an interpreter that has what setup.cfg lists, pytest with it.
# Arguments go to every bench (--steps 50, key.path=value); SIZES and OUT choose what and where to:
#   SIZES="b l" OUT=figures launch/gpu_bench.sh --methods mpsl,centralized
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-gpu-bench}")
cd "$root"
export PYTHONPATH=$root:$root/launch${PYTHONPATH:+:$PYTHONPATH}

for size in ${SIZES:-b l h}; do
    for inputs in image+text image+audio; do
        "$python" -m mpsl_dist bench "configs/scale/vit-$size.yaml" \
            "plugins=[synthetic]" "data.name=synthetic-$inputs" data.root=null data.pixels=null \
            weights.encoder=random weights.image=random weights.text=random \
            training.autocast=bf16 \
            "name=vit-$size-$inputs" --out "$out" "$@"
    done
done
exec "$python" -m pytest tests/gpu
