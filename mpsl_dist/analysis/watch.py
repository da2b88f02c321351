"""A run seen from outside, by the files of its directory alone: how far it is, and how it goes."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpsl_dist.errors import RunError
from mpsl_dist.reading import read_json, read_yaml
from mpsl_dist.records import lock
from mpsl_dist.typed import flatten

#: Steps whose mean time tells what is left.
_RECENT = 50
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Tally:
    """What the lines of ``metrics.jsonl`` add up to."""

    step: int = 0
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    tests: list[dict[str, float]] = field(default_factory=list)
    #: Epochs, from 1, that the tests ended; and the steps of one, by the first of them.
    tested: list[int] = field(default_factory=list)
    steps_per_epoch: int | None = None
    up: int = 0
    down: int = 0
    lost: int = 0
    returned: int = 0
    repeated: int = 0
    #: Of steps and tests; of the last steps; of the last test.
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    test_seconds: float = 0.0

    def add(self, line: dict[str, Any]) -> None:
        """Add a line; one that is not of this project's making raises KeyError or TypeError."""
        self.step, self.epoch = line["step"], line["epoch"]
        self.seconds += line["seconds"]
        if line["split"] == "test":
            self.tests.append(line["metric"])
            self.tested.append(self.epoch + 1)
            self.test_seconds = line["seconds"]
            self.steps_per_epoch = self.step // (self.epoch + 1)
            return
        if line["loss"] is not None:
            self.losses.append(line["loss"])
        self.recent.append(line["seconds"])
        self.up, self.down = self.up + line["bytes"]["up"], self.down + line["bytes"]["down"]
        self.lost = line.get("clients_lost", 0)
        self.returned = line.get("clients_returned", 0)
        self.repeated = line.get("steps_repeated", 0)


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes
    ----------
    folder : Path
        The run directory.
    status : str
        ``waiting`` (not begun), ``starting``, ``running``, ``completed``, ``stopped``, ``failed``,
        ``gone``: its process ended without a word; or ``unknown``: it ended, and its summary
        cannot be read.
    who : str
        The process that has the run directory, or had it last.
    config, summary : dict
        What ``config.yaml`` (flattened) and ``summary.json`` hold; empty where there is none, or
        it cannot be read.
    steps_per_epoch : int or None
        None until the run has told.
    tally : Tally
    damage : tuple of str
        A line for each file that is there and cannot be read.
    """

    folder: Path
    status: str
    who: str
    config: dict[str, Any]
    summary: dict[str, Any]
    steps_per_epoch: int | None
    tally: Tally
    damage: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.status not in ("waiting", "starting", "running")

    @property
    def exit_status(self) -> int:
        """0 while it runs and once it is completed, with every file whole, else 1."""
        well = self.status in ("starting", "running", "completed")
        return int(not well or bool(self.damage))

    @property
    def epochs(self) -> int:
        """Epochs of the run; 0 where ``config.yaml`` does not say."""
        return self.config.get("training.epochs", 0)

    @property
    def steps(self) -> int | None:
        """Steps of the run."""
        return (self.steps_per_epoch or 0) * self.epochs or None

    @property
    def seconds_left(self) -> float | None:
        """Time to the end, as fast as of late."""
        tally = self.tally
        if self.ended or self.steps is None or not tally.recent:
            return None
        steps = (self.steps - tally.step) * statistics.fmean(tally.recent)
        return max(0.0, steps + (self.epochs - len(tally.tests)) * tally.test_seconds)


class Watcher:
    """Looks at a run directory again and again, and reads only what is new.

    Parameters
    ----------
    folder : Path
        Need not exist yet.

    Raises
    ------
    RunError
        If there is something else than a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget(0)
        begun = not folder.is_dir() or any(folder.iterdir())
        marks = (folder / name for name in ("config.yaml", lock.LOCK))
        if folder.exists() and begun and not any(mark.is_file() for mark in marks):
            raise RunError(f"{folder} is no run directory: it has no config.yaml; name runs/<name>")

    def look(self) -> Standing:
        """Return where the run stands now."""
        if not (self.folder / "config.yaml").is_file():
            return Standing(self.folder, "waiting", "", {}, {}, None, Tally())
        # In this order: a run ends by writing its summary and leaving its lock.
        taken, who = lock.holder(self.folder)
        self._read_metrics()
        damage = list(self._torn)
        summary = self._read("summary.json", damage)
        environment = self._read("environment.json", damage)
        config = self._config(damage)
        steps = environment.get("steps_per_epoch") or self._tally.steps_per_epoch
        if not taken and not self._file and summary.get("steps_completed"):
            damage.append("metrics.jsonl: not there, and summary.json tells of steps")
        status = self._status(taken, summary)
        whole = tuple(damage)
        return Standing(self.folder, status, who, config, summary, steps, self._tally, whole)

    def _status(self, taken: bool | None, summary: dict[str, Any]) -> str:
        running = "running" if self._tally.step else "starting"
        if taken:
            return running
        # A resumed run leaves the summary of its stop behind, and goes on beyond it; what a copy
        # has for times says nothing.
        told = summary.get("steps_completed", self._tally.step)
        if summary and (told == self._tally.step or not self._file):
            return summary.get("status", "failed")
        if not summary and (self.folder / "summary.json").exists():
            return "unknown"
        return "gone" if taken is False else running

    def _read(self, name: str, damage: list[str]) -> dict[str, Any]:
        """Return what a file holds; nothing where there is none, or, with a line, no whole one."""
        path = self.folder / name
        try:
            found = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
        except RunError as error:
            if path.exists():
                damage.append(str(error).removeprefix(f"{self.folder}/"))
            return {}
        if not found:
            damage.append(f"{name}: empty")
        return found

    def _config(self, damage: list[str]) -> dict[str, Any]:
        found = flatten(self._read("config.yaml", damage))
        kinds = {"method": str, "data.name": str, "clients": int, "training.epochs": int}
        wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
        if found and wrong:
            damage.append(f"config.yaml: no {', '.join(wrong)}, or no value of its type")
        return {} if wrong else found

    def _read_metrics(self) -> None:
        """Add what is new, up to the last whole line; begin again with a file that is another."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self._file or now.st_size < self._offset:
                    self._forget(now.st_ino)
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            self._forget(0)
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._lines += 1
            try:
                self._tally.add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self._torn = self._torn or (f"metrics.jsonl: line {self._lines} is no whole line",)

    def _forget(self, file: int) -> None:
        """Begin anew with this file, 0 for none."""
        self._tally, self._file, self._offset, self._lines = Tally(), file, 0, 0
        self._torn: tuple[str, ...] = ()


def follow(
    folder: Path, show: Callable[[Standing], object], wait: Callable[[], object]
) -> Standing:
    """Show a run, again after every wait, until it has ended; return how it stands then."""
    watcher = Watcher(folder)
    while True:
        standing = watcher.look()
        show(standing)
        if standing.ended:
            return standing
        wait()


def rows(standing: Standing) -> list[tuple[str, str]]:
    """Return what there is to tell, each with its name; only what the run has told yet."""
    tally, told = standing.tally, [("run", str(standing.folder)), ("status", _status(standing))]
    told += [("damaged", line) for line in standing.damage]
    if standing.config:
        names = [str(standing.config.get(key)) for key in ("method", "data.name", "clients")]
        told.append(("what", f"{names[0]} on {names[1]}, {names[2]} clients"))
    if tally.step:
        epochs = standing.epochs
        epoch = f"{min(tally.epoch + 1, epochs)} of {epochs}" if epochs else f"{tally.epoch + 1}"
        steps = f"{tally.step} of {standing.steps or 'an unknown number'}"
        told.append(("step", f"{steps}, epoch {epoch}"))
    if tally.losses:
        told.append(("loss", f"{tally.losses[-1]:.4f}"))
    told += [(_spoken(name), _tested(tally, name)) for name in (tally.tests or [{}])[-1]]
    if tally.step and tally.up + tally.down:
        told.append(("traffic", _traffic(standing)))
    if tally.step and standing.config.get("method", "centralized") != "centralized":
        told.append(("clients", _clients(standing)))
    if tally.recent:
        told.append(("time", _time(standing)))
    return told


def _status(standing: Standing) -> str:
    at = f", {standing.who}" if standing.who else ""
    return {
        "waiting": "waiting: the run has not begun",
        "starting": f"starting{at}",
        "running": f"running{at}",
        "failed": f"failed: {standing.summary.get('reason', 'see error.txt there')}",
        "stopped": "stopped; train with --resume continues",
        "unknown": "ended, it cannot be read how",
        "gone": f"gone without a word{at}; train with --resume continues",
    }.get(standing.status, standing.status)


def _tested(tally: Tally, name: str) -> str:
    values = [test.get(name, 0.0) for test in tally.tests]
    best = max(range(len(values)), key=values.__getitem__)
    last = f"{values[-1]:.4f} after epoch {tally.tested[-1]}"
    return f"{last}, highest {values[best]:.4f} after epoch {tally.tested[best]}"


def _traffic(standing: Standing) -> str:
    tally, both = standing.tally, standing.tally.up + standing.tally.down
    each = ""
    if standing.steps_per_epoch and standing.config:
        per = standing.config.get("clients", 1) * tally.step / standing.steps_per_epoch * 2**20
        each = f"{tally.up / per:.2f} MiB up, {tally.down / per:.2f} down a client and epoch; "
    return f"{each}{both / 2**20:,.0f} MiB in all"


def _clients(standing: Standing) -> str:
    tally, clients = standing.tally, standing.config.get("clients", 0)
    lost = standing.summary.get("clients_lost", tally.lost) if standing.ended else tally.lost
    text = f"{clients - lost} of {clients} alive"
    if lost or tally.returned or tally.repeated:
        text += f", {lost} lost, {tally.returned} returned, {tally.repeated} steps repeated"
    return text


def _time(standing: Standing) -> str:
    tally, left = standing.tally, standing.seconds_left
    text = (
        f"{statistics.fmean(tally.recent):.2f} s a step, {span(tally.seconds)} in steps and tests"
    )
    return text if left is None else f"{text}, about {span(left)} left"


def span(seconds: float) -> str:
    """Return a length of time as people say it: ``2 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _spoken(name: str) -> str:
    """Return a metric's name as it is said: ``image_to_text_r1`` is ``image to text r1``."""
    return name.replace("_", " ")


