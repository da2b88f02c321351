"""What is looked at before a run: its data, who holds what, its cost, its speed."""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path

from mpsl_dist.commands.ending import leave, say, status_of
from mpsl_dist.commands.train import add_experiment, serve
from mpsl_dist.errors import DivergedError, RemoteError, UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``cost``, ``partition``, ``data`` and ``bench`` to the command line."""
    cost = commands.add_parser("cost", help="parameters, FLOPs, bytes and memory, before any run")
    add_experiment(cost)
    cost.add_argument("--out", metavar="FILE.{json,csv}", help="write every figure to a file")
    cost.add_argument("--figures", metavar="DIR", help="draw cost against the encoder's size")
    cost.set_defaults(run=_cost)
    bench = commands.add_parser("bench", help="steps of several methods in turns, timed by phase")
    add_experiment(bench)
    bench.add_argument("--steps", type=int, default=20, metavar="N", help="of each method: 20")
    methods = "mpsl,psl,centralized"
    bench.add_argument("--methods", default=methods, metavar="A,B", help=f"default: {methods}")
    bench.add_argument("--out", default=".", metavar="DIR", help="for bench-<name>.json and .png")
    bench.add_argument("--overwrite", action="store_true", help="replace an earlier bench there")
    bench.set_defaults(run=_bench)
    _add_data(commands)
    partition = commands.add_parser("partition", help="who holds what: a table and a picture")
    add_experiment(partition)
    partition.add_argument("--out", metavar="FILE.png", help="default: partition-<name>.png")
    partition.set_defaults(run=_partition)


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="check a dataset on disk, or download it")
    actions = data.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check", help="what is there, missing or damaged, and where to get it"
    )
    add_experiment(check)
    check.add_argument("--workers", type=int, metavar="N", help="threads that decode")
    check.add_argument("--limit", type=int, metavar="N", help="decode only N files, 0 for none")
    add_experiment(actions.add_parser("download", help="resumed, verified, safely unpacked"))
    data.set_defaults(run=_data)


def _data(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import data_commands

    experiment = config.load(options.config, options.overrides)
    if options.action == "check":
        return data_commands.check_data(experiment, options.workers, options.limit)
    return data_commands.download_data(experiment)


def _partition(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import partition_view

    experiment = config.load(options.config, options.overrides)
    partition_view.show(experiment, Path(options.out or f"partition-{experiment.name}.png"))
    return 0


def _cost(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import cost, cost_figures, cost_table

    out = Path(options.out) if options.out else None
    cost.check_out(out)
    experiment = config.load(options.config, options.overrides)
    found = cost.cost_of(experiment)
    cost_table.show(found)
    if out:
        found.save(out)
        print(f"every figure lies in {out}")
    if options.figures:
        drawn = cost_figures.draw(experiment, Path(options.figures))
        print(f"drawn: {', '.join(map(str, drawn))}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis.bench import Bench
    from mpsl_dist.methods import processes
    from mpsl_dist.runtime import environment, launch

    experiment = config.load(options.config, options.overrides)
    bench = Bench.asked(experiment, options.steps, options.methods, options.out, options.overwrite)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launched = environment.resolve(os.environ)
    if launched is None and bench.ranks > 1:
        leave(bench.start(options.again))
    if launched and launched.folder:
        launch.follow(launched, experiment.faults.exit_timeout)
    launched = processes.place_in_world(bench.lead, options.words)
    if launched.rank:
        return serve(bench.lead, launched)
    try:
        bench.run(launched)
    except Exception as error:  # others may still be in the world
        told = isinstance(error, UserError | RemoteError | DivergedError)
        say(str(error) if told else traceback.format_exc())
        leave(status_of(error))
    return 0
