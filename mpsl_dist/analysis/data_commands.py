"""``data check`` and ``data download``: the state of a dataset on disk, for people."""

from __future__ import annotations

import os
import time

from rich import progress as bar
from rich.console import Console

from mpsl_dist.actors.holdings import Holdings, data_options
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import DataError, catalog
from mpsl_dist.data.fetch.check import Report, check
from mpsl_dist.data.fetch.download import download
from mpsl_dist.data.partition import shares
from mpsl_dist.errors import UserError
from mpsl_dist.methods.federation import is_own, seen_by_worker
from mpsl_dist.methods.processes import checked_data


def check_data(experiment: Experiment, workers: int | None = None, limit: int | None = None) -> int:
    """Print what is there of the experiment's dataset, and what a run would do with it.

    What a run refuses is refused here too, by the very same code.

    Parameters
    ----------
    workers : int, optional
        Threads that decode; by default one a core, at most eight.
    limit : int, optional
        Decode only so many files, spread evenly; 0 decodes none.

    Returns
    -------
    int
        0 if the experiment can train on what is there, else 2.
    """
    data, hindrances, told = experiment.data, [], ""
    if _built_in(experiment):
        print(f"{data.name} is built in: no files to check")
    else:
        report = check(
            data.name,
            data.root,
            decode=limit != 0,
            workers=workers or min(8, os.cpu_count() or 1),
            limit=limit,
            text_length=data.text_length,
            needs=seen_by_worker(experiment)[0],
            **data_options(experiment),
        )
        print(report)
        told = report.problem
        hindrances += _damage(report, data.on_error or report.facts.on_error)
    try:
        holdings = checked_data(experiment)
    except UserError as error:
        hindrances += str(error).splitlines()
    else:
        print("\n".join(f"  {line}" for line in _plan(experiment, holdings)))
    for line in hindrances:
        if line not in told.splitlines():
            print(f"  not usable: {line}")
    if not hindrances:
        print("  usable")
    return 2 if hindrances else 0


def _damage(report: Report, on_error: str) -> list[str]:
    """Return why training would end at a file that is there and cannot be read."""
    faults = len(report.missing) + len(report.damaged)
    if not faults or report.problem or on_error != "raise":
        return []
    return [
        f"data.on_error=raise ends a run at any of these {faults:,} files; data.on_error=skip goes "
        "on without them"
    ]


def _plan(experiment: Experiment, holdings: Holdings) -> list[str]:
    """Return what a run of the experiment would do with its data."""
    sizes, batch = holdings.sizes, experiment.training.batch_size
    steps = len(shares(sizes, batch, experiment.client_share))
    if is_own(experiment):
        has = f"{sum(sizes):,} samples for {len(sizes):,} clients"
        tests = sum(map(len, holdings.tests))
        return [
            f"a worker here: {', '.join(holdings.splits.shapes)}; {has}, {tests:,} for testing; "
            "what other hosts have shows at the start"
        ]
    where = "the server" if experiment.data.test_at == "server" else "the clients, a part each"
    return [
        f"the run: {experiment.method} on {', '.join(holdings.splits.shapes)}, tested at {where}",
        f"partition: {holdings.dealt.rule}; {len(sizes):,} clients with {min(sizes):,} to "
        f"{max(sizes):,} samples",
        f"an epoch: {sum(sizes):,} samples in {steps:,} global batches of {batch:,}",
    ]


def _built_in(experiment: Experiment) -> bool:
    try:
        return not catalog.find(experiment.data.name, experiment.plugins).files
    except DataError:
        return False


def download_data(experiment: Experiment) -> int:
    """Download the experiment's dataset into ``data.root``.

    Returns
    -------
    int
        The exit status, 0.

    Raises
    ------
    UserError
        If no folder is named, or the dataset cannot be downloaded.
    """
    data = experiment.data
    if _built_in(experiment):
        print(f"{data.name} is built in: nothing to download")
        return 0
    if data.root is None:
        raise ConfigError("data.root: name the folder to download into")
    with Transfers() as transfers:
        done = download(data.name, data.root, transfers.tell, experiment.plugins)
    print("\n".join(done))
    return 0


class Transfers:
    """Bars on a terminal, a line now and then elsewhere: how much of each file is there."""

    #: Seconds between two lines where there is no terminal.
    INTERVAL = 10.0

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.spoke = 0.0
        self.tasks: dict[str, bar.TaskID] = {}
        self.bar = bar.Progress(
            bar.TextColumn("{task.description}"),
            bar.BarColumn(),
            bar.DownloadColumn(binary_units=True),
            bar.TransferSpeedColumn(),
            bar.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Transfers:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, name: str, have: int, total: int | None) -> None:
        """Show that ``have`` bytes of ``total`` (None: unknown) of the file ``name`` are there."""
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name)
        self.bar.update(self.tasks[name], completed=have, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.spoke >= self.INTERVAL:
            self.spoke = now
            of = "" if total is None else f" of {total / 2**20:,.1f}"
            self.console.print(f"{name}: {have / 2**20:,.1f}{of} MiB", highlight=False)
