"""``data check`` and ``data download``: the state of a dataset on disk, for people."""

from __future__ import annotations

import os
import time

from rich import progress as bar
from rich.console import Console

from mpsl_dist.actors.holdings import data_options
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import DataError, catalog
from mpsl_dist.data.fetch.check import Report, check
from mpsl_dist.data.fetch.download import download


def check_data(experiment: Experiment, workers: int | None = None, limit: int | None = None) -> int:
    """Print what is there of the experiment's dataset.

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
    data = experiment.data
    if _built_in(experiment):
        print(f"{data.name} is built in: nothing to check")
        return 0
    report = check(
        data.name,
        data.root,
        decode=limit != 0,
        workers=workers or min(8, os.cpu_count() or 1),
        limit=limit,
        text_length=data.text_length,
        **data_options(experiment),
    )
    print(report)
    verdict = _hindrance(report, data.on_error or report.facts.on_error)
    print(f"  {verdict or 'usable'}")
    return 2 if verdict else 0


def _hindrance(report: Report, on_error: str) -> str:
    """Return why training could not run to its end; an empty text if it could."""
    if not report.usable:
        return "not usable: see above" if report.problem else "not usable: a split has no samples"
    faults = len(report.missing) + len(report.damaged)
    if faults and on_error == "raise":
        return (
            f"not usable as it is: data.on_error=raise ends a run at any of these {faults:,} "
            "files; data.on_error=skip goes on without them"
        )
    return ""


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
