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
from mpsl_dist.runtime import environment, process


def main() -> None:
    launched = environment.resolve(os.environ)
    assert launched is not None
    if launched.rank > 0:
        processes.serve_as_worker(toys.experiment(), launched)
        return
    joined = processes.join(toys.experiment(), launched)
    for values in json.loads(Path(sys.argv[1]).read_text()):
        experiment = from_dict(values)
        holdings = processes.checked_data(experiment)
        run = processes.open_run(experiment, resume=False, overwrite=False)
        method = processes.connect(experiment, launched, holdings)
        loop.train(experiment, holdings.splits, method, run, process.StopRequest())
    joined.dismiss()


if __name__ == "__main__":
    main()
