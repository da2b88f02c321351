"""What every rank of the datasets' test runs: ``torchrun dataset_ranks.py TASK.json``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys

from mpsl_dist.config import from_dict
from mpsl_dist.methods import loop, processes
from mpsl_dist.runtime import environment, process, rpc


def main() -> None:
    world = environment.resolve(os.environ)
    assert world is not None
    if world.rank > 0:
        processes.serve_as_worker(toys.experiment(), world)
        return
    processes.join(toys.experiment(), world)
    for values in json.loads(Path(sys.argv[1]).read_text()):
        experiment = from_dict(values)
        splits = processes.checked_data(experiment)
        run = processes.open_run(experiment, resume=False, overwrite=False)
        method = processes.connect(experiment, world, splits)
        loop.train(experiment, splits, method, run, process.StopRequest())
    rpc.dismiss(world.world)


if __name__ == "__main__":
    main()
