"""What every rank of the traffic tests runs: ``torchrun traffic_ranks.py TASK.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys

from mpsl_dist.config import Experiment, from_dict
from mpsl_dist.methods import loop, processes
from mpsl_dist.methods.hosting import load_data
from mpsl_dist.records.traffic import nbytes
from mpsl_dist.runtime import environment, process, rpc

#: Tensor bytes of all calls and answers, whatever the method counts.
CALLED = {"up": 0, "down": 0}


def watch_calls() -> None:
    """Look at everything that the server hands to its fleet, and at every answer."""
    start = rpc.Fleet.start

    def watching(self, method, arguments, *others, **named):
        CALLED["down"] += sum(deep_bytes(values) for values in arguments.values())
        finish = start(self, method, arguments, *others, **named)

        def wait() -> dict[int, Any]:
            answers = finish()
            CALLED["up"] += sum(deep_bytes(answer) for answer in answers.values())
            return answers

        return wait

    rpc.Fleet.start = watching
    create = rpc.create

    def creating(function, arguments, *others, **named):
        CALLED["down"] += sum(deep_bytes(values) for values in arguments.values())
        return create(function, arguments, *others, **named)

    rpc.create = creating


def deep_bytes(value: Any) -> int:
    """Count tensors, those inside dataclasses too."""
    if dataclasses.is_dataclass(value):
        return sum(deep_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, list | tuple):
        return sum(deep_bytes(item) for item in value)
    return nbytes(value)


def train_and_tell(experiment: Experiment, world: environment.Environment) -> dict[str, Any]:
    """Run a whole training; gives what was counted, and what was called."""
    CALLED.update(up=0, down=0)
    splits = load_data(experiment)
    run = processes.open_run(experiment, resume=False, overwrite=False)
    method = processes.connect(experiment, world, splits)
    setup = dict(CALLED)
    loop.train(experiment, splits, method, run, process.StopRequest())
    return {"bytes": method.traffic.by_kind(), "called": dict(CALLED), "setup": setup}


def main() -> None:
    toys.register()
    path = Path(sys.argv[1])
    world = environment.resolve(os.environ)
    assert world is not None
    if world.rank > 0:
        processes.serve_as_worker(toys.experiment(), world)
        return
    watch_calls()
    processes.join(toys.experiment(), world)
    experiments = [from_dict(values) for values in json.loads(path.read_text())]
    torch.save([train_and_tell(e, world) for e in experiments], path.with_suffix(".pt"))
    rpc.dismiss(world.world)


if __name__ == "__main__":
    main()
