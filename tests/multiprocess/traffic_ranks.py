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

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, from_dict
from mpsl_dist.methods import loop, processes
from mpsl_dist.records.traffic import nbytes
from mpsl_dist.runtime import environment, process, world
from mpsl_dist.runtime.answers import Answers
from mpsl_dist.runtime.fleet import Fleet

#: Tensor bytes of all calls and answers, whatever the method counts.
CALLED = {"up": 0, "down": 0}


def watch_calls() -> None:
    """Look at everything that the server hands to its fleet, and at every answer."""
    start = Fleet.start

    def watching(self, method, arguments, *others, **named):
        CALLED["down"] += sum(deep_bytes(values) for values in arguments.values())
        finish = start(self, method, arguments, *others, **named)

        def wait() -> Answers:
            answers = finish()
            CALLED["up"] += sum(deep_bytes(answer) for answer in answers.by_client.values())
            return answers

        return wait

    Fleet.start = watching
    create = world.create

    def creating(function, arguments, *others, **named):
        CALLED["down"] += sum(deep_bytes(values) for values in arguments.values())
        return create(function, arguments, *others, **named)

    world.create = creating


def deep_bytes(value: Any) -> int:
    """Count tensors, those inside dataclasses too."""
    if dataclasses.is_dataclass(value):
        return sum(deep_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, list | tuple):
        return sum(deep_bytes(item) for item in value)
    return nbytes(value)


def train_and_tell(experiment: Experiment, launched: environment.Environment) -> dict[str, Any]:
    """Run a whole training; gives what was counted, and what was called."""
    CALLED.update(up=0, down=0)
    holdings = Holdings.load(experiment)
    run = processes.open_run(experiment, resume=False, overwrite=False)
    method = processes.connect(experiment, launched, holdings)
    setup = dict(CALLED)
    loop.train(experiment, holdings.splits, method, run, process.StopRequest())
    return {"bytes": method.traffic.by_kind(), "called": dict(CALLED), "setup": setup}


def main() -> None:
    path = Path(sys.argv[1])
    launched = environment.resolve(os.environ)
    assert launched is not None
    if launched.rank > 0:
        processes.serve_as_worker(toys.experiment(), launched)
        return
    watch_calls()
    joined = processes.join(toys.experiment(), launched)
    experiments = [from_dict(values) for values in json.loads(path.read_text())]
    torch.save([train_and_tell(e, launched) for e in experiments], path.with_suffix(".pt"))
    joined.dismiss()


if __name__ == "__main__":
    main()