def panel(standing: Standing, width: int) -> Panel:
    """Draw a run for a terminal of this many columns: the rows, a bar, and curves."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    tally = standing.tally
    curves = {"loss": tally.losses}
    if tally.tests:
        name = next(iter(tally.tests[-1]))
        curves[_spoken(name)] = [test.get(name, 0.0) for test in tally.tests]
    for name, text in rows(standing)[2:]:
        table.add_row(name, Text(text))
        if name == "step" and standing.steps:
            table.add_row("", ProgressBar(standing.steps, tally.step, width=max(10, width - 40)))
        if len(curves.get(name, [])) > 1:
            table.add_row("", Text(curve(curves[name], max(10, width - 40)), style="cyan"))
    colour = {
        "completed": "green",
        "running": "blue",
        "failed": "red",
        "gone": "red",
        "unknown": "red",
    }
    body = Group(Text(_status(standing)), table)
    style = colour.get(standing.status, "yellow")
    title = Text(str(standing.folder))
    return Panel(body, title=title, title_align="left", border_style=style, width=120)


def curve(values: Sequence[float], width: int) -> str:
    """Draw numbers as a line of at most so many blocks, each the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    blocks = min(width, len(finite))
    edges = [round(i * len(finite) / blocks) for i in range(blocks + 1)]
    means = [statistics.fmean(finite[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BLOCKS[round((m - low) / (high - low or 1.0) * 7)] for m in means)
