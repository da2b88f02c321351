"""Train the runs of a sweep one after another, each with all its clients in this very process.

    python launch/in_one_process.py configs/sweeps/mlecs.yaml data.root=DATA

Runs leave the run directories that ``mpsl_dist compare`` reads; completed ones are skipped. Nothing
is lost here but parallel clients: messages, mini-batches and traffic are those of workers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works from a checkout that is not installed

import sweep  # noqa: E402

from mpsl_dist import plugins  # noqa: E402
from mpsl_dist.actors.host import Host  # noqa: E402
from mpsl_dist.config import Experiment  # noqa: E402
from mpsl_dist.config.methods import facts_of  # noqa: E402
from mpsl_dist.errors import UserError  # noqa: E402
from mpsl_dist.methods import loop, processes  # noqa: E402
from mpsl_dist.methods.hosting import BuildClients, Setup  # noqa: E402
from mpsl_dist.runtime import world  # noqa: E402
from mpsl_dist.runtime.local import LocalFleet  # noqa: E402
from mpsl_dist.runtime.process import StopRequest  # noqa: E402


def main(words: Sequence[str]) -> int:
    """Train what a file asks for and return the exit status."""
    try:
        planned, _ = sweep.read(Path(words[0]), words[1:])
        # What is done at any time is of the same seeds in all rows.
        for run in sorted(planned, key=lambda run: run.experiment.seed):
            if not (run.exists and run.completed):
                train(run.experiment)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train(experiment: Experiment) -> None:
    """Train one run, from its beginning."""
    world.set_threads(experiment.runtime.server_threads or 1)
    holdings = processes.checked_data(experiment)

    def transport(build: BuildClients) -> LocalFleet:
        return LocalFleet(Host(build(experiment, range(experiment.clients), holdings)))

    run = processes.open_run(experiment, resume=False, overwrite=True)
    setup = Setup(experiment, holdings, 1, transport=transport)
    method = plugins.resolve(facts_of(experiment).build)(setup)
    summary = loop.train(experiment, holdings.splits, method, run, StopRequest(None))
    print(f"{experiment.name}: {summary['test']}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
