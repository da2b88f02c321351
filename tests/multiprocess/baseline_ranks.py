"""What every rank of the baselines' tests runs: ``torchrun baseline_ranks.py TASK.json``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, from_dict
from mpsl_dist.methods import processes
from mpsl_dist.models.average import trainable_state
from mpsl_dist.runtime import environment


def train_and_tell(experiment: Experiment, launched: environment.Environment, steps: int) -> dict:
    """Train some steps; give losses, traffic and every trained parameter."""
    method = processes.connect(experiment, launched, Holdings.load(experiment))
    told: dict[str, Any] = {"losses": [], "backwards": [], "plan": method.plan.tolist()}
    if experiment.method in ("mpsl", "psl"):
        encoder = method.server.model.encoder
        encoder.register_full_backward_hook(lambda *_: told["backwards"].append(1))
    for step in range(steps):
        epoch, epoch_step = divmod(step, len(method.plan))
        if epoch_step == 0:
            method.begin_epoch(epoch)
        told["losses"].append(method.step(epoch_step, step))
    told["bytes"] = method.traffic.by_kind()
    if experiment.method in ("mpsl", "psl"):
        told["server"] = trainable_state(method.server.model)
        told["clients"] = method.clients.tokenizer_weights(
            list(method.sizes), "test", "test_weights_up"
        )
    elif experiment.method == "standalone":
        told["test"] = method.evaluate()
    elif experiment.method == "mlecs":
        told["server"], told["clients"] = method.cloud.shared, {}
    else:
        told["server"], told["clients"] = trainable_state(method.model), {}
    return told


def main() -> None:
    path = Path(sys.argv[1])
    launched = environment.resolve(os.environ)
    assert launched is not None
    if launched.rank > 0:
        processes.serve_as_worker(toys.experiment(), launched)
        return
    joined = processes.join(toys.experiment(), launched)
    task = json.loads(path.read_text())
    experiments = [from_dict(e) for e in task["experiments"]]
    told = [train_and_tell(experiment, launched, task["steps"]) for experiment in experiments]
    torch.save(told, path.with_suffix(".pt"))
    joined.dismiss()


if __name__ == "__main__":
    main()
