"""What the user sees while it trains."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich import progress as bar
from rich.console import Console

_log = logging.getLogger("mpsl_dist")


def say(line: str) -> None:
    """Print a line, and log it."""
    print(line)
    _log.info("%s", line)


def warn(text: str) -> None:
    """Print a warning, and log it."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
    _log.warning("%s", text)


class Progress:
    """A bar on a terminal, a line now and then elsewhere: loss, metric, samples/s, time left.

    Parameters
    ----------
    total, done : int
        Steps of the run, and those done before it was resumed.
    samples_per_step : float
        Mean size of a global batch, for the samples/s.
    """

    #: Seconds between two lines where there is no terminal.
    INTERVAL = 10.0

    def __init__(self, total: int, done: int, samples_per_step: float) -> None:
        self.console = Console()
        self.total, self.first, self.done = total, done, done
        self.samples_per_step = samples_per_step
        self.started = self.spoke = time.perf_counter()
        self.metric = ""
        self.bar = bar.Progress(
            bar.TextColumn("step {task.completed}/{task.total}"),
            bar.BarColumn(),
            bar.TextColumn("{task.description}"),
            bar.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self, loss: float | None) -> None:
        """Count a step; its loss is None where nobody took part."""
        self.done += 1
        now = time.perf_counter()
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        shown = "unknown" if loss is None else f"{loss:.4f}"
        text = f"loss {shown} {self.metric} {rate * self.samples_per_step:.0f} samples/s"
        self.bar.update(self.task, completed=self.done, description=text)
        if not self.console.is_terminal and now - self.spoke >= self.INTERVAL:
            self.spoke = now
            left = (self.total - self.done) / rate
            self.say(f"step {self.done}/{self.total} {text}, {left:.0f} s left")

    def tested(self, epoch: int, metric: Mapping[str, float]) -> None:
        """Show the test result of an epoch, from 0."""
        self.metric = "  ".join(f"{name} {value:.3f}" for name, value in metric.items())
        if self.console.is_terminal:
            self.say(f"epoch {epoch + 1}: {self.metric}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False)
